package tunwrap

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// packetClass is what the filter makes of a packet.
type packetClass uint8

const (
	classNone    packetClass = iota
	classTCP                 // with ports
	classUDP                 // with ports
	classEcho                // an echo request or reply
	classOther               // any other protocol, or other ICMP: by addresses alone
	classError               // an ICMP error; the key is that of the packet quoted
	classLater               // a fragment without transport header; the key is the datagram's
	classRefused             // what never passes
)

// A flowKey names a flow, from the node's point of view, so that it is the same for both directions:
//
//	 0  the node's side: address, 4 or 16 bytes
//	16  the far side: address
//	32  the node's port; identifier of an echo; of a fragment, with the next, the IP ID
//	34  the far side's port
//	36  protocol, 0 for a fragment over IPv6
//	37  IP version, and from bit 4 on keyKind
type flowKey [38]byte

// What is in the upper half of the last byte of a flowKey.
const (
	keyFlow     = 0
	keyEchoOut  = 1 // the node asks
	keyEchoIn   = 2
	keyFragsOut = 3 // fragments on their way out
	keyFragsIn  = 4
)

// A filterPacket is what the filter reads from a packet.
type filterPacket struct {
	key       flowKey
	direction Direction
	class     packetClass
	version   uint8
	flags     uint8 // of TCP
	request   bool  // of ping
	size      int   // bytes of the whole, superpackets unsplit
	far       [16]byte

	// Fragments.
	fragment bool    // the first one
	frags    flowKey // of the first one, the key of the datagram
	at       int     // offset of the payload in the datagram, bytes
	length   int     // bytes of payload
	last     bool
	header   int // bytes at the start of the datagram that only the first may contain
}

// ICMP errors that are let through: IPv4 destination unreachable, source quench (which stacks
// ignore), time exceeded, parameter problem; IPv6 the first three and packet too big.
func isReport(version, t uint8) bool {
	if version == 6 {
		return t >= uint8(header.ICMPv6DstUnreachable) && t <= uint8(header.ICMPv6ParamProblem)
	}
	switch header.ICMPv4Type(t) {
	case header.ICMPv4DstUnreachable, header.ICMPv4SrcQuench, header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
		return true
	}
	return false
}

// read fills p from the packet b, laid out as l, on its way d. It borrows b, which may be the headers
// alone.
func (p *filterPacket) read(b []byte, l *layout, d Direction) {
	p.direction, p.version = d, l.version
	if hasRoute(b, l) {
		p.class = classRefused
		return
	}
	p.addresses(b, l, d)
	p.far = [16]byte(p.key[16:32])
	if l.fragment {
		p.readFragment(b, l)
		if l.later {
			return
		}
	}
	t := b[l.l4:min(l.total, len(b))]
	p.class = p.transport(t, l, d)
	if l.fragment {
		switch need := l.l4 - p.header + headerSize(p.class); {
		case p.class == classError, p.length < need:
			// Nobody sends an error in pieces, or headers.
			p.class = classRefused
		default:
			p.header = need
		}
	}
}

// addresses writes those of b into the key.
func (p *filterPacket) addresses(b []byte, l *layout, d Direction) {
	a := l.addresses(b)
	n := len(a) / 2
	own, far := a[:n], a[n:]
	if d == Inbound {
		own, far = far, own
	}
	copy(p.key[:], own)
	copy(p.key[16:], far)
	p.key[36], p.key[37] = l.proto, l.version
}

// transport reads the transport header at the start of t and completes the key.
func (p *filterPacket) transport(t []byte, l *layout, d Direction) packetClass {
	switch l.proto {
	case protoTCP:
		if len(t) < header.TCPMinimumSize {
			return classRefused
		}
		p.flags = t[tcpFlags]
		p.ports(t, d)
		return classTCP
	case protoUDP:
		if len(t) < header.UDPMinimumSize {
			return classRefused
		}
		p.ports(t, d)
		return classUDP
	case protoICMP, protoICMPv6:
		if l.version == 4 == (l.proto == protoICMPv6) {
			break // the other family's means nothing here
		}
		if len(t) < header.ICMPv4MinimumSize {
			return classRefused
		}
		return p.icmp(t, l, d)
	}
	return classOther
}

// ports writes the ports at the start of t into the key.
func (p *filterPacket) ports(t []byte, d Direction) {
	if d == Outbound {
		copy(p.key[32:36], t)
		return
	}
	copy(p.key[32:], t[2:4])
	copy(p.key[34:], t[:2])
}

