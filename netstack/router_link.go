package netstack

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/penstock-vpn/penstock/linkep"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// A routerLink stands in front of the two stacks of a routing node. As a
// [tunwrap.Link] it decides where an inbound packet goes; as a [stack.LinkEndpoint]
// it is the router's stack's way out, which is the node's own queue.
type routerLink struct {
	*linkep.Endpoint // the node's: its queue, MTU and offloads
	router           *router
	own              [][]byte // the node's addresses, 4 or 16 bytes
	dispatcher       atomic.Pointer[stack.NetworkDispatcher]
	shut             atomic.Bool
}

var (
	_ tunwrap.Link       = (*routerLink)(nil)
	_ stack.LinkEndpoint = routerPort{}
	_ stack.GSOEndpoint  = routerPort{}
)

func newRouterLink(r *router, e *linkep.Endpoint) *routerLink {
	l := &routerLink{Endpoint: e, router: r}
	for _, p := range r.node.cfg.Addresses {
		l.own = append(l.own, p.Addr().AsSlice())
	}
	return l
}

// Deliver takes pkt. It implements [tunwrap.Link].
func (l *routerLink) Deliver(pkt *stack.PacketBuffer) {
	first, ok := pkt.Data().PullUp(1)
	if !ok {
		l.Endpoint.Deliver(pkt)
		return
	}
	if first[0]>>4 == header.IPv6Version {
		if b, ok := pkt.Data().PullUp(header.IPv6MinimumSize); ok && !l.isOwn(b[24:40]) {
			l.route6(pkt, b)
			return
		}
	} else if b, ok := pkt.Data().PullUp(header.IPv4MinimumSize); ok && !l.isOwn(b[16:20]) {
		l.route4(pkt, b)
		return
	}
	l.Endpoint.Deliver(pkt)
}

func (l *routerLink) isOwn(dst []byte) bool {
	for _, a := range l.own {
		if string(a) == string(dst) {
			return true
		}
	}
	return false
}

// route4 takes pkt, of which h is the header.
func (l *routerLink) route4(pkt *stack.PacketBuffer, h header.IPv4) {
	defer pkt.DecRef()
	across := l.across(h)
	if !across && !l.admit(pkt, h) {
		return
	}
	ttl := h.TTL()
	if ttl <= 1 {
		l.router.refuse(refusedTTL)
		l.router.errs.send(errTimeExceeded, pkt)
		return
	}
	h.SetTTL(ttl - 1)
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
	if across {
		l.passOn(pkt, h[:header.IPv4MinimumSize], h.TransportProtocol())
		return
	}
	if h.TransportProtocol() == header.TCPProtocolNumber && h.FragmentOffset() == 0 {
		l.reopen(pkt, h, int(h.HeaderLength()), header.IPv4ProtocolNumber)
	}
	(*l.dispatcher.Load()).DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
}

// route6 takes pkt, of which h is the header.
func (l *routerLink) route6(pkt *stack.PacketBuffer, h header.IPv6) {
	defer pkt.DecRef()
	across := l.across(h)
	if !across && !l.admit(pkt, h) {
		return
	}
	ttl := h.HopLimit()
	if ttl <= 1 {
		l.router.refuse(refusedTTL)
		l.router.errs.send(errTimeExceeded, pkt)
		return
	}
	h.SetHopLimit(ttl - 1)
	if across {
		l.passOn(pkt, h, tcpip.TransportProtocolNumber(h.NextHeader()))
		return
	}
	if tcpip.TransportProtocolNumber(h.NextHeader()) == header.TCPProtocolNumber {
		l.reopen(pkt, h, header.IPv6MinimumSize, header.IPv6ProtocolNumber)
	}
	// Below 255 it can be no neighbour discovery either (RFC 4861 6.1, 7.1), which the
	// stack would answer.
	(*l.dispatcher.Load()).DeliverNetworkPacket(header.IPv6ProtocolNumber, pkt)
}

// admit is the first look at a packet that is not for the node: whether anything
// might be allowed there. It borrows pkt.
func (l *routerLink) admit(pkt *stack.PacketBuffer, h header.Network) bool {
	if l.shut.Load() || l.dispatcher.Load() == nil {
		return false
	}
	dst := addrOf(h.DestinationAddress())
	switch {
	case dst.IsMulticast(), dst.IsUnspecified():
		l.router.refuse(refusedAddress) // nobody is told about those (RFC 1122 3.2.2)
	case l.router.policy.ever.Contains(dst):
		return true
	case dst.Is6() && h.TransportProtocol() == header.TCPProtocolNumber:
		return true // forwardTCP refuses it, with a reset; see alsoReset
	default:
		l.router.refuse(refusedByRule)
		l.router.errs.send(errProhibited, pkt)
	}
	return false
}

// reopen makes way for the SYN of a client that has the same ports again, for the same target, as a connection which is
// in TIME-WAIT (RFC 9293 3.6.1). The stack does that only where there is a listener, and would drop the SYN for
// a minute: whenever the target has closed first, the client's system may use its port again at once. A SYN that
// comes late, of the old connection, does no harm: its client resets what it did not ask for. It
// borrows pkt, whose TCP header begins at start.
func (l *routerLink) reopen(pkt *stack.PacketBuffer, h header.Network, start int, protocol tcpip.NetworkProtocolNumber) {
	b, ok := pkt.Data().PullUp(start + header.TCPMinimumSize)
	if !ok {
		return
	}
	t := header.TCP(b[start:])
	if t.Flags()&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) != header.TCPFlagSyn {
		return
	}
	e, ok := l.router.stack.FindTransportEndpoint(protocol, header.TCPProtocolNumber, stack.TransportEndpointID{
		LocalAddress: h.DestinationAddress(), LocalPort: t.DestinationPort(),
		RemoteAddress: h.SourceAddress(), RemotePort: t.SourcePort(),
	}, nicID).(*tcp.Endpoint)
	if ok && e.EndpointState() == tcp.StateTimeWait {
		e.Abort()
	}
}

// A routerPort is the routerLink as the router's stack sees it.
type routerPort struct{ *routerLink }

// Attach implements [stack.NetworkLinkEndpoint].
func (p routerPort) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		// The dispatcher stays: a packet may be on its way to it. shut keeps others out.
		p.shut.Store(true)
		return
	}
	p.dispatcher.Store(&d)
}

// IsAttached implements [stack.NetworkLinkEndpoint].
func (p routerPort) IsAttached() bool { return p.dispatcher.Load() != nil }

// Close implements [stack.NetworkLinkEndpoint]: the queue is the node's to close.
func (p routerPort) Close() {}
