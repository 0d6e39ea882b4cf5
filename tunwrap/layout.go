package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Protocol numbers (IANA), as they stand in a header byte.
const (
	protoICMP    = uint8(header.ICMPv4ProtocolNumber)
	protoTCP     = uint8(header.TCPProtocolNumber)
	protoUDP     = uint8(header.UDPProtocolNumber)
	protoDCCP    = 33
	protoICMPv6  = uint8(header.ICMPv6ProtocolNumber)
	protoUDPLite = 136
)

// Offsets in bytes of the fields that this package reads and writes. gVisor's
// header package knows them too but mostly keeps them private.
const (
	ip4TotalLen = 2
	ip4ID       = 4
	ip4FragOff  = 6
	ip4TTL      = 8
	ip4Proto    = 9
	ip4Checksum = 10
	ip4Src      = 12
	ip4Dst      = 16

	ip6PayloadLen = 4
	ip6NextHeader = 6
	ip6HopLimit   = 7
	ip6Src        = 8
	ip6Dst        = 24

	tcpSeq      = 4
	tcpAck      = 8
	tcpDataOff  = 12
	tcpFlags    = 13
	tcpWindow   = 14
	tcpChecksum = header.TCPChecksumOffset
	tcpUrgent   = 18

	udpLen      = 4
	udpChecksum = 6

	icmpChecksum = 2
)

// TCP flags of byte 13 (RFC 9293 3.1, RFC 3168).
const (
	flagFIN = uint8(header.TCPFlagFin)
	flagSYN = uint8(header.TCPFlagSyn)
	flagRST = uint8(header.TCPFlagRst)
	flagPSH = uint8(header.TCPFlagPsh)
	flagACK = uint8(header.TCPFlagAck)
	flagECE = uint8(header.TCPFlagEce)
	flagCWR = uint8(header.TCPFlagCwr)
)

const (
	ip4FlagDF = 0x4000 // in the 16-bit word at ip4FragOff
	ip4FlagMF = 0x2000
	ip4Offset = 0x1fff
)

// maxPacket is the largest IP packet in bytes, because IPv4's total length has 16
// bits. IPv6 without jumbograms could carry 40 more; nothing here does.
const maxPacket = 65535

// A layout says where the parts of one IP packet are.
type layout struct {
	version uint8
	// proto is the transport protocol, past the IPv6 extension headers.
	proto uint8
	// fragment: the packet is one piece of several; l4 is then the start of its part
	// of the payload.
	fragment bool
	// later: a fragment that is not the first, so it has no transport header.
	later bool
	// options: there are IPv4 options or IPv6 extension headers.
	options bool
	// atomic: there is an IPv6 fragment header, but the packet is whole (RFC 6946).
	atomic bool
	// frag is the offset of the first IPv6 fragment header in bytes; 0: there is none.
	frag int
	// l4 is the offset of the transport header in bytes.
	l4 int
	// total is the length of the packet in bytes according to its IP header.
	total int
}

// locate reads the IP headers at the start of b, of a packet of size bytes, of which b may be
// only the first part. It checks every length that it uses: on DropNone
// l.l4 <= len(b) and l.l4 <= l.total <= size hold. It borrows b.
//
// IPv6 extension headers are followed exactly as far as gVisor follows them
// (header.IPv6PayloadIterator), so that no checksum which gVisor would rely on goes
// unverified.
func locate(b []byte, size int) (l layout, d Drop) {
	if len(b) < header.IPv4MinimumSize {
		return l, DropMalformed
	}
	switch b[0] >> 4 {
	case 4:
		hlen := int(b[0]&0x0f) * 4
		total := int(binary.BigEndian.Uint16(b[ip4TotalLen:]))
		if hlen < header.IPv4MinimumSize || hlen > total || hlen > len(b) || total > size {
			return l, DropMalformed
		}
		frag := binary.BigEndian.Uint16(b[ip4FragOff:])
		l = layout{
			version:  4,
			proto:    b[ip4Proto],
			fragment: frag&(ip4FlagMF|ip4Offset) != 0,
			later:    frag&ip4Offset != 0,
			options:  hlen > header.IPv4MinimumSize,
			l4:       hlen,
			total:    total,
		}
		return l, DropNone
	case 6:
		if len(b) < header.IPv6MinimumSize {
			return l, DropMalformed
		}
		l = layout{
			version: 6,
			proto:   b[ip6NextHeader],
			l4:      header.IPv6MinimumSize,
			total:   header.IPv6MinimumSize + int(binary.BigEndian.Uint16(b[ip6PayloadLen:])),
		}
		if l.total > size {
			return l, DropMalformed
		}
		return l.followExtensions(b)
	}
	return l, DropMalformed
}

// followExtensions walks the IPv6 extension headers from l.l4 on.
func (l layout) followExtensions(b []byte) (layout, Drop) {
	end := min(len(b), l.total)
	for {
		length := 8
		switch header.IPv6ExtensionHeaderIdentifier(l.proto) {
		case header.IPv6HopByHopOptionsExtHdrIdentifier,
			header.IPv6DestinationOptionsExtHdrIdentifier:
			if l.l4+8 > end {
				return l, DropMalformed
			}
			length = (int(b[l.l4+1]) + 1) * 8
		case header.IPv6RoutingExtHdrIdentifier:
			if l.l4+8 > end {
				return l, DropMalformed
			}
			if b[l.l4+3] != 0 {
				// Segments are left: the destination in the pseudo-header is not the
				// one in the IP header. The stack forwards no such packet to a
				// transport protocol, so its payload may stay opaque.
				return l, DropNone
			}
			length = (int(b[l.l4+1]) + 1) * 8
		case header.IPv6FragmentExtHdrIdentifier:
			if l.l4+8 > end {
				return l, DropMalformed
			}
			frag := binary.BigEndian.Uint16(b[l.l4+2:])
			if l.frag == 0 {
				l.frag = l.l4
			}
			l.later = l.later || frag&^7 != 0
			l.fragment = l.fragment || frag&^6 != 0
			l.atomic = !l.fragment
		case header.IPv6ExperimentExtHdrIdentifier:
			// Eight bytes without a length field, as gVisor has it.
			if l.l4+8 > end {
				return l, DropMalformed
			}
		default:
			return l, DropNone
		}
		if l.l4+length > end {
			return l, DropMalformed
		}
		l.proto = b[l.l4]
		l.l4 += length
		l.options = true
		if l.later {
			return l, DropNone
		}
	}
}

// addresses are the source and destination in b, in network order, one after the other:
// 8 bytes for IPv4, 32 for IPv6. It lends them out of b.
func (l *layout) addresses(b []byte) []byte {
	if l.version == 4 {
		return b[ip4Src : ip4Dst+4]
	}
	return b[ip6Src : ip6Dst+16]
}

// setTotal writes the length of the packet into its IP header and mends the IPv4
// header checksum. total is the new length in bytes.
func (l *layout) setTotal(b []byte, total int) {
	l.total = total
	if l.version == 6 {
		binary.BigEndian.PutUint16(b[ip6PayloadLen:], uint16(total-header.IPv6MinimumSize))
		return
	}
	old := binary.BigEndian.Uint16(b[ip4TotalLen:])
	binary.BigEndian.PutUint16(b[ip4TotalLen:], uint16(total))
	mend(b[ip4Checksum:], difference(old, uint16(total)))
}
