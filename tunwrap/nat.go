package tunwrap

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/gaissmai/bart"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A NATRule says that the peer which owns some prefixes knows this node by another
// address than the one the node uses itself. Outbound to these prefixes the source Inside
// becomes Outside; inbound from them the destination Outside becomes Inside. The packets
// quoted in ICMP errors are translated too.
//
// One address stands for one other and no state is kept, so Outside must mean nothing
// else to that peer. IP options and routing headers that contain addresses are left
// alone.
type NATRule struct {
	// Peer are the peer's prefixes. Those of the other family than Inside are
	// ignored, so that one list can serve a rule for each family. Where prefixes
	// overlap, the rules for the longest decide alone; a rule with Inside equal to
	// Outside keeps its prefixes out of a wider one's reach.
	Peer []netip.Prefix
	// Inside is the node's own address, Outside what the peer calls it. Both are
	// IPv4 or both IPv6.
	Inside, Outside netip.Addr
}

// A mapping is a rule made ready for packets.
type mapping struct {
	inside, outside []byte // 4 or 16 bytes
	toOutside       uint16 // what replacing inside by outside adds to a sum
	toInside        uint16
}

// A natTable finds mappings by the peer's address. It never changes: other rules are
// another table.
type natTable struct {
	peers bart.Table[[]mapping]
}

// newNATTable makes the table of rules, nil if there are none. It copies rules.
func newNATTable(rules []NATRule) (*natTable, error) {
	t := new(natTable)
	for _, r := range rules {
		in, out := r.Inside.Unmap().WithZone(""), r.Outside.Unmap().WithZone("")
		if !in.IsValid() || !out.IsValid() || in.Is4() != out.Is4() {
			return nil, fmt.Errorf("%w: inside %v and outside %v are not two addresses of one family", ErrNATRule, r.Inside, r.Outside)
		}
		a, b := sumOf(in.AsSlice()), sumOf(out.AsSlice())
		m := mapping{
			inside: in.AsSlice(), outside: out.AsSlice(),
			toOutside: difference(a, b), toInside: difference(b, a),
		}
		for _, p := range r.Peer {
			if !p.IsValid() {
				return nil, fmt.Errorf("%w: prefix %v", ErrNATRule, p)
			}
			if p.Addr().Is4() != in.Is4() {
				continue
			}
			ms, _ := t.peers.Get(p.Masked())
			for i := range ms {
				if bytes.Equal(ms[i].inside, m.inside) || bytes.Equal(ms[i].outside, m.outside) {
					return nil, fmt.Errorf("%w: for %v, %v and %v each need one counterpart", ErrNATRule, p, in, out)
				}
			}
			t.peers.Insert(p.Masked(), append(ms[:len(ms):len(ms)], m))
		}
	}
	if t.peers.Size() == 0 {
		return nil, nil
	}
	return t, nil
}

// outbound translates the packet b, laid out as l, in place; of a superpacket, the headers
// are enough. g is its offload metadata, with CsumStart set: they tell whether the checksum
// is partial.
func (t *natTable) outbound(b []byte, l *layout, g *GSO) {
	addrs := l.addresses(b)
	n := len(addrs) / 2
	own, peer := addrs[:n], addrs[n:]
	ms := t.lookup(peer)
	if ms == nil {
		return
	}
	if inner, il, ok := quoted(b, l); ok {
		innerOwn := il.addresses(inner)[n:]
		if m := findInside(ms, innerOwn); m != nil {
			diff := replaceQuoted(inner, &il, innerOwn, m.outside, m.toOutside)
			mend(b[l.l4+icmpChecksum:], diff)
		}
	}
	if m := findInside(ms, own); m != nil {
		copy(own, m.outside)
		mendOuter(b, l, g, m.toOutside)
	}
}

// inbound reverses outbound for the packet b, which has only full checksums, in place.
func (t *natTable) inbound(b []byte, l *layout) {
	addrs := l.addresses(b)
	n := len(addrs) / 2
	peer, own := addrs[:n], addrs[n:]
	ms := t.lookup(peer)
	if ms == nil {
		return
	}
	if inner, il, ok := quoted(b, l); ok {
		innerOwn := il.addresses(inner)[:n]
		if m := findOutside(ms, innerOwn); m != nil {
			diff := replaceQuoted(inner, &il, innerOwn, m.inside, m.toInside)
			mend(b[l.l4+icmpChecksum:], diff)
		}
	}
	if m := findOutside(ms, own); m != nil {
		copy(own, m.inside)
		mendOuter(b, l, &GSO{}, m.toInside)
	}
}

