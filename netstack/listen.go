package netstack

import (
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// backlog is how many connections wait to be accepted: Linux's SOMAXCONN since 5.4.
const backlog = 4096

// Listen accepts TCP connections inside the VPN. Networks are tcp, tcp4 and tcp6. An
// empty host, 0.0.0.0 or [::] means all addresses of the node (of the family that network
// names), port 0 a free one. Accepted connections are *[TCPConn].
func (n *Node) Listen(network, address string) (net.Listener, error) {
	proto, version, ok := family(network)
	if !ok || proto != "tcp" {
		return nil, badNetwork("listen", network)
	}
	b, err := n.bind(network, proto, version, address)
	if err != nil {
		return nil, err
	}
	if terr := b.ep.Listen(backlog); terr != nil {
		b.ep.Close()
		b.release()
		return nil, opError("listen", network, nil, b.netAddr("tcp"), errnoOf(terr))
	}
	return newListener(n, b), nil
}

// ListenPacket opens a UDP socket inside the VPN. Networks are udp, udp4 and udp6; the
// address is as for [Node.Listen]. The socket is a *[UDPConn].
func (n *Node) ListenPacket(network, address string) (net.PacketConn, error) {
	proto, version, ok := family(network)
	if !ok || proto != "udp" {
		return nil, badNetwork("listen", network)
	}
	b, err := n.bind(network, proto, version, address)
	if err != nil {
		return nil, err
	}
	c := newUDPConn(n, b.ep, b.wq)
	c.local = b.netAddr("udp")
	c.release = b.release
	return c, nil
}

// A binding is an endpoint with a local address.
type binding struct {
	ep   tcpip.Endpoint
	wq   *waiter.Queue
	addr netip.AddrPort // [::] or 0.0.0.0 for all addresses
	// release gives the port up, to the kernel if that has an interface too.
	release func()
}

func (b *binding) netAddr(proto string) net.Addr {
	if proto == "udp" {
		return net.UDPAddrFromAddrPort(b.addr)
	}
	return net.TCPAddrFromAddrPort(b.addr)
}

// bind makes an endpoint and binds it to an address of the node. The caller owns it.
func (n *Node) bind(network, proto string, version int, address string) (*binding, error) {
	addr, err := n.localAddr(proto, version, address)
	if err != nil {
		return nil, opError("listen", network, nil, nil, n.dialErr(n.ctx, err))
	}
	b := &binding{wq: new(waiter.Queue), addr: addr}
	fail := func(err error) (*binding, error) {
		return nil, opError("listen", network, nil, b.netAddr(proto), err)
	}
	if n.isClosed() {
		return fail(net.ErrClosed)
	}
	tp := tcp.ProtocolNumber
	if proto == "udp" {
		tp = udp.ProtocolNumber
	}
	var terr tcpip.Error
	if b.ep, terr = n.stack.NewEndpoint(tp, protocolOf(addr.Addr()), b.wq); terr != nil {
		return fail(errnoOf(terr))
	}
	so := b.ep.SocketOptions()
	if proto == "tcp" {
		// As in the net package: connections in TIME-WAIT do not keep the port.
		so.SetReuseAddress(true)
	}
	only6 := version == 6 || !addr.Addr().IsUnspecified()
	if addr.Addr().Is6() {
		so.SetV6Only(only6)
	}
	at := tcpip.FullAddress{NIC: nicID, Port: addr.Port()}
	if !addr.Addr().IsUnspecified() {
		at = fullAddress(addr)
	}
	if terr := b.ep.Bind(at); terr != nil {
		b.ep.Close()
		return fail(errnoOf(terr))
	}
	if at, terr := b.ep.GetLocalAddress(); terr == nil {
		b.addr = netip.AddrPortFrom(addr.Addr(), at.Port)
	}
	what := tunwrap.ClaimTCP
	if proto == "udp" {
		what = tunwrap.ClaimUDP
	}
	b.release = n.claim(what, b.addr, addr.Addr().Is6() && !only6)
	return b, nil
}

// localAddr parses an address to listen on. A name is looked up, the first address of the
// node's own wins.
func (n *Node) localAddr(proto string, version int, address string) (netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := n.resolver.LookupPort(n.ctx, proto, service)
	if err != nil {
		return netip.AddrPort{}, err
	}
	at := func(a netip.Addr) (netip.AddrPort, error) { return netip.AddrPortFrom(a, uint16(port)), nil }
	ip, parseErr := netip.ParseAddr(host)
	switch {
	case host == "" || parseErr == nil && ip == netip.IPv6Unspecified() && version != 6:
		if version == 4 || version == 0 && !n.v6 {
			return at(netip.IPv4Unspecified())
		}
		return at(netip.IPv6Unspecified())
	case parseErr == nil:
		ip = ip.Unmap()
		switch {
		case version != 0 && ip.Is4() != (version == 4):
			return netip.AddrPort{}, &net.AddrError{Err: "no suitable address found", Addr: host}
		case !ip.IsUnspecified() && !n.own[ip]: // the stack would bind it all the same
			return netip.AddrPort{}, syscall.EADDRNOTAVAIL
		}
		return at(ip)
	}
	addrs, err := n.lookup(n.ctx, proto, version, address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for _, a := range addrs {
		if n.own[a.Addr()] {
			return a, nil
		}
	}
	return netip.AddrPort{}, syscall.EADDRNOTAVAIL
}

// A listener accepts TCP connections.
type listener struct {
	node   *Node
	b      *binding
	entry  waiter.Entry
	wake   chan struct{}
	shut   atomic.Bool
	closed chan struct{}
}

// newListener takes b, which listens.
func newListener(n *Node, b *binding) *listener {
	l := &listener{node: n, b: b, closed: make(chan struct{})}
	l.entry, l.wake = waiter.NewChannelEntry(waiter.ReadableEvents | alwaysEvents)
	b.wq.EventRegister(&l.entry)
	return l
}

// Accept implements [net.Listener].
func (l *listener) Accept() (net.Conn, error) {
	for {
		if l.shut.Load() || l.node.isClosed() {
			return nil, l.opError("accept", net.ErrClosed)
		}
		ep, wq, terr := l.b.ep.Accept(nil)
		switch terr.(type) {
		case nil:
			l.rouse() // several may wait for one wake-up
			return newTCPConn(l.node, ep, wq), nil
		case *tcpip.ErrWouldBlock:
			select {
			case <-l.wake:
			case <-l.closed:
			case <-l.node.ctx.Done():
			}
		case *tcpip.ErrInvalidEndpointState:
			return nil, l.opError("accept", net.ErrClosed)
		default:
			return nil, l.opError("accept", errnoOf(terr))
		}
	}
}

func (l *listener) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Close implements [net.Listener]. Connections that wait to be accepted are reset.
func (l *listener) Close() error {
	if l.shut.Swap(true) {
		return l.opError("close", net.ErrClosed)
	}
	close(l.closed)
	l.b.ep.Close()
	l.b.wq.EventUnregister(&l.entry)
	l.node.releaseUnused(l.b.addr.Port(), l.b.release) // what was accepted lives on
	return nil
}

// Addr implements [net.Listener].
func (l *listener) Addr() net.Addr { return l.b.netAddr("tcp") }

func (l *listener) opError(op string, err error) error {
	return opError(op, "tcp", nil, l.Addr(), err)
}
