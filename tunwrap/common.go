package tunwrap

import "sync/atomic"

// common is what a [Wrapper] and a [TUN] have alike: translation, the packet filter and the
// counters.
type common struct {
	nat    atomic.Pointer[natTable]
	filter atomic.Pointer[Filter]
	drops  dropCounters
	tooBig tooBig

	_        [128]byte
	outbound outboundCounters
	inbound  inboundCounters
}

// SetNAT replaces all NAT rules, also for packets of connections that exist. No rules
// cost nothing. On an error, which wraps [ErrNATRule], the old ones stay.
func (c *common) SetNAT(rules []NATRule) error {
	t, err := newNATTable(rules)
	if err != nil {
		return err
	}
	c.nat.Store(t)
	return nil
}

// SetFilter makes f decide which packets pass; nil lets all of them, and costs nothing. A Wrapper
// and a TUN beside each other may have the same.
func (c *common) SetFilter(f *Filter) { c.filter.Store(f) }

// Drops is the number of packets given up so far, by reason.
func (c *common) Drops() Drops { return c.drops.load() }

// Stats is what has been carried so far; for a TUN the kernel is the stack. The numbers of a Read or
// Write in progress are not yet in it.
func (c *common) Stats() Stats {
	return Stats{
		Outbound: OutboundStats{
			Packets:      c.outbound.packets.Load(),
			Superpackets: c.outbound.superpackets.Load(),
			Segments:     c.outbound.segments.Load(),
			Bytes:        c.outbound.bytes.Load(),
		},
		Inbound: InboundStats{
			Segments:     c.inbound.segments.Load(),
			Bytes:        c.inbound.bytes.Load(),
			Packets:      c.inbound.packets.Load(),
			Superpackets: c.inbound.superpackets.Load(),
		},
		TooBig:    c.tooBig.messages.Load(),
		Fragments: c.tooBig.frags.Load(),
	}
}
