package netstack

import (
	"context"
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
)

// forwardICMP forwards echo requests and brings the target's own replies back:
// through unprivileged ICMP sockets where the kernel grants them
// (net.ipv4.ping_group_range, which is about IPv6 too), else through raw sockets
// where the process may have them. Where it may have neither, the client is told
// that ping is prohibited; nothing is ever answered in the target's name.
//
// The requests come from the stack's handler for ICMP. gVisor lets that handler
// consume every echo request of a stack, also those for addresses of the stack
// itself; the router's stack has none, and the node's own has no such handler.
type forwardICMP struct {
	flowTable
	ability [2]echoAbility // IPv4, IPv6
}

// An echoAbility is how a family is pinged here.
type echoAbility struct {
	raw bool
	err error // it is not
}

func (a echoAbility) String() string {
	switch {
	case a.err != nil:
		return "not possible: " + a.err.Error()
	case a.raw:
		return "raw sockets"
	}
	return "unprivileged sockets"
}

func (f *forwardICMP) init(r *router) {
	f.ability = [2]echoAbility{probeEcho(false), probeEcho(true)}
	for i, name := range []string{"IPv4", "IPv6"} {
		if err := f.ability[i].err; err != nil {
			r.log.Warn("echo requests cannot be forwarded", "family", name, "error", err)
		}
	}
	l := &r.cfg.Limits
	f.flowTable.init(r, 1, l.ICMP, l.ICMPPerPeer, r.cfg.Timeouts.ICMPIdle)
	r.stack.SetTransportProtocolHandler(icmp.ProtocolNumber4, f.handle)
	r.stack.SetTransportProtocolHandler(icmp.ProtocolNumber6, f.handle)
}

const echoHeader = header.ICMPv4MinimumSize // type, code, checksum, ident, sequence number; the same for ICMPv6

// handle is the stack's handler for ICMP. It borrows pkt. It always answers for it,
// lest the stack reply in the target's name.
func (f *forwardICMP) handle(_ stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	r := f.router
	network := pkt.Network()
	v6 := pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber
	head := pkt.TransportHeader().Slice()
	if request := echoTypes(v6)[0]; len(head) < echoHeader || head[0] != request || head[1] != 0 {
		r.refuse(refusedProtocol)
		return true
	}
	id := stack.TransportEndpointID{
		LocalAddress: network.DestinationAddress(), RemoteAddress: network.SourceAddress(),
		RemotePort: binary.BigEndian.Uint16(head[4:]),
	}
	flow := f.find(id)
	if flow == nil {
		if flow = f.begin(id, pkt, v6); flow == nil {
			return true
		}
	}
	message := append(append(make([]byte, 0, len(head)+pkt.Data().Size()), head...), pkt.Data().AsRange().ToSlice()...)
	ttl, mayFragment := forwardedAs(pkt)
	flow.send(message, ttl, mayFragment)
	return true
}

// echoTypes are those of request and reply.
func echoTypes(v6 bool) [2]uint8 {
	if v6 {
		return [2]uint8{uint8(header.ICMPv6EchoRequest), uint8(header.ICMPv6EchoReply)}
	}
	return [2]uint8{uint8(header.ICMPv4Echo), uint8(header.ICMPv4EchoReply)}
}

func (f *forwardICMP) begin(id stack.TransportEndpointID, pkt *stack.PacketBuffer, v6 bool) *datagramFlow {
	r := f.router
	peer := r.peerOf(id.RemoteAddress)
	if peer == nil {
		r.refuse(refusedPeer)
		return nil
	}
	v := r.policy.decide(peer.key, "icmp", netip.AddrPortFrom(addrOf(id.LocalAddress), 0))
	family, proto := 0, uint8(header.ICMPv4ProtocolNumber)
	if v6 {
		family, proto = 1, uint8(header.ICMPv6ProtocolNumber)
	}
	if v.refusal == notRefused && f.ability[family].err != nil {
		v.refusal = refusedNoEcho
	}
	if v.refusal != notRefused {
		r.refuse(v.refusal)
		r.errs.send(errProhibited, pkt)
		return nil
	}
	return f.admit(&datagramFlow{
		kind: f, id: id, peer: peer, verdict: v, idle: r.cfg.Timeouts.ICMPIdle, head: headOf(pkt, proto),
	})
}

// open implements flowKind.
func (f *forwardICMP) open(_ context.Context, flow *datagramFlow) (flowSocket, error) {
	dst := addrOf(flow.id.LocalAddress)
	if pfx, ok := f.router.byAddrPrefix(dst); ok && pfx.Bits() > 0 {
		return nil, refusedInsideVPN
	}
	ability := f.ability[0]
	if dst.Is6() {
		ability = f.ability[1]
	}
	return openEcho(dst, ability.raw, flow.verdict.onRouter)
}

// reply implements flowKind. d is an echo reply from the target.
func (f *forwardICMP) reply(flow *datagramFlow, route *stack.Route, d []byte) bool {
	v6 := flow.id.LocalAddress.Len() == header.IPv6AddressSize
	if len(d) < echoHeader || d[0] != echoTypes(v6)[1] {
		return false
	}
	b := append([]byte(nil), d...)
	binary.BigEndian.PutUint16(b[4:], flow.id.RemotePort) // the system has used its own ident
	proto := header.ICMPv4ProtocolNumber
	if v6 {
		proto = header.ICMPv6ProtocolNumber
		m := header.ICMPv6(b)
		m.SetChecksum(0)
		m.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: m, Src: flow.id.LocalAddress, Dst: flow.id.RemoteAddress,
		}))
	} else {
		m := header.ICMPv4(b)
		m.SetChecksum(0)
		m.SetChecksum(^checksum.Checksum(m, 0))
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(b),
	})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = proto
	if _, ok := pkt.TransportHeader().Consume(echoHeader); !ok {
		return false
	}
	return route.WritePacket(stack.NetworkHeaderParams{Protocol: proto, TTL: route.DefaultTTL()}, pkt) == nil
}

// cause implements flowKind. head is an echo request as the system has sent it; a
// client tells its requests apart by their sequence numbers.
func (f *forwardICMP) cause(flow *datagramFlow, head []byte) []byte {
	b := append([]byte(nil), flow.head...)
	v6 := flow.id.LocalAddress.Len() == header.IPv6AddressSize
	if n := len(b) - echoHeader; n > 0 && len(head) >= echoHeader && head[0] == echoTypes(v6)[0] {
		copy(b[n+6:n+8], head[6:8])
	}
	return b
}
