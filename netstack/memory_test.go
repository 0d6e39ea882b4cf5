package netstack

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

const (
	manyPeers = 1000
	// The bars for what an established, idle peer costs and for a whole node with
	// manyPeers of them.
	maxPeerBytes = 50 << 10
	maxNodeBytes = 150 << 20
)

// peersEnv makes this test binary the far side of TestThousandPeers: its value is the
// address of the node to call.
const peersEnv = "PENSTOCK_TEST_PEERS_OF"

// numberedKey is the key of far peer i, and of the node itself for -1.
func numberedKey(i int) PrivateKey {
	return sha256.Sum256(binary.BigEndian.AppendUint32([]byte("memory test "), uint32(i)))
}

func numberedAddr(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 70, byte(i >> 8), byte(i)})
}

// idleDevice neither gives nor takes packets.
type idleDevice struct{ closed chan struct{} }

func (d idleDevice) Read([][]byte, []int, int) (int, error) { <-d.closed; return 0, os.ErrClosed }
func (d idleDevice) Write(b [][]byte, _ int) (int, error)   { return len(b), nil }
func (d idleDevice) BatchSize() int                         { return 1 }

// farPeers calls the node from manyPeers transports until standard input ends.
func farPeers(node string) error {
	device := idleDevice{make(chan struct{})}
	var transports []*transport.Transport
	for i := range manyPeers {
		c, err := transport.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), transport.SocketOptions{})
		if err != nil {
			return err
		}
		t, err := transport.New(transport.Config{Key: numberedKey(i), Conns: []transport.PacketConn{c}, Device: device})
		if err != nil {
			return err
		}
		err = t.AddPeer(transport.PeerConfig{
			PublicKey: numberedKey(-1).Public(), Endpoint: node, AllowedIPs: prefixes("10.70.255.255/32"),
		})
		if err != nil {
			return err
		}
		transports = append(transports, t)
	}
	io.Copy(io.Discard, os.Stdin)
	close(device.closed)
	for _, t := range transports {
		t.Close()
	}
	return nil
}

// TestThousandPeers holds a node with 1,000 established peers, real ones in another process,
// against the bars for memory.
func TestThousandPeers(t *testing.T) {
	if node := os.Getenv(peersEnv); node != "" {
		if err := farPeers(node); err != nil {
			t.Fatal(err)
		}
		return
	}
	if raceEnabled {
		t.Skip("the race detector multiplies memory")
	}
	if runtime.GOOS != "linux" {
		t.Skip("reads /proc")
	}
	n := start(t, Config{
		PrivateKey: numberedKey(-1), Addresses: prefixes("10.70.255.255/16"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
	})
	before := inUse()
	for i := range manyPeers {
		p := Peer{PublicKey: numberedKey(i).Public(), AllowedIPs: []netip.Prefix{netip.PrefixFrom(numberedAddr(i), 32)}}
		if err := n.AddPeer(p); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(within(t, 2*time.Minute), self, "-test.run=^TestThousandPeers$", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), peersEnv+"="+n.LocalAddrs()[0].String())
	cmd.Stderr = os.Stderr
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		hold.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("far side: %v", err)
		}
	}()

	begin := time.Now()
	for established := 0; established < manyPeers; {
		if time.Since(begin) > 90*time.Second {
			t.Fatalf("%d of %d peers established after %v", established, manyPeers, time.Since(begin))
		}
		time.Sleep(100 * time.Millisecond)
		established = 0
		for _, p := range n.Status().Tunnel.Peers {
			if p.State == transport.PeerEstablished {
				established++
			}
		}
	}
	took := time.Since(begin)
	// The handshakes let go of what they held.
	deadline := time.Now().Add(patience)
	for n.Status().Tunnel.HalfOpen > 0 && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	perPeer := (inUse() - before) / manyPeers
	resident := rss(t)
	t.Logf("%d peers established in %v: %d bytes each, %d MiB resident in all, %d goroutines",
		manyPeers, took.Round(time.Millisecond), perPeer, resident>>20, runtime.NumGoroutine())
	if perPeer > maxPeerBytes {
		t.Errorf("an idle peer costs %d bytes, the bar is %d", perPeer, maxPeerBytes)
	}
	if resident > maxNodeBytes {
		t.Errorf("the process is %d MiB, the bar is %d", resident>>20, maxNodeBytes>>20)
	}
}

// inUse is the memory that heap and stacks use.
func inUse() int64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// rss is the resident memory of this process.
func rss(t *testing.T) int64 {
	t.Helper()
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if kb, ok := strings.CutPrefix(s.Text(), "VmRSS:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(kb, "kB")), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatal(fmt.Errorf("no VmRSS in %s", f.Name()))
	return 0
}
