package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/penstock-vpn/penstock/linkep"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// A standInKernel is a second stack in the place of the kernel, for tests without privileges.
type standInKernel struct {
	*tunwrap.Wrapper
	stack  *stack.Stack
	once   sync.Once
	opened tunwrap.TUNOptions
}

func newStandInKernel(t testing.TB, c *Config) *standInKernel {
	t.Helper()
	link := linkep.New(linkep.Options{MTU: 1400, GSOMaxSize: superpacketSize(1400)})
	with := Config{Addresses: c.Addresses}
	s, err := newStack(&with, link)
	if err != nil {
		t.Fatal(err)
	}
	// As Linux has it; gVisor's own range begins at 16000.
	if terr := s.SetPortRange(32768, 60999); terr != nil {
		t.Fatal(terr)
	}
	k := &standInKernel{stack: s, Wrapper: tunwrap.New(link, tunwrap.Options{MTU: 1400})}
	t.Cleanup(func() { k.Close() })
	return k
}

func (k *standInKernel) SetMTU(mtu int) error {
	k.Wrapper.SetMTU(mtu)
	return nil
}

func (k *standInKernel) streams() []transport.Reader { return nil }

func (k *standInKernel) status() TUNStatus {
	carried := k.Stats()
	return TUNStatus{Name: "standin", Outbound: OutboundStatus(carried.Outbound), Inbound: InboundStatus(carried.Inbound), Drops: map[string]uint64{}}
}

func (k *standInKernel) Close() error {
	k.once.Do(func() {
		k.stack.Close()
		k.Wrapper.Close()
		k.stack.Destroy()
	})
	return nil
}

func (k *standInKernel) listen(t testing.TB, port uint16) net.Listener {
	t.Helper()
	l, err := gonet.ListenTCP(k.stack, tcpip.FullAddress{NIC: nicID, Port: port}, ipv6.ProtocolNumber) // both families
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (k *standInKernel) dial(to netip.AddrPort) (net.Conn, error) {
	return gonet.DialTCP(k.stack, fullAddress(to), protocolOf(to.Addr()))
}

// tunPair is pair with a kernel beside b.
func tunPair(t testing.TB, change func(a, b *Config)) (a, b *Node, kernel *standInKernel) {
	t.Helper()
	a, b = pair(t, func(ca, cb *Config) {
		if change != nil {
			change(ca, cb)
		}
		kernel = newStandInKernel(t, cb)
		if cb.TUN == nil {
			cb.TUN = new(TUNConfig)
		}
		cb.TUN.open = func(o tunwrap.TUNOptions) (kernelTUN, error) {
			kernel.opened = o
			return kernel, nil
		}
	})
	return a, b, kernel
}

// greet serves connections that are told name.
func greet(l net.Listener, name string) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, name)
				io.Copy(io.Discard, c)
			}()
		}
	}()
}

