package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

const (
	// crowdPool has 500 addresses.
	crowdPool    = "10.97.1.1-10.97.2.244"
	crowdSize    = 500
	crowdDying   = 50
	crowdTime    = time.Minute
	crowdMemory  = 200 << 10 // bytes for each client, of the server's resident memory
	crowdPayload = 64 << 10
)

// crowdEnv makes this test binary the server of TestFiveHundredClients.
const crowdEnv = "PENSTOCK_TEST_CROWD"

// openDoor is a back end where everybody may come in whose password is the name: what a check of
// bcrypt costs is meant to be much, and is not what is measured here.
type openDoor struct{}

func (openDoor) Password(_ context.Context, name, password string) (*gateway.User, error) {
	if name != password {
		return nil, gateway.ErrDenied
	}
	return &gateway.User{Name: name}, nil
}

func (openDoor) User(_ context.Context, name string) (*gateway.User, error) {
	return &gateway.User{Name: name}, nil
}

// crowdReport is what the server says about itself.
type crowdReport struct {
	Addr     netip.AddrPort
	Pin      string
	Resident int64 // bytes, after a collection that gave back what was free
	Live     uint64
	Status   gateway.Status
	Sessions []gateway.SessionStatus
}

// crowdServer is the server's process: a report for each line of standard input, until that ends.
func crowdServer() error {
	pool, err := gateway.ParseRange(crowdPool)
	if err != nil {
		return err
	}
	s, err := gateway.New(gateway.Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, StateDir: os.Getenv(crowdEnv), Users: openDoor{},
		Profile: gateway.Profile{Pool: gateway.Pool{pool}, DPD: 5 * time.Second, DisconnectedTimeout: 2 * time.Second},
		Node:    netstack.Config{Addresses: []netip.Prefix{netip.MustParsePrefix("10.97.0.1/16")}},
	})
	if err != nil {
		return err
	}
	l, err := s.Node().Listen("tcp", "10.97.0.1:7")
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	out := json.NewEncoder(os.Stdout)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		r := crowdReport{Addr: s.Addrs()[0], Pin: s.Pin(), Status: s.Status()}
		if r.Sessions, err = s.Sessions(context.Background()); err != nil {
			return err
		}
		var m runtime.MemStats
		runtime.GC()
		debug.FreeOSMemory()
		runtime.ReadMemStats(&m)
		r.Live = m.HeapAlloc + m.StackInuse
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(string(status), "\nVmRSS:")
		if _, err := fmt.Sscan(rest, &r.Resident); err != nil {
			return err
		}
		r.Resident <<= 10
		if err := out.Encode(r); err != nil {
			return err
		}
	}
	l.Close()
	return s.Close()
}

// A crowd is a server in another process, and its clients in this one.
type crowd struct {
	t    *testing.T
	in   io.Writer
	out  *json.Decoder
	addr netip.AddrPort
	pin  string
}

func newCrowd(t *testing.T) *crowd {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestFiveHundredClients$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), crowdEnv+"="+t.TempDir())
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer late.Stop()
		io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the server: %v", err)
		}
	})
	c := &crowd{t: t, in: in, out: json.NewDecoder(out)}
	r := c.report()
	c.addr, c.pin = r.Addr, r.Pin
	return c
}

func (c *crowd) report() (r crowdReport) {
	c.t.Helper()
	if _, err := io.WriteString(c.in, "\n"); err != nil {
		c.t.Fatal(err)
	}
	if err := c.out.Decode(&r); err != nil {
		c.t.Fatal(err)
	}
	return r
}

// await waits for a report that is as ok wants it.
func (c *crowd) await(what string, ok func(r *crowdReport) bool) crowdReport {
	c.t.Helper()
	for end := time.Now().Add(40 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		r := c.report()
		if ok(&r) {
			return r
		}
		if time.Now().After(end) {
			c.t.Fatalf("%s: %d clients, %d sessions", what, r.Status.Clients, len(r.Sessions))
		}
	}
}

// mortal is what the sockets of a client that may die have in common. A dead one sends nothing and gets
// nothing, and its sockets stay open: nobody is told.
type mortal struct{ dead atomic.Bool }

type mortalStream struct {
	net.Conn
	*mortal
}

func (m mortalStream) Write(b []byte) (int, error) {
	if m.dead.Load() {
		return len(b), nil
	}
	return m.Conn.Write(b)
}

type mortalDatagrams struct {
	transport.PacketConn
	*mortal
}

func (m mortalDatagrams) WriteBatch(runs []transport.Run) (int, error) {
	if m.dead.Load() {
		return len(runs), nil
	}
	return m.PacketConn.WriteBatch(runs)
}

func (m mortalDatagrams) ReadBatch(batch []transport.Inbound) (int, error) {
	for {
		n, err := m.PacketConn.ReadBatch(batch)
		if err != nil || !m.dead.Load() {
			return n, err
		}
	}
}

// crowdClient is one of them.
type crowdClient struct {
	*netstack.Node
	*mortal
}