// undoOutbound takes back what outbound has done to the source of the packet b, which has only
// full checksums, in place. A quoted packet is left as it is.
func (t *natTable) undoOutbound(b []byte, l *layout) {
	addrs := l.addresses(b)
	n := len(addrs) / 2
	own, peer := addrs[:n], addrs[n:]
	if m := findOutside(t.lookup(peer), own); m != nil {
		copy(own, m.inside)
		mendOuter(b, l, &GSO{}, m.toInside)
	}
}

// lookup finds the mappings for a peer's address of 4 or 16 bytes.
func (t *natTable) lookup(peer []byte) []mapping {
	var a netip.Addr
	if len(peer) == 4 {
		a = netip.AddrFrom4([4]byte(peer))
	} else {
		a = netip.AddrFrom16([16]byte(peer))
	}
	ms, _ := t.peers.Lookup(a)
	return ms
}

func findInside(ms []mapping, addr []byte) *mapping {
	for i := range ms {
		if bytes.Equal(ms[i].inside, addr) {
			return &ms[i]
		}
	}
	return nil
}

func findOutside(ms []mapping, addr []byte) *mapping {
	for i := range ms {
		if bytes.Equal(ms[i].outside, addr) {
			return &ms[i]
		}
	}
	return nil
}

// mendOuter updates the checksums of the packet b after one of its addresses has
// changed by diff.
func mendOuter(b []byte, l *layout, g *GSO, diff uint16) {
	if l.version == 4 {
		mend(b[ip4Checksum:], diff)
	}
	if !g.NeedsCsum {
		mendTransport(b, l, diff)
	} else if at := int(g.CsumStart) + int(g.CsumOffset); at+2 <= len(b) {
		mendPartial(b[at:], diff)
	}
}

// mendTransport updates the full checksum of the transport header in b, as far as
// there is one that covers the addresses.
func mendTransport(b []byte, l *layout, diff uint16) {
	at, ok := transportChecksum(l)
	if !ok || at+2 > len(b) {
		return
	}
	if l.proto == protoUDP {
		mendUDP(b[at:], diff)
	} else {
		mend(b[at:], diff)
	}
}

// transportChecksum is the offset of the checksum that covers the addresses in the
// pseudo-header, if the packet has one.
func transportChecksum(l *layout) (at int, ok bool) {
	if l.later {
		return 0, false
	}
	switch l.proto {
	case protoTCP:
		return l.l4 + tcpChecksum, true
	case protoUDP, protoUDPLite, protoDCCP:
		return l.l4 + udpChecksum, true
	case protoICMPv6:
		return l.l4 + icmpChecksum, l.version == 6
	}
	return 0, false
}

// quoted lends the packet quoted by the ICMP error b, if b is one that quotes enough. The
// quote may be cut short anywhere after its IP headers.
func quoted(b []byte, l *layout) (inner []byte, il layout, ok bool) {
	if l.later || l.l4+header.ICMPv4MinimumSize > l.total || !isICMPError(b, l) {
		return nil, il, false
	}
	inner = b[l.l4+header.ICMPv4MinimumSize : l.total]
	il, d := locate(inner, maxPacket+header.IPv6MinimumSize)
	if d != DropNone || il.version != l.version {
		return nil, il, false
	}
	return inner, il, true
}

// isICMPError reports whether the packet b, whose ICMP header is whole, is an error about
// another packet.
func isICMPError(b []byte, l *layout) bool {
	t := b[l.l4]
	switch {
	case l.version == 4 && l.proto == protoICMP:
		switch header.ICMPv4Type(t) {
		case header.ICMPv4DstUnreachable, header.ICMPv4SrcQuench, header.ICMPv4Redirect,
			header.ICMPv4TimeExceeded, header.ICMPv4ParamProblem:
			return true
		}
	case l.version == 6 && l.proto == protoICMPv6:
		return t < 128 // RFC 4443 2.1
	}
	return false
}

// replaceQuoted overwrites the address at, a part of the quoted packet inner, by addr and
// mends the checksums quoted with it. It returns what all that adds to the sum of inner.
func replaceQuoted(inner []byte, il *layout, at, addr []byte, diff uint16) uint16 {
	copy(at, addr)
	sum := uint32(diff)
	if il.version == 4 {
		field := inner[ip4Checksum:]
		old := binary.BigEndian.Uint16(field)
		mend(field, diff)
		sum += uint32(difference(old, binary.BigEndian.Uint16(field)))
	}
	if f, ok := transportChecksum(il); ok && f+2 <= len(inner) {
		old := binary.BigEndian.Uint16(inner[f:])
		mendTransport(inner, il, diff)
		sum += uint32(difference(old, binary.BigEndian.Uint16(inner[f:])))
	}
	return fold(sum)
}
