package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/netstack"
)

func newDemo() *cobra.Command {
	size := "512MiB"
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "download a file through a tunnel between two nodes in this process",
		Long: `Demo starts two nodes with fresh keys in this process, publishes an HTTP server on
one of them, downloads a file of random data with the other over UDP on loopback and
checks its SHA-256; then once more without superpackets, UDP_SEGMENT and UDP_GRO.
It needs no privileges and leaves nothing behind.

CPU time is that of the whole process: both nodes, HTTP server and client, and
writing the file. The file is hashed after the clock has stopped.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			n, ok := config.ParseSize(size)
			if !ok || n < 1 || n > 1<<40 {
				return exitWith(exitUsage, fmt.Errorf("--size %q: expected a size from 1 to 1024GiB, such as 512MiB", size))
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			err := demo(ctx, n, cmd.OutOrStdout(), cmd.ErrOrStderr())
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return err
		}),
	}
	cmd.Flags().StringVar(&size, "size", size, "of the file")
	return cmd
}

// demo makes the file and downloads it twice.
func demo(ctx context.Context, size int64, stdout, stderr io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "penstock-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	d := &demoFile{dir: dir, size: size, progress: newProgress(stderr)}
	if err := d.make(ctx); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "Two nodes in this process, DTLS over UDP on loopback, one TCP connection.\nThe file: %s of random data, SHA-256 %x\n\n", config.FormatSize(size), d.sum)
	fast, err := d.download(ctx, "with GSO", true)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, fast)
	slow, err := d.download(ctx, "without GSO", false)
	if err != nil {
		return err
	}
	fmt.Fprintln(stdout, slow)
	_, err = fmt.Fprintf(stdout, "\nBoth files are equal to the first by SHA-256. Ratio: %.1f\n", fast.gbits()/slow.gbits())
	return err
}

// demoFile is the file that is downloaded.
type demoFile struct {
	dir      string
	size     int64
	sum      [sha256.Size]byte
	progress *progress
}

const demoName = "file.bin"

// result is what a download took.
type result struct {
	name    string
	bytes   int64
	took    time.Duration
	cpu     time.Duration // 0: the system does not tell
	records float64       // per system call that sent
}

func (r *result) gbits() float64 { return float64(r.bytes) * 8 / 1e9 / r.took.Seconds() }

func (r *result) String() string {
	s := fmt.Sprintf("%-12s %6.2f Gbit/s in %6.2f s", r.name, r.gbits(), r.took.Seconds())
	if r.cpu > 0 {
		s += fmt.Sprintf(", %5.2f CPU-s per GB", r.cpu.Seconds()/(float64(r.bytes)/1e9))
	}
	return s + fmt.Sprintf(", %5.1f records per send", r.records)
}

// download starts two nodes, downloads the file from one with the other and compares
// its hash.
func (d *demoFile) download(ctx context.Context, name string, gso bool) (res *result, err error) {
	client, server, err := demoNodes(ctx, gso)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, client.Close(), server.Close()) }()
	stop, err := d.serve(server)
	if err != nil {
		return nil, err
	}
	defer stop()

	path := filepath.Join(d.dir, "downloaded")
	res = &result{name: name, bytes: d.size}
	began, cpu := time.Now(), cpuTime()
	if err := d.get(ctx, client, name, path); err != nil {
		return nil, fmt.Errorf("download: %w", err)
	}
	res.took, res.cpu = time.Since(began), cpuTime()-cpu
	res.records = recordsPerSend(server.Status())
	return res, d.compare(path)
}

// demoNodes are two nodes with fresh keys that know each other.
func demoNodes(ctx context.Context, gso bool) (client, server *netstack.Node, err error) {
	configs := make([]netstack.Config, 2)
	for i := range configs {
		key, err := netstack.GenerateKey()
		if err != nil {
			return nil, nil, err
		}
		configs[i] = netstack.Config{
			PrivateKey: key,
			Addresses:  []netip.Prefix{demoAddress(i)},
			Listen:     []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
			NoGSO:      !gso,
		}
		configs[i].Socket.DisableGSO = !gso
		configs[i].Socket.DisableGRO = !gso
	}
	peer := func(i int) netstack.Peer {
		return netstack.Peer{PublicKey: configs[i].PrivateKey.Public(), AllowedIPs: []netip.Prefix{demoAddress(i)}}
	}
	configs[1].Peers = []netstack.Peer{peer(0)}
	if server, err = netstack.New(configs[1]); err != nil {
		return nil, nil, err
	}
	p := peer(1)
	p.Endpoint = server.LocalAddrs()[0].String()
	configs[0].Peers = []netstack.Peer{p}
	if client, err = netstack.New(configs[0]); err != nil {
		return nil, nil, errors.Join(err, server.Close())
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := client.WaitEstablished(ctx, p.PublicKey); err != nil {
		return nil, nil, errors.Join(err, client.Close(), server.Close())
	}
	return client, server, nil
}

func demoAddress(i int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, 0, byte(i + 1)}), 32)
}

// serve publishes the file's folder by HTTP inside the VPN.
func (d *demoFile) serve(node *netstack.Node) (stop func(), err error) {
	l, err := node.Listen("tcp", ":80")
	if err != nil {
		return nil, err
	}
	s := &http.Server{Handler: http.FileServer(http.Dir(d.dir)), ReadHeaderTimeout: 10 * time.Second}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l) // http.ErrServerClosed
	}()
	return func() { s.Close(); <-served }, nil
}

// get downloads the file through node to path.
func (d *demoFile) get(ctx context.Context, node *netstack.Node, name, path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	t := &http.Transport{
		DisableCompression: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return node.Dial(ctx, network, address)
		},
	}
	defer t.CloseIdleConnections()
	url := "http://" + demoAddress(1).Addr().String() + "/" + demoName
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return d.progress.copy(ctx, name, f, resp.Body, d.size)
}

// compare hashes what was downloaded.
func (d *demoFile) compare(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.CopyBuffer(h, f, make([]byte, 1<<20))
	if err != nil {
		return err
	}
	if n != d.size || [sha256.Size]byte(h.Sum(nil)) != d.sum {
		return fmt.Errorf("the file arrived as another one: %d bytes with SHA-256 %x", n, h.Sum(nil))
	}
	return nil
}

// recordsPerSend is how many datagrams left a node with one system call.
func recordsPerSend(s netstack.Status) float64 {
	var datagrams, sends uint64
	for _, socket := range s.Tunnel.Sockets {
		datagrams += socket.Stats.DatagramsOut
		sends += socket.Stats.Sends
	}
	if sends == 0 {
		return 0
	}
	return float64(datagrams) / float64(sends)
}
