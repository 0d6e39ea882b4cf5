package netstack

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// UDPConn is a UDP socket inside the VPN, connected (made by [Node.Dial]) or not
// (made by [Node.ListenPacket]). It has the methods of a [net.UDPConn] that make sense
// there. Any of them may be called from any goroutine.
//
// A socket that sends faster than the tunnel waits in Write; a datagram for which there is no
// room at the receiver is lost, as UDP is.
type UDPConn struct {
	socket
	reader  tcpip.SliceWriter // of the read under way; under in.mu
	payload bytes.Reader      // of the write under way; under out.mu
	to      tcpip.FullAddress // of the write under way; under out.mu
}

var (
	_ net.Conn       = (*UDPConn)(nil)
	_ net.PacketConn = (*UDPConn)(nil)
)

// newUDPConn takes ep, which is bound or connected.
func newUDPConn(n *Node, ep tcpip.Endpoint, wq *waiter.Queue) *UDPConn {
	c := &UDPConn{}
	c.socket.init(n, "udp", ep, wq)
	return c
}

// Read implements [net.Conn]. What does not fit b is lost.
func (c *UDPConn) Read(b []byte) (int, error) {
	n, _, err := c.ReadFromUDPAddrPort(b)
	return n, err
}

// ReadFrom implements [net.PacketConn]. What does not fit b is lost. The address is a
// *[net.UDPAddr].
func (c *UDPConn) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		return 0, nil, err
	}
	return n, net.UDPAddrFromAddrPort(from), nil
}

// ReadFromUDPAddrPort is ReadFrom without an allocation for the address.
func (c *UDPConn) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	if err := c.in.ready(&c.socket); err != nil {
		return 0, netip.AddrPort{}, c.opError("read", err)
	}
	for {
		c.reader = b
		res, terr := c.ep.Read(&c.reader, tcpip.ReadOptions{NeedRemoteAddr: true})
		c.reader = nil
		switch terr.(type) {
		case nil:
			return res.Count, addrPort(res.RemoteAddr), nil
		case *tcpip.ErrBadBuffer: // b is empty: the datagram is gone all the same
			return 0, addrPort(res.RemoteAddr), nil
		case *tcpip.ErrWouldBlock:
			if err := c.in.wait(&c.socket); err != nil {
				return 0, netip.AddrPort{}, c.opError("read", err)
			}
		case *tcpip.ErrClosedForReceive:
			return 0, netip.AddrPort{}, c.opError("read", net.ErrClosed)
		default:
			return 0, netip.AddrPort{}, c.opError("read", errnoOf(terr))
		}
	}
}

// Write implements [net.Conn]: one datagram to the address that was dialled.
func (c *UDPConn) Write(b []byte) (int, error) {
	if c.remote == nil {
		return 0, c.opError("write", syscall.EDESTADDRREQ)
	}
	return c.send(b, nil, c.remote)
}

// WriteTo implements [net.PacketConn]: one datagram to addr, a *[net.UDPAddr].
func (c *UDPConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	ua, ok := addr.(*net.UDPAddr)
	if !ok || ua == nil {
		return 0, opError("write", c.network, c.local, addr, syscall.EINVAL)
	}
	return c.WriteToUDPAddrPort(b, ua.AddrPort())
}

var errWriteToConnected = errors.New("use of WriteTo with pre-connected connection")

// WriteToUDPAddrPort is WriteTo without an allocation for the address.
func (c *UDPConn) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	to = unmap(to)
	fail := func(err error) (int, error) {
		return 0, opError("write", c.network, c.local, net.UDPAddrFromAddrPort(to), err)
	}
	if c.remote != nil {
		return fail(errWriteToConnected)
	}
	if err := c.node.reachable(to.Addr()); err != nil {
		return fail(err)
	}
	return c.send(b, &to, nil)
}

// send writes one datagram, to the connected address if to is nil. addr is the
// destination for an error; nil is worked out from to.
func (c *UDPConn) send(b []byte, to *netip.AddrPort, addr net.Addr) (int, error) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	defer c.payload.Reset(nil)
	fail := func(err error) (int, error) {
		if addr == nil {
			addr = net.UDPAddrFromAddrPort(*to)
		}
		return 0, opError("write", c.network, c.local, addr, err)
	}
	if err := c.out.ready(&c.socket); err != nil {
		return fail(err)
	}
	var opts tcpip.WriteOptions
	if to != nil {
		c.to = fullAddress(*to)
		opts.To = &c.to
	}
	for {
		c.payload.Reset(b)
		n, terr := c.ep.Write(&c.payload, opts)
		switch terr.(type) {
		case nil:
			return int(n), nil
		case *tcpip.ErrWouldBlock:
			if err := c.out.wait(&c.socket); err != nil {
				return fail(err)
			}
		case *tcpip.ErrClosedForSend, *tcpip.ErrInvalidEndpointState:
			if c.isClosed() {
				return fail(net.ErrClosed)
			}
			return fail(errnoOf(terr))
		default:
			return fail(errnoOf(terr))
		}
	}
}

// Close implements [net.Conn].
func (c *UDPConn) Close() error { return c.socket.close() }
