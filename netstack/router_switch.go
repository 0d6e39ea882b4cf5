package netstack

import (
	"hash/maphash"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The switch: packets from one peer for another turn round between wrapper and stacks, superpackets whole, with
// one hop less to live.
//
//	tunwrap ── routerLink ── to a peer ── the node's queue ── tunwrap

// across tells whether a packet is for a peer, and to be passed on.
func (l *routerLink) across(h header.Network) bool {
	if !l.router.node.cfg.Switch || l.shut.Load() {
		return false
	}
	pfx, ok := l.router.byAddrPrefix(addrOf(h.DestinationAddress()))
	return ok && pfx.Bits() > 0 // a peer with everything behind it is an exit, not a neighbour
}

// passOn queues a packet that has come from a peer and is for another. head is its network header of the least
// size. It borrows pkt.
func (l *routerLink) passOn(pkt *stack.PacketBuffer, head []byte, protocol tcpip.TransportProtocolNumber) {
	if mss := pkt.GSOOptions.MSS; mss != 0 { // a superpacket, of TCP, perhaps behind extension headers
		o := stack.GSO{Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: header.TCPChecksumOffset, MSS: mss, L3HdrLen: uint16(len(head))}
		if len(head) != header.IPv4MinimumSize {
			o.Type = stack.GSOTCPv6
		}
		pkt.GSOOptions = o
	}
	pkt.Hash = l.flowOf(pkt, head, protocol)
	l.router.switched.Add(1)
	var list stack.PacketBufferList
	list.PushBack(pkt)
	if _, err := l.Endpoint.WritePackets(list); err != nil {
		l.router.refuse(droppedSend)
	}
}

var switchSeed = maphash.MakeSeed()

// flowOf keeps the packets of a flow in order, and flows apart, in the queue; see linkep. Fragments go
// by their addresses. It borrows pkt.
func (l *routerLink) flowOf(pkt *stack.PacketBuffer, head []byte, protocol tcpip.TransportProtocolNumber) uint32 {
	addresses, ports, fragment := head[8:], header.IPv6MinimumSize, false
	if len(head) == header.IPv4MinimumSize {
		h := header.IPv4(head)
		addresses, ports = head[12:], int(h.HeaderLength())
		fragment = h.More() || h.FragmentOffset() != 0
	}
	var h maphash.Hash
	h.SetSeed(switchSeed)
	h.Write(addresses)
	if !fragment && (protocol == header.TCPProtocolNumber || protocol == header.UDPProtocolNumber) {
		if b, ok := pkt.Data().PullUp(ports + 4); ok {
			h.Write(b[ports:])
		}
	}
	return uint32(h.Sum64()) | 1 // 0 is none
}
