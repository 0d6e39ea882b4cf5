package transport

import (
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// memNet is a network in memory: every memConn reaches every other.
type memNet struct {
	mu    sync.Mutex
	conns map[netip.AddrPort]*memConn
	// pass decides on every datagram; nil passes all.
	pass func(from, to netip.AddrPort, d []byte) bool
}

func newMemNet() *memNet { return &memNet{conns: make(map[netip.AddrPort]*memConn)} }

func (n *memNet) setPass(f func(from, to netip.AddrPort, d []byte) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pass = f
}

// memConn is a PacketConn on a memNet. A full queue drops, as a socket does.
type memConn struct {
	net    *memNet
	queue  chan Inbound
	closed chan struct{}
	once   sync.Once

	mu    sync.Mutex
	local netip.AddrPort
}

func (n *memNet) listen(addr string) *memConn {
	c := &memConn{net: n, queue: make(chan Inbound, 4096), closed: make(chan struct{}), local: netip.MustParseAddrPort(addr)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns[c.local] = c
	return c
}

// rebind moves the socket to another address, as a NAT or a roaming host does.
func (c *memConn) rebind(addr string) {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.net.conns, c.local)
	c.local = netip.MustParseAddrPort(addr)
	c.net.conns[c.local] = c
}

func (c *memConn) ReadBatch(batch []Inbound) (int, error) {
	n := 0
	take := func(m Inbound) {
		b := &batch[n]
		b.N = copy(b.Buf[:cap(b.Buf)], m.Buf)
		b.SegmentSize, b.Remote, b.Local = b.N, m.Remote, m.Local
		n++
	}
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	case m := <-c.queue:
		take(m)
	}
	for n < len(batch) {
		select {
		case m := <-c.queue:
			take(m)
			continue
		default:
		}
		break
	}
	return n, nil
}

func (c *memConn) WriteBatch(runs []Run) (int, error) {
	from := c.LocalAddr()
	for _, r := range runs {
		for _, d := range r.Segments {
			c.net.deliver(from, r.Remote, d)
		}
	}
	return len(runs), nil
}

func (n *memNet) deliver(from, to netip.AddrPort, d []byte) {
	n.mu.Lock()
	dst, pass := n.conns[to], n.pass
	n.mu.Unlock()
	if dst == nil || (pass != nil && !pass(from, to, d)) {
		return
	}
	select {
	case dst.queue <- Inbound{Buf: append([]byte(nil), d...), Remote: from, Local: to.Addr()}:
	default:
	}
}

func (c *memConn) LocalAddr() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.local
}

func (c *memConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

// chanDevice is a Device whose packets come from and go to a test.
type chanDevice struct {
	outbound chan []byte
	inbound  chan []byte
	closed   chan struct{}
	once     sync.Once
}

func newChanDevice() *chanDevice {
	return &chanDevice{outbound: make(chan []byte, 1024), inbound: make(chan []byte, 1<<16), closed: make(chan struct{})}
}

func (d *chanDevice) BatchSize() int { return 64 }

func (d *chanDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n := 0
	select {
	case <-d.closed:
		return 0, os.ErrClosed
	case p := <-d.outbound:
		sizes[n] = copy(bufs[n][offset:], p)
		n++
	}
	for n < len(bufs) {
		select {
		case p := <-d.outbound:
			sizes[n] = copy(bufs[n][offset:], p)
			n++
			continue
		default:
		}
		break
	}
	return n, nil
}

func (d *chanDevice) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		select {
		case d.inbound <- append([]byte(nil), b[offset:]...):
		default:
		}
	}
	return len(bufs), nil
}

func (d *chanDevice) close() { d.once.Do(func() { close(d.closed) }) }

// testNode is a Transport with a chanDevice.
type testNode struct {
	*Transport
	dev  *chanDevice
	key  PrivateKey
	addr netip.Addr
}

// quick are clocks for tests: everything in tens of milliseconds.
var quick = Timing{
	HandshakeRetry: 50 * time.Millisecond, HandshakeRetryMax: 200 * time.Millisecond, HandshakeTimeout: 2 * time.Second,
	FlightInterval: 50 * time.Millisecond, DPD: 200 * time.Millisecond, DPDTimeout: 600 * time.Millisecond,
	Keepalive: time.Second, Overlap: time.Second,
}

// steady are the same, but an association outlives a machine that stands still for a while: for
// tests of which no second handshake may be a part.
var steady = func() Timing {
	t := quick
	t.DPDTimeout = patience
	return t
}()

func newTestNode(t testing.TB, inner string, timing Timing, conns ...PacketConn) *testNode {
	t.Helper()
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return newTestNodeKey(t, key, inner, timing, conns...)
}

func newTestNodeKey(t testing.TB, key PrivateKey, inner string, timing Timing, conns ...PacketConn) *testNode {
	t.Helper()
	n := &testNode{dev: newChanDevice(), key: key, addr: netip.MustParseAddr(inner)}
	logger := slog.New(slog.DiscardHandler)
	if testing.Verbose() && os.Getenv("PENSTOCK_TEST_LOG") != "" {
		logger = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", inner)
	}
	var err error
	n.Transport, err = New(Config{Key: key, Conns: conns, Device: n.dev, Timing: timing, Logger: logger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.stop)
	return n
}

func (n *testNode) stop() {
	n.dev.close()
	n.Transport.Close()
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	defer func() { _ = recover() }() // a log line after the test has ended
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

// knows makes other a peer of n, with an endpoint unless it is empty.
func (n *testNode) knows(t testing.TB, other *testNode, endpoint string) {
	t.Helper()
	err := n.AddPeer(PeerConfig{
		Name: "peer-" + other.addr.String(), PublicKey: other.key.Public(), Endpoint: endpoint,
		AllowedIPs: []netip.Prefix{netip.PrefixFrom(other.addr, other.addr.BitLen())},
	})
	if err != nil {
		t.Fatal(err)
	}
}

// packet makes an IPv4 packet from n to dst with a number and padding.
func (n *testNode) packet(dst netip.Addr, number uint32, size int) []byte {
	p := make([]byte, max(size, 24))
	p[0] = 0x45
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], n.addr.AsSlice())
	copy(p[16:], dst.AsSlice())
	binary.BigEndian.PutUint32(p[20:], number)
	return p
}

func number(p []byte) uint32 { return binary.BigEndian.Uint32(p[20:]) }

// ping sends packets until one has arrived each way.
func ping(t testing.TB, a, b *testNode) {
	t.Helper()
	one := func(from, to *testNode) {
		t.Helper()
		deadline := time.After(patience)
		for i := uint32(0); ; i++ {
			from.dev.outbound <- from.packet(to.addr, i, 100)
			select {
			case <-to.dev.inbound:
				return
			case <-time.After(20 * time.Millisecond):
			case <-deadline:
				t.Fatalf("no packet from %v reached %v; status: %+v / %+v", from.addr, to.addr, from.Status(), to.Status())
			}
		}
	}
	one(a, b)
	one(b, a)
}

func drain(c chan []byte) {
	for {
		select {
		case <-c:
		default:
			return
		}
	}
}

// patience bounds the waiting for what should take milliseconds: on a machine that has other
// things to do as well it takes seconds.
const patience = 30 * time.Second

// eventually waits for cond.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for !cond() {
		select {
		case <-ctx.Done():
			t.Fatalf("not after %v: %s", patience, what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