func (p *filterPacket) icmp(t []byte, l *layout, d Direction) packetClass {
	if ping, request := isEcho(l.version, t[0]); ping {
		p.request = request
		p.echo(t, d, request)
		return classEcho
	}
	if l.version == 4 && header.ICMPv4Type(t[0]) == header.ICMPv4Redirect {
		return classRefused
	}
	if !isReport(l.version, t[0]) {
		return classOther
	}
	inner := t[header.ICMPv4MinimumSize:]
	il, drop := locate(inner, maxPacket+header.IPv6MinimumSize)
	if drop != DropNone || il.version != l.version || il.later {
		return classRefused
	}
	// What comes in quotes what went out, and goes to whoever has sent that: otherwise a flow with one host would let
	// its peer send errors to every other.
	back := Inbound + Outbound - d
	to := p.key[:16]
	if d == Outbound {
		to = p.key[16:32]
	}
	sender := [16]byte(to)
	clear(p.key[:])
	if p.addresses(inner, &il, back); sender != [16]byte(to) {
		return classRefused
	}
	it := inner[il.l4:]
	switch il.proto {
	case protoTCP, protoUDP:
		if len(it) < 4 {
			return classRefused
		}
		p.ports(it, back)
	case protoICMP, protoICMPv6:
		if len(it) < header.ICMPv4MinimumSize {
			return classRefused
		}
		if ping, request := isEcho(il.version, it[0]); ping {
			p.echo(it, back, request)
		}
	}
	return classError
}

// isEcho tells whether an ICMP type is an echo request or reply.
func isEcho(version, t uint8) (is, request bool) {
	if version == 6 {
		request = t == uint8(header.ICMPv6EchoRequest)
		return request || t == uint8(header.ICMPv6EchoReply), request
	}
	request = t == uint8(header.ICMPv4Echo)
	return request || t == uint8(header.ICMPv4EchoReply), request
}

// echo writes the identifier in t and who asks into the key.
func (p *filterPacket) echo(t []byte, d Direction, request bool) {
	copy(p.key[32:34], t[4:6])
	kind := uint8(keyEchoIn)
	if request == (d == Outbound) {
		kind = keyEchoOut
	}
	p.key[37] |= kind << 4
}

// readFragment fills what p says of fragments; for a later one also class and key.
func (p *filterPacket) readFragment(b []byte, l *layout) {
	k := p.key
	kind, payload := uint8(keyFragsOut), l.l4
	if p.direction == Inbound {
		kind = keyFragsIn
	}
	k[37] |= kind << 4
	var word int
	if l.version == 4 {
		frag := be16(b, ip4FragOff)
		p.last = frag&ip4FlagMF == 0
		word = int(frag&ip4Offset) * 8
		copy(k[32:34], b[ip4ID:])
	} else {
		payload = l.frag + 8
		frag := be16(b, l.frag+2)
		p.last = frag&1 == 0
		word = int(frag &^ 7)
		copy(k[32:36], b[l.frag+4:])
		k[36] = 0 // the protocol is in the first fragment only, behind extension headers
	}
	p.at, p.length = word, l.total-payload
	if l.later {
		p.class, p.key = classLater, k
		return
	}
	p.fragment, p.frags, p.header = true, k, payload
}

// headerSize is what a first fragment must contain of the transport header, bytes.
func headerSize(c packetClass) int {
	switch c {
	case classTCP:
		return header.TCPMinimumSize // to the flags and beyond (RFC 1858 3)
	case classUDP, classEcho:
		return 8
	}
	return 0
}

// hasRoute tells whether b says where it is to go on to.
func hasRoute(b []byte, l *layout) bool {
	if l.version == 6 {
		return l.proto == uint8(header.IPv6RoutingExtHdrIdentifier) // locate stops there
	}
	if !l.options {
		return false
	}
	const end, nop, loose, strict = 0, 1, 131, 137 // RFC 791 3.1
	for o := b[header.IPv4MinimumSize:l.l4]; len(o) > 0 && o[0] != end; {
		switch {
		case o[0] == loose || o[0] == strict:
			return true
		case o[0] == nop:
			o = o[1:]
		case len(o) < 2 || o[1] < 2 || int(o[1]) > len(o):
			return true // what follows cannot be told apart
		default:
			o = o[o[1]:]
		}
	}
	return false
}

// begins tells whether p may be the first packet of a flow.
func (p *filterPacket) begins() bool {
	switch p.class {
	case classTCP:
		switch p.flags & (flagSYN | flagACK | flagRST | flagFIN) {
		case flagSYN, flagACK, flagACK | flagFIN:
			return true
		}
		return false
	case classEcho:
		return p.request
	}
	return true
}

// opening is what the rules are asked about p, which begins a flow.
func (p *filterPacket) opening(t *filterTable) opening {
	return openingOf(&p.key, p.class, p.direction, t)
}

// openingOf is the opening of a flow of the class c that began in direction d.
func openingOf(k *flowKey, c packetClass, d Direction, t *filterTable) opening {
	own, far := k.address(0), k.address(16)
	o := opening{direction: d, class: c, peer: t.peerOf(far), src: own, dst: far}
	if d == Outbound {
		o.port = binary.BigEndian.Uint16(k[34:])
	} else {
		o.src, o.dst = far, own
		o.port = binary.BigEndian.Uint16(k[32:])
	}
	return o
}

// address is the one at offset at of the key.
func (k *flowKey) address(at int) netip.Addr {
	if k[37]&0xf == 4 {
		return netip.AddrFrom4([4]byte(k[at:]))
	}
	return netip.AddrFrom16([16]byte(k[at:]))
}

// farAddr is the far side's address in the packet itself, also where the key is of the one quoted.
func (p *filterPacket) farAddr() netip.Addr {
	if p.version == 4 {
		return netip.AddrFrom4([4]byte(p.far[:]))
	}
	return netip.AddrFrom16(p.far)
}