// client signs in as number i, from an address of its own, and connects.
func (c *crowd) client(ctx context.Context, i int) (*crowdClient, error) {
	m := new(mortal)
	from := netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
	dialer := openconnect.Dialer{Pin: c.pin, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
		conn, err := d.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return mortalStream{conn, m}, nil
	}}
	login, err := openconnect.SignIn(ctx, openconnect.Options{
		Dialer: dialer, Server: "https://" + c.addr.String(), Tries: 1,
		Prompt: func(context.Context, openconnect.Question) (string, error) { return fmt.Sprintf("user%d", i), nil },
	})
	if err != nil {
		return nil, fmt.Errorf("sign-in: %w", err)
	}
	udp, err := transport.ListenUDP(netip.AddrPortFrom(from, 0), transport.SocketOptions{})
	if err != nil {
		return nil, err
	}
	n, err := netstack.New(netstack.Config{
		OpenConnect: &netstack.OpenConnect{Login: *login, Connect: openconnect.ConnectOptions{Dialer: dialer}, Timeout: crowdTime},
		Conns:       []transport.PacketConn{mortalDatagrams{udp, m}},
	})
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return &crowdClient{n, m}, nil
}

// echo sends bytes through the tunnel and wants them back.
func (n *crowdClient) echo(ctx context.Context) error {
	c, err := n.Dial(ctx, "tcp", "10.97.0.1:7")
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(crowdTime))
	data, back := make([]byte, crowdPayload), make([]byte, crowdPayload)
	rand.Read(data)
	go c.Write(data)
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if !bytes.Equal(data, back) {
		return errors.New("what came back is not what was sent")
	}
	return nil
}

// each calls do for the numbers from first to before last, several at once, and reports its errors.
func (c *crowd) each(first, last int, do func(i int) error) {
	c.t.Helper()
	errs := make([]error, last)
	numbers := make(chan int)
	var tasks sync.WaitGroup
	for range 32 {
		tasks.Go(func() {
			for i := range numbers {
				errs[i] = do(i)
			}
		})
	}
	for i := first; i < last; i++ {
		numbers <- i
	}
	close(numbers)
	tasks.Wait()
	failed := 0
	for i, err := range errs {
		if err == nil {
			continue
		}
		if failed++; failed <= 5 {
			c.t.Errorf("client %d: %v", i, err)
		}
	}
	if failed > 0 {
		c.t.Fatalf("%d of %d clients failed", failed, last-first)
	}
}

// withRace tells whether the race detector is built in.
func withRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// TestFiveHundredClients: as many clients as there are addresses, all by DTLS and with their TLS connection beside it,
// against the bars for time and memory. Then some die without a goodbye, and others get their addresses.
func TestFiveHundredClients(t *testing.T) {
	if os.Getenv(crowdEnv) != "" {
		if err := crowdServer(); err != nil {
			t.Fatal(err)
		}
		return
	}
	size, dying, small := crowdSize, crowdDying, false
	if testing.Short() || withRace() {
		size, dying, small = 50, 10, true
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	c := newCrowd(t)
	nodes := make([]*crowdClient, size+dying)
	t.Cleanup(func() { // where the test has failed; else they are closed
		var tasks sync.WaitGroup
		for _, n := range nodes {
			if n != nil {
				tasks.Go(func() { n.Close() })
			}
		}
		tasks.Wait()
	})
	connect := func(i int) (err error) {
		nodes[i], err = c.client(ctx, i)
		return err
	}
	echo := func(i int) error { return nodes[i].echo(ctx) }

	before := c.report()
	began := time.Now()
	c.each(0, size, connect)
	took := time.Since(began)
	c.each(0, size, echo)
	full := c.await("all in, by DTLS", func(r *crowdReport) bool {
		dtls := 0
		for _, s := range r.Sessions {
			if s.Connected && s.Path == "dtls" {
				dtls++
			}
		}
		return r.Status.Clients == size && dtls == size
	})
	memory := (full.Resident - before.Resident) / int64(size)
	t.Logf("%d clients in %v; the server has %d KB of resident memory for each, %d KB of it live heap and stacks",
		size, took.Round(time.Millisecond), memory>>10, (full.Live-before.Live)/uint64(size)>>10)
	if took > crowdTime {
		t.Errorf("connecting took %v, want %v at most", took, crowdTime)
	}
	if !small {
		if memory > crowdMemory {
			t.Errorf("%d bytes for each client, want %d at most", memory, crowdMemory)
		}
		if _, err := c.client(ctx, size); err == nil || !strings.Contains(err.Error(), "No address is free") {
			t.Errorf("one client more than addresses: %v", err)
		}
	}

	leased := make(map[netip.Addr]bool) // of the dying
	for _, n := range nodes[:dying] {
		leased[n.Addresses()[0].Addr()] = true
		n.dead.Store(true)
	}
	left := c.await("the dead have left", func(r *crowdReport) bool { return len(r.Sessions) == size-dying })
	for _, s := range left.Sessions {
		if leased[s.Addresses[0]] || !s.Connected {
			t.Errorf("left over: %+v", s)
		}
	}
	c.each(dying, size, echo) // the others did not notice
	c.each(size, size+dying, connect)
	c.each(size, size+dying, echo)
	if !small {
		for _, n := range nodes[size:] { // there are no other addresses
			if !leased[n.Addresses()[0].Addr()] {
				t.Errorf("%v was not returned by the dead", n.Addresses()[0])
			}
		}
	}

	// The living say goodbye, which is heard at once.
	c.each(0, size+dying, func(i int) error { return nodes[i].Close() })
	c.await("all have left", func(r *crowdReport) bool { return len(r.Sessions) == 0 })
}
