package tunwrap

import "sync/atomic"

// Stats are what a [Wrapper] or [TUN] has carried since it was made. Bytes are those of IP packets,
// headers included.
type Stats struct {
	Outbound OutboundStats
	Inbound  InboundStats
	// TooBig is the number of messages "fragmentation needed" and "packet too
	// big" delivered to the stack, Fragments that of the fragments made instead.
	TooBig, Fragments uint64
}

// OutboundStats count the way from the stack to the peers.
type OutboundStats struct {
	Packets      uint64 // from the stack, a superpacket being one
	Superpackets uint64 // of these, those that needed splitting
	Segments     uint64 // what they became: packets for the tunnel
	Bytes        uint64 // of Segments
}

// InboundStats count the way from the peers to the stack.
type InboundStats struct {
	Segments     uint64 // from the tunnel, good and bad
	Bytes        uint64 // of Segments
	Packets      uint64 // delivered to the stack, a superpacket being one
	Superpackets uint64 // of these, those that are made of several segments
}

// The counters of one direction are together and the directions apart, for they belong to
// different goroutines. 128 bytes are two cache lines, which the prefetcher of x86 pairs.
type outboundCounters struct {
	packets, superpackets, segments, bytes atomic.Uint64
	_                                      [128 - 4*8]byte
}

type inboundCounters struct {
	segments, bytes, packets, superpackets atomic.Uint64
	_                                      [128 - 4*8]byte
}

// outboundCounts and inboundCounts collect what one call counts; it is added once per batch.
type outboundCounts struct{ packets, superpackets, segments, bytes uint64 }

type inboundCounts struct{ segments, bytes, packets, superpackets uint64 }

func (c *outboundCounters) add(n *outboundCounts) {
	c.packets.Add(n.packets)
	c.superpackets.Add(n.superpackets)
	c.segments.Add(n.segments)
	c.bytes.Add(n.bytes)
}

func (c *inboundCounters) add(n *inboundCounts) {
	c.segments.Add(n.segments)
	c.bytes.Add(n.bytes)
	c.packets.Add(n.packets)
	c.superpackets.Add(n.superpackets)
}