// greeting is what the service at to says.
func greeting(t testing.TB, c net.Conn, err error) string {
	t.Helper()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	c.(interface{ CloseWrite() error }).CloseWrite()
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// The stack has the ports that were opened there, the kernel the others, over both families
// and both ways.
func TestTUNDivides(t *testing.T) {
	a, b, kernel := tunPair(t, nil)
	greet(kernel.listen(t, 22), "kernel")
	greet(kernel.listen(t, 80), "kernel") // on the same port
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	greet(l, "stack")
	la, err := a.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	greet(la, "a")
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		for port, want := range map[int]string{22: "kernel", 80: "stack"} {
			c, err := a.Dial(within(t, patience), "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
			if got := greeting(t, c, err); got != want {
				t.Errorf("%s port %d: %q", host, port, got)
			}
		}
		if _, err := a.Dial(within(t, patience), "tcp", net.JoinHostPort(host, "81")); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a port of nobody's: %v", err)
		}
	}
	for _, host := range []string{"10.66.0.1", "fd66::1"} {
		c, err := b.Dial(within(t, patience), "tcp", net.JoinHostPort(host, "7"))
		if err == nil {
			if p := c.LocalAddr().(*net.TCPAddr).Port; p < tunwrap.StackPorts {
				t.Errorf("the stack dials from port %d", p)
			}
		}
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("the stack to %s: %q", host, got)
		}
		kc, err := kernel.dial(netip.AddrPortFrom(netip.MustParseAddr(host), 7))
		if got := greeting(t, kc, err); got != "a" {
			t.Errorf("the kernel to %s: %q", host, got)
		}
		for i := range 3 {
			if _, err := b.Ping(within(t, patience), netip.MustParseAddr(host), PingOptions{Size: 64, Sequence: uint16(i)}); err != nil {
				t.Errorf("the stack pings %s: %v", host, err)
			}
		}
	}
	s := b.Status().TUN
	if s == nil || s.ToKernel == 0 || s.ToStack == 0 || s.Name != "standin" {
		t.Errorf("%+v", s)
	}
	if kernel.opened.Name != "penstock%d" || kernel.opened.BatchSize == 0 || kernel.opened.MTU != transport.DefaultInnerMTU {
		t.Errorf("opened with %+v", kernel.opened)
	}
	if a.Status().TUN != nil {
		t.Error("a node without TUN has a status of it")
	}
}

// Pings of a peer are answered by the kernel, which the count of the other stack shows.
func TestTUNPinged(t *testing.T) {
	a, b, kernel := tunPair(t, nil)
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		if _, err := a.Ping(within(t, patience), netip.MustParseAddr(host), PingOptions{Size: 5000}); err != nil { // in fragments
			t.Errorf("%s: %v", host, err)
		}
	}
	k, n := kernel.stack.Stats(), b.stack.Stats()
	if k.ICMP.V4.PacketsReceived.EchoRequest.Value() != 1 || k.ICMP.V6.PacketsReceived.EchoRequest.Value() != 1 ||
		n.ICMP.V4.PacketsReceived.EchoRequest.Value() != 0 || n.ICMP.V6.PacketsReceived.EchoRequest.Value() != 0 {
		t.Error("the node's stack has seen a ping")
	}
}

// UDP: sockets of the stack, and of the kernel beside them on the same port of the other family.
func TestTUNUDP(t *testing.T) {
	a, b, kernel := tunPair(t, nil)
	sc, err := b.ListenPacket("udp4", ":53")
	if err != nil {
		t.Fatal(err)
	}
	kc, err := gonet.DialUDP(kernel.stack, &tcpip.FullAddress{NIC: nicID, Port: 53}, nil, ipv6.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer kc.Close()
	answer := func(c net.PacketConn, name string) {
		b := make([]byte, 4000)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(append([]byte(name), b[:n]...), from)
		}
	}
	go answer(sc, "stack")
	go answer(kc, "kernel")
	ask := func(host string, size int) string {
		c, err := a.Dial(within(t, patience), "udp", net.JoinHostPort(host, "53"))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		question := strings.Repeat("?", size)
		c.Write([]byte(question))
		b := make([]byte, 4000)
		n, err := c.Read(b)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSuffix(string(b[:n]), question)
	}
	for _, size := range []int{1, 3000} { // whole and in fragments
		if got := ask("10.66.0.2", size); got != "stack" {
			t.Errorf("IPv4, %d bytes: %q", size, got)
		}
		if got := ask("fd66::2", size); got != "kernel" {
			t.Errorf("IPv6, %d bytes: %q", size, got)
		}
	}
	// The socket's end gives the port to the kernel.
	sc.Close()
	if got := ask("10.66.0.2", 1); got != "kernel" {
		t.Errorf("after Close: %q", got)
	}
}

