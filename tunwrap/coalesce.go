package tunwrap

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A coalescer finds, within one batch of inbound packets, the neighbours of each TCP
// flow that make one superpacket together, and those of UDP flows if it is told to: the kernel
// passes a run of datagrams on whole, gVisor's stack has no use for one. Packets of other flows in
// between do not matter; order within a flow is kept.
//
// Two packets are neighbours when splitting the result would give them back. That is the rule
// of Linux (tcp_gro_receive, inet_gro_receive, ipv6_gro_receive, 6.18), in short:
// same addresses, ports, TTL, TOS (ECN included), flow label, DF bit, extension headers, ACK
// number, window and TCP options (so the same timestamps), the next sequence number,
// a payload no longer than the first one's, and without DF the next IPv4 ID. Flags but ACK,
// PSH, ECE and CWR stand alone; ECE must be equal; CWR can only be on the first. A
// shorter packet or PSH ends the run. With DF the ID means nothing (RFC 6864 4) and is
// ignored. ACK numbers must be equal because an ACK more tells the sender more, even
// about loss.
//
// Of UDP (udp_gro_receive_segment), datagrams are neighbours that have a checksum, equal IP headers
// and a payload no longer than the first one's; a shorter one ends the run, and so does the 64th.
//
// All scratch is kept from batch to batch, so a coalescer in steady state allocates
// nothing. It is for one goroutine.
type coalescer struct {
	udp bool // UDP too

	packets []member
	groups  []group

	// slots is a hash table of flows, open addressing, with the latest group of
	// each. Entries of earlier batches have another epoch, so that it need not be
	// cleared.
	slots []slot
	epoch uint32
}

// maxUDPMembers is UDP_GRO_CNT_MAX (net/ipv4/udp_offload.c), and what a kernel before 6.9 takes of a
// socket (UDP_MAX_SEGMENTS). maxMembers bounds what becomes one system call: each
// member is a vector in it, of which Linux takes 1024 (UIO_MAXIOV).
const (
	maxUDPMembers = 64
	maxMembers    = 1000
)

// A member is a packet of the batch. It borrows the packet.
type member struct {
	b    []byte
	next int32 // the next in its group, or none
}

// A group is what becomes one packet: a run of neighbours, or a packet alone.
type group struct {
	first, last int32 // members
	count       int32
	layout      layout // of the first
	hdrLen      int    // bytes of headers of each member
	size        int    // payload bytes of the first
	total       int    // bytes of the whole as one packet
	seq         uint32 // what the next member must have
	id          uint16 // likewise, without DF
	push        bool   // the last member has PSH
	open        bool   // may still take a member
}

type slot struct {
	epoch uint32
	hash  uint32
	group int32
}

const none = -1

// begin forgets the last batch and makes room for n packets.
func (c *coalescer) begin(n int) {
	c.packets, c.groups = c.packets[:0], c.groups[:0]
	want := 64
	for want < 2*n {
		want *= 2
	}
	if len(c.slots) < want {
		c.slots, c.epoch = make([]slot, want), 0
	}
	c.epoch++
	if c.epoch == 0 { // wrapped
		clear(c.slots)
		c.epoch = 1
	}
}

// end drops the references to the batch.
func (c *coalescer) end() { clear(c.packets) }

// add takes in the next packet of the batch, verified and laid out as l. It borrows b until end.
func (c *coalescer) add(b []byte, l *layout) {
	if l.fragment || l.proto != protoTCP && !(c.udp && l.proto == protoUDP) {
		c.alone(b, l)
		return
	}
	s, found := c.find(b, l)
	if found {
		if g := &c.groups[s.group]; g.open && c.joins(g, b, l) {
			c.join(g, b, l)
			return
		}
	}
	// From now on this is the flow's group. What came before b can take no more.
	s.group = int32(len(c.groups))
	c.open(b, l)
}

// alone makes b a group of its own that nothing can join.
func (c *coalescer) alone(b []byte, l *layout) {
	i := int32(len(c.packets))
	c.packets = append(c.packets, member{b: b, next: none})
	c.groups = append(c.groups, group{first: i, last: i, count: 1, layout: *l, total: len(b)})
}

// open makes the packet b a group of its own, open if others may follow.
func (c *coalescer) open(b []byte, l *layout) {
	c.alone(b, l)
	g := &c.groups[len(c.groups)-1]
	t := b[l.l4:]
	if l.proto == protoTCP {
		g.hdrLen = l.l4 + int(t[tcpDataOff]>>4)*4
		if t[tcpFlags]&^(flagECE|flagCWR) != flagACK {
			return
		}
	} else {
		g.hdrLen = l.l4 + header.UDPMinimumSize
		if !wholeDatagram(t) {
			return
		}
	}
	g.size = len(b) - g.hdrLen
	if g.size == 0 || g.hdrLen > maxHeader || l.atomic || l.version == 4 && l.options {
		return
	}
	g.open = true
	if l.proto == protoTCP {
		g.seq = binary.BigEndian.Uint32(t[tcpSeq:]) + uint32(g.size)
	}
	if l.version == 4 {
		g.id = binary.BigEndian.Uint16(b[ip4ID:]) + 1
	}
}

// wholeDatagram reports whether the UDP datagram t has a checksum and is as long as the IP packet says.
func wholeDatagram(t []byte) bool { return be16(t, udpChecksum) != 0 && int(be16(t, udpLen)) == len(t) }

