package netstack

import (
	"encoding/binary"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// An icmpError is what the router tells a client about one of its packets: type and
// code for each family, and perhaps an MTU.
type icmpError struct {
	type4, code4 uint8 // RFC 792, RFC 1812 5.2.7
	type6, code6 uint8 // RFC 4443 3
	mtu          uint32
	// from is who says so; the router itself when empty.
	from tcpip.Address
}

var (
	errTimeExceeded = icmpError{type4: 11, code4: 0, type6: 3, code6: 0}
	errNoNetwork    = icmpError{type4: 3, code4: 0, type6: 1, code6: 0}
	errNoHost       = icmpError{type4: 3, code4: 1, type6: 1, code6: 3}
	errProhibited   = icmpError{type4: 3, code4: 13, type6: 1, code6: 1}
	errNoPort       = icmpError{type4: 3, code4: 3, type6: 1, code6: 4}
)

func errTooBig(mtu uint32) icmpError {
	return icmpError{type4: 3, code4: 4, type6: 2, code6: 0, mtu: mtu}
}

// inBoth fills in type and code for the family that has none, for a hook's flow that
// goes on in another family than it came in. RFC 7915 4.2 and 5.2 have the full
// tables; what is not here becomes "host unreachable".
func (e icmpError) inBoth() icmpError {
	switch {
	case e.type6 == 0:
		switch {
		case e.type4 == errTimeExceeded.type4:
			e.type6, e.code6 = errTimeExceeded.type6, e.code4
		case e.mtu != 0:
			e.type6, e.code6 = errTooBig(0).type6, 0
		default:
			e.type6, e.code6 = errNoHost.type6, errNoHost.code6
			for _, known := range unreachables {
				if known.code4 == e.code4 {
					e.code6 = known.code6
				}
			}
		}
	case e.type4 == 0:
		switch {
		case e.type6 == errTimeExceeded.type6:
			e.type4, e.code4 = errTimeExceeded.type4, e.code6
		case e.mtu != 0:
			e.type4, e.code4 = errTooBig(0).type4, errTooBig(0).code4
		default:
			e.type4, e.code4 = errNoHost.type4, errNoHost.code4
			for _, known := range unreachables {
				if known.code6 == e.code6 {
					e.code4 = known.code4
				}
			}
		}
	}
	return e
}

var unreachables = []icmpError{errNoNetwork, errNoHost, errProhibited, errNoPort}

// errorOf is what the client is told about a target that failed; false where
// silence, or a TCP reset, is the answer.
func errorOf(why refusal) (icmpError, bool) {
	switch why {
	case failedNetwork:
		return errNoNetwork, true
	case failedHost, failedTimeout:
		return errNoHost, true
	case failedProhibited, refusedByRule, refusedRouterItself, refusedInsideVPN, refusedAddress, refusedNoEcho:
		return errProhibited, true
	}
	return icmpError{}, false
}

// icmpErrors sends them, at a bounded rate (RFC 1812 4.3.2.8, RFC 4443 2.4 f).
type icmpErrors struct {
	router *router
	limit  *rate.Limiter
}

// Traceroute sends three probes at a time to each of 30 hops; Linux allows 1,000
// messages a second in all (net.ipv4.icmp_msgs_per_sec).
const (
	icmpErrorsPerSecond = 1000
	icmpErrorsBurst     = 100
)

func newICMPErrors(r *router) *icmpErrors {
	return &icmpErrors{router: r, limit: rate.NewLimiter(icmpErrorsPerSecond, icmpErrorsBurst)}
}

// send tells the sender of pkt about it. It borrows pkt, at any stage of its way
// through the router's stack.
func (e *icmpErrors) send(what icmpError, pkt *stack.PacketBuffer) {
	e.sendQuoting(what, quote(pkt))
}

// sendQuoting is send for the beginning of a packet, IP header first, which it
// borrows.
func (e *icmpErrors) sendQuoting(what icmpError, packet []byte) {
	if !mayTell(packet) || !e.limit.Allow() {
		return
	}
	var b []byte
	var proto tcpip.NetworkProtocolNumber
	if packet[0]>>4 == header.IPv6Version {
		b, proto = e.message6(what, packet), header.IPv6ProtocolNumber
	} else {
		b, proto = e.message4(what, packet), header.IPv4ProtocolNumber
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	pkt.NetworkProtocolNumber = proto
	var list stack.PacketBufferList
	list.PushBack(pkt)
	e.router.node.link.WritePackets(list) // a full queue counts what it drops
	list.DecRef()                         // pkt's reference
}

// Most of an error message that is quoted: RFC 1812 4.3.2.3 for IPv4, RFC 4443 2.4 c for
// IPv6.
const (
	mostError4 = 576
	mostError6 = header.IPv6MinimumMTU
)

// quote copies the beginning of pkt, from the IP header on.
func quote(pkt *stack.PacketBuffer) []byte {
	b := make([]byte, 0, mostError6)
	add := func(p []byte) { b = append(b, p[:min(len(p), cap(b)-len(b))]...) }
	add(pkt.NetworkHeader().Slice())
	add(pkt.TransportHeader().Slice())
	add(pkt.Data().AsRange().Capped(mostError6).ToSlice())
	return b
}

// mayTell tells whether an error may be sent about a packet at all: not about
// ICMP errors, later fragments, groups and addresses that are nobody's (RFC 1122
// 3.2.2, RFC 4443 2.4 e).
func mayTell(b []byte) bool {
	switch {
	case len(b) < header.IPv4MinimumSize:
		return false
	case b[0]>>4 == header.IPv4Version:
		h := header.IPv4(b)
		if h.FragmentOffset() != 0 || !isHost(h.SourceAddress()) || !isHost(h.DestinationAddress()) {
			return false
		}
		hlen := int(h.HeaderLength())
		if h.Protocol() == uint8(header.ICMPv4ProtocolNumber) {
			return len(b) > hlen && b[hlen] == uint8(header.ICMPv4Echo)
		}
		return len(b) >= hlen
	case b[0]>>4 == header.IPv6Version && len(b) >= header.IPv6MinimumSize:
		h := header.IPv6(b)
		if !isHost(h.SourceAddress()) || !isHost(h.DestinationAddress()) {
			return false
		}
		switch h.NextHeader() {
		case uint8(header.ICMPv6ProtocolNumber):
			return len(b) > header.IPv6MinimumSize && b[header.IPv6MinimumSize] >= 128 // not an error
		case uint8(header.IPv6FragmentExtHdrIdentifier):
			return len(b) >= header.IPv6MinimumSize+8 && binary.BigEndian.Uint16(b[header.IPv6MinimumSize+2:])&^7 == 0
		}
		return true
	}
	return false
}

func isHost(a tcpip.Address) bool {
	n := addrOf(a)
	return !n.IsUnspecified() && !n.IsMulticast() && n != broadcast4
}

func (e *icmpErrors) message4(what icmpError, packet []byte) []byte {
	const hdr = header.IPv4MinimumSize + header.ICMPv4MinimumSize
	cause := header.IPv4(packet)
	packet = packet[:min(len(packet), mostError4-hdr)]
	b := make([]byte, hdr+len(packet))
	copy(b[hdr:], packet)
	from := what.from
	if from.Len() != header.IPv4AddressSize {
		from = e.router.sourceFor(cause.DestinationAddress())
	}
	h := header.IPv4(b)
	h.Encode(&header.IPv4Fields{
		TOS: 0xc0, TotalLength: uint16(len(b)), // internetwork control (RFC 1812 4.3.2.5)
		Flags: header.IPv4FlagDontFragment, TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: from, DstAddr: cause.SourceAddress(),
	})
	h.SetChecksum(^h.CalculateChecksum())
	m := header.ICMPv4(b[header.IPv4MinimumSize:])
	m.SetType(header.ICMPv4Type(what.type4))
	m.SetCode(header.ICMPv4Code(what.code4))
	if what.mtu != 0 {
		m.SetMTU(uint16(min(what.mtu, 65535)))
	}
	m.SetChecksum(^checksum.Checksum(m, 0))
	return b
}

func (e *icmpErrors) message6(what icmpError, packet []byte) []byte {
	const hdr = header.IPv6MinimumSize + header.ICMPv6ErrorHeaderSize
	cause := header.IPv6(packet)
	packet = packet[:min(len(packet), mostError6-hdr)]
	b := make([]byte, hdr+len(packet))
	copy(b[hdr:], packet)
	from := what.from
	if from.Len() != header.IPv6AddressSize {
		from = e.router.sourceFor(cause.DestinationAddress())
	}
	h := header.IPv6(b)
	h.Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(b) - header.IPv6MinimumSize), TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: 64, SrcAddr: from, DstAddr: cause.SourceAddress(),
	})
	m := header.ICMPv6(b[header.IPv6MinimumSize:])
	m.SetType(header.ICMPv6Type(what.type6))
	m.SetCode(header.ICMPv6Code(what.code6))
	if what.mtu != 0 {
		binary.BigEndian.PutUint32(m[4:], what.mtu) // RFC 4443 3.2
	}
	m.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: m, Src: h.SourceAddress(), Dst: h.DestinationAddress(),
	}))
	return b
}