// A listener's end leaves the connections that it has accepted, and then the port is the
// kernel's.
func TestTUNPortReturns(t *testing.T) {
	a, b, kernel := tunPair(t, nil)
	greet(kernel.listen(t, 80), "kernel")
	l, err := b.Listen("tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(within(t, patience), "tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	time.Sleep(2 * portPoll)
	served.SetDeadline(time.Now().Add(patience))
	c.SetDeadline(time.Now().Add(patience))
	for _, way := range [][2]net.Conn{{c, served}, {served, c}} {
		if _, err := way[0].Write([]byte("on")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(way[1], make([]byte, 2)); err != nil {
			t.Fatalf("the connection has ended with its listener: %v", err)
		}
	}
	served.Close()
	c.Close()
	for end := time.Now().Add(patience); ; {
		c, err := a.Dial(within(t, patience), "tcp", "10.66.0.2:80")
		got := greeting(t, c, err)
		if got == "kernel" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the port is still the stack's: %q", got)
		}
		time.Sleep(portPoll)
	}
}

// KnownAs holds for both: the peer calls b by other addresses.
func TestTUNKnownAs(t *testing.T) {
	a, b, kernel := tunPair(t, func(ca, cb *Config) {
		cb.Peers[0].KnownAs = []netip.Addr{netip.MustParseAddr("10.66.9.9"), netip.MustParseAddr("fd66::99")}
		ca.Peers = nil
	})
	// pair has added b with its own addresses.
	if err := a.RemovePeer(b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	err := a.AddPeer(Peer{Name: "b", PublicKey: b.PublicKey(), AllowedIPs: prefixes("10.66.9.9/32", "fd66::99/128"), Endpoint: b.LocalAddrs()[0].String()})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.WaitEstablished(within(t, patience), b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	greet(kernel.listen(t, 22), "kernel")
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	greet(l, "stack")
	la, err := a.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	greet(la, "a")
	for _, host := range []string{"10.66.9.9", "fd66::99"} {
		for port, want := range map[string]string{"22": "kernel", "80": "stack"} {
			c, err := a.Dial(within(t, patience), "tcp", net.JoinHostPort(host, port))
			if got := greeting(t, c, err); got != want {
				t.Errorf("%s port %s: %q", host, port, got)
			}
		}
	}
	for _, to := range []string{"10.66.0.1:7", "[fd66::1]:7"} {
		kc, err := kernel.dial(netip.MustParseAddrPort(to))
		if got := greeting(t, kc, err); got != "a" {
			t.Errorf("the kernel to %s: %q", to, got)
		}
		c, err := b.Dial(within(t, patience), "tcp", to)
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("the stack to %s: %q", to, got)
		}
	}
}

// With a router, what is beyond the node is the router's, and the node's own is divided as ever.
func TestTUNRouter(t *testing.T) {
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	greet(target, "routed")
	a, b, kernel := tunPair(t, func(ca, cb *Config) {
		cb.Router = &RouterConfig{Flow: func(ctx context.Context, f Flow) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", target.Addr().String())
		}}
	})
	greet(kernel.listen(t, 22), "kernel")
	if err := a.RemovePeer(b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	err = a.AddPeer(Peer{Name: "b", PublicKey: b.PublicKey(), AllowedIPs: prefixes("0.0.0.0/0"), Endpoint: b.LocalAddrs()[0].String()})
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(within(t, patience), "tcp", "192.0.2.1:22")
	if got := greeting(t, c, err); got != "routed" {
		t.Errorf("through the router: %q", got)
	}
	c, err = a.Dial(within(t, patience), "tcp", "10.66.0.2:22")
	if got := greeting(t, c, err); got != "kernel" {
		t.Errorf("the node's own kernel: %q", got)
	}
}

// The rules of Config.ACL hold for the kernel's packets and for the stack's.
func TestTUNACL(t *testing.T) {
	a, b, kernel := tunPair(t, func(_, cb *Config) {
		cb.ACL = []ACLRule{{Direction: "in", Protocol: "tcp", Ports: []PortRange{{22, 22}, {80, 80}}}}
	})
	for _, port := range []uint16{22, 23} {
		greet(kernel.listen(t, port), "kernel")
	}
	for _, port := range []string{":80", ":81"} {
		l, err := b.Listen("tcp", port)
		if err != nil {
			t.Fatal(err)
		}
		greet(l, "stack")
	}
	for _, c := range []struct{ port, want string }{{"22", "kernel"}, {"80", "stack"}, {"23", ""}, {"81", ""}} {
		limit := patience
		if c.want == "" {
			limit = 300 * time.Millisecond
		}
		conn, err := a.Dial(within(t, limit), "tcp", "10.66.0.2:"+c.port)
		switch {
		case c.want == "":
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("port %s: %v", c.port, err)
			}
		default:
			if got := greeting(t, conn, err); got != c.want {
				t.Errorf("port %s: %q", c.port, got)
			}
		}
	}
	if n := kernel.Drops()[tunwrap.DropFilter]; n == 0 {
		t.Error("the kernel's side has refused nothing")
	}
}

// The kernel's sender is told when its packet does not fit, the stack's likewise.
func TestTUNTooBig(t *testing.T) {
	_, b, kernel := tunPair(t, nil)
	packet := func(sport uint16) []byte {
		p := make([]byte, 1300)
		header.IPv6(p).Encode(&header.IPv6Fields{
			PayloadLength: 1260, TransportProtocol: header.UDPProtocolNumber, HopLimit: 64,
			SrcAddr: stackAddr(netip.MustParseAddr("fd66::2")), DstAddr: stackAddr(netip.MustParseAddr("fd66::1")),
		})
		header.UDP(p[40:]).Encode(&header.UDPFields{SrcPort: sport, DstPort: 7, Length: 1260})
		return p
	}
	b.tooBig(packet(40000), 1280)
	b.tooBig(packet(62000), 1280)
	if k, s := kernel.Stats().TooBig, b.wrapper.Stats().TooBig; k != 1 || s != 1 {
		t.Errorf("%d to the kernel, %d to the stack", k, s)
	}
}

// The path's MTU is told to whoever sets the interface's, unless it is fixed.
func TestTUNMTUChanged(t *testing.T) {
	for _, fixed := range []int{0, 1300} {
		var told []int
		_, b, kernel := tunPair(t, func(_, cb *Config) {
			cb.MTU = fixed
			cb.TUN = &TUNConfig{MTUChanged: func(mtu int) { told = append(told, mtu) }}
		})
		b.pathMTUChanged(1290)
		if mtu, _ := kernel.MTU(); mtu != 1400 {
			t.Errorf("the interface's MTU was set beside the hook, to %d", mtu)
		}
		if want := map[int]string{0: "[1290]", 1300: "[]"}[fixed]; fmt.Sprint(told) != want {
			t.Errorf("MTU %d: told %v", fixed, told)
		}
	}
	_, b, kernel := tunPair(t, nil)
	b.pathMTUChanged(1290)
	if mtu, _ := kernel.MTU(); mtu != 1290 {
		t.Errorf("the interface's MTU is %d", mtu)
	}
}

// Close ends everything in TUN mode too, with a port lingering and a failed open before.
func TestTUNClose(t *testing.T) {
	a, b, kernel := tunPair(t, nil)
	l, err := b.Listen("tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(within(t, patience), "tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	l.Close() // a goroutine watches the port now
	for range 2 {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := kernel.Wrapper.Write([][]byte{{}}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the interface is open: %v", err)
	}

	no := errors.New("no interface")
	_, err = New(Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.9/24"),
		TUN: &TUNConfig{open: func(tunwrap.TUNOptions) (kernelTUN, error) { return nil, no }},
	})
	if !errors.Is(err, no) {
		t.Errorf("New: %v", err)
	}
}

func TestTUNConfig(t *testing.T) {
	for want, c := range map[string]TUNConfig{
		"TUN.Queues": {Queues: -1},
		"TUN.FD":     {FD: -2},
		"TUN.Name":   {Name: "a-name-of-16-long"},
	} {
		_, err := New(Config{PrivateKey: newKey(t), Addresses: prefixes("10.66.0.9/24"), TUN: &c})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