// joins reports whether b, of the same flow as g, continues it.
func (c *coalescer) joins(g *group, b []byte, l *layout) bool {
	f := c.packets[g.first].b
	if l.l4 != g.layout.l4 || len(b) <= g.hdrLen {
		return false
	}
	n := len(b) - g.hdrLen
	if n > g.size || g.total+n > maxPacket || g.count == maxMembers {
		return false
	}
	if !continuesIP(g, f, b, l) {
		return false
	}
	t, u := b[l.l4:g.hdrLen], f[l.l4:g.hdrLen]
	if l.proto == protoUDP {
		return wholeDatagram(b[l.l4:]) && g.count < maxUDPMembers
	}
	if be32(t, tcpSeq) != g.seq || be32(t, tcpAck) != be32(u, tcpAck) {
		return false
	}
	// Data offset and reserved bits, window, urgent pointer.
	if t[tcpDataOff] != u[tcpDataOff] || be16(t, tcpWindow) != be16(u, tcpWindow) || be16(t, tcpUrgent) != be16(u, tcpUrgent) {
		return false
	}
	if t[tcpFlags]&^flagPSH != u[tcpFlags]&^flagCWR {
		return false
	}
	return bytes.Equal(t[header.TCPMinimumSize:], u[header.TCPMinimumSize:])
}

// continuesIP reports whether the IP headers of b, laid out as l, may follow those of g, whose first
// member is f.
func continuesIP(g *group, f, b []byte, l *layout) bool {
	if l.version == 4 {
		// Version, header length and TOS; flags and offset, TTL and protocol.
		if be16(b, 0) != be16(f, 0) || be32(b, ip4FragOff) != be32(f, ip4FragOff) {
			return false
		}
		return be16(b, ip4FragOff)&ip4FlagDF != 0 || be16(b, ip4ID) == g.id
	}
	// Version, traffic class and flow label; next header and hop limit.
	if be32(b, 0) != be32(f, 0) || be16(b, ip6NextHeader) != be16(f, ip6NextHeader) {
		return false
	}
	return !l.options || bytes.Equal(b[header.IPv6MinimumSize:l.l4], f[header.IPv6MinimumSize:l.l4])
}

// join appends b to g.
func (c *coalescer) join(g *group, b []byte, l *layout) {
	i := int32(len(c.packets))
	c.packets = append(c.packets, member{b: b, next: none})
	c.packets[g.last].next = i
	g.last = i
	g.count++
	n := len(b) - g.hdrLen
	g.total += n
	g.id++
	if l.proto == protoTCP {
		g.seq += uint32(n)
		g.push = b[l.l4+tcpFlags]&flagPSH != 0
	}
	g.open = n == g.size && !g.push
}

// find gives the slot of the flow of the TCP or UDP packet b, and whether a packet of this flow
// has been seen in this batch. If not, the slot is new and its group is to be set.
func (c *coalescer) find(b []byte, l *layout) (s *slot, found bool) {
	h := flowHash(b, l)
	mask := uint32(len(c.slots) - 1)
	for i := h >> 8; ; i++ { // the table is at most half full
		s = &c.slots[i&mask]
		if s.epoch != c.epoch {
			*s = slot{epoch: c.epoch, hash: h}
			return s, false
		}
		if s.hash != h {
			continue
		}
		g := &c.groups[s.group]
		f := c.packets[g.first].b
		if g.layout.version == l.version && g.layout.proto == l.proto && bytes.Equal(l.addresses(b), g.layout.addresses(f)) &&
			be32(b, l.l4) == be32(f, g.layout.l4) {
			return s, true
		}
	}
}

// flowHash mixes addresses and, of a packet that has them, ports.
func flowHash(b []byte, l *layout) uint32 {
	const prime = 0x9e3779b97f4a7c15 // 2^64 divided by the golden ratio
	h := uint64(l.proto)
	if (l.proto == protoTCP || l.proto == protoUDP) && !l.fragment && l.l4+4 <= len(b) {
		h = uint64(be32(b, l.l4))
	}
	for a := l.addresses(b); len(a) >= 8; a = a[8:] {
		h = (h ^ binary.BigEndian.Uint64(a)) * prime
		h ^= h >> 29
	}
	return uint32((h * prime) >> 32)
}

func be16(b []byte, at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
func be32(b []byte, at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }

// merge makes the headers of the first member of g, which has at least two, those of the
// whole, in place; see [group.merge].
func (c *coalescer) merge(g *group) GSO { return g.merge(c.packets[g.first].b) }

// merge makes b, which begins with the headers of the group's first member, begin with those of
// the whole group, and returns what a vnet header would say about it. Lengths and the IPv4 checksum
// are those of the superpacket, the transport checksum is partial, PSH is the last member's.
func (g *group) merge(b []byte) GSO {
	l := &g.layout
	l.setTotal(b, g.total)
	t := b[l.l4:]
	gso := GSO{HdrLen: uint16(g.hdrLen), GSOSize: uint16(g.size), CsumStart: uint16(l.l4), NeedsCsum: true}
	if l.proto == protoUDP {
		gso.Type, gso.CsumOffset = GSOUDPL4, udpChecksum
		binary.BigEndian.PutUint16(t[udpLen:], uint16(g.total-l.l4))
	} else {
		gso.Type, gso.CsumOffset = GSOTCPv4, tcpChecksum
		if l.version == 6 {
			gso.Type = GSOTCPv6
		}
		if t[tcpFlags]&flagCWR != 0 {
			gso.Type |= GSOECN
		}
		if g.push {
			t[tcpFlags] |= flagPSH
		}
	}
	binary.BigEndian.PutUint16(t[gso.CsumOffset:], pseudoSum(b, l, g.total-l.l4))
	return gso
}
