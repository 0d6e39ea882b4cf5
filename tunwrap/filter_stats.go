package tunwrap

import "sync/atomic"

// FilterStats are what a Filter has done since it was made. A superpacket counts as one packet, with all
// its bytes, IP headers included.
type FilterStats struct {
	Rules []FilterRuleStats // in the order of FilterOptions.Rules
	// Flows is how many are remembered now, and Limit and LimitPerPeer how many may be.
	Flows, Limit, LimitPerPeer int
	// Known are the packets that passed because they belong to a flow. They are in the
	// counts of the rule that allowed it, too.
	Known FilterCount
	// NoRule are the packets refused because no rule fits, Unknown those that only a known flow may
	// have and that belong to none (resets, replies to nobody's ping, ICMP errors about nothing, fragments
	// without a first one), or that never pass; and Full those that would have begun a flow too many.
	NoRule, Unknown, Full FilterCount
}

// A FilterCount counts packets and their bytes.
type FilterCount struct{ Packets, Bytes uint64 }

// FilterRuleStats are what a rule has decided: of one that allows, all packets of its flows, both ways;
// of one that denies, the packets refused.
type FilterRuleStats struct {
	Flows             uint64 // that it has allowed
	Outbound, Inbound FilterCount
}

// refusal is why the filter does not let a packet pass.
type refusal uint8

const (
	notRefused    refusal = iota
	refusedByRule         // counted by the rule
	refusedNoRule         // the rest in Filter.other
	refusedUnknown
	refusedFull
	numRefusals
)

// directions are counters that outbound and inbound pumps do not share a cache line of.
type directions struct {
	out, in filterCounter
}

type filterCounter struct {
	packets, bytes           atomic.Uint64
	firstPackets, firstBytes atomic.Uint64 // of these, those that began a flow
	_                        [128 - 4*8]byte
}

func (c *directions) of(d Direction) *filterCounter {
	if d == Outbound {
		return &c.out
	}
	return &c.in
}

// add counts p.
func (c *directions) add(p *filterPacket) {
	n := c.of(p.direction)
	n.packets.Add(1)
	n.bytes.Add(uint64(p.size))
}

// addFirst counts p, which begins a flow.
func (c *directions) addFirst(p *filterPacket) {
	c.add(p)
	n := c.of(p.direction)
	n.firstPackets.Add(1)
	n.firstBytes.Add(uint64(p.size))
}

// refuse counts the packet p as refused.
func (f *Filter) refuse(r refusal, p *filterPacket) Drop {
	if r != refusedByRule {
		f.other[r].add(p)
	}
	return DropFilter
}

func (c *filterCounter) load() FilterCount { return FilterCount{c.packets.Load(), c.bytes.Load()} }

func (c *directions) sum() FilterCount {
	a, b := c.out.load(), c.in.load()
	return FilterCount{a.Packets + b.Packets, a.Bytes + b.Bytes}
}

// Stats are the counters now.
func (f *Filter) Stats() FilterStats {
	s := FilterStats{
		Rules: make([]FilterRuleStats, len(f.count)),
		Flows: int(f.open.Load()), Limit: int(f.limit), LimitPerPeer: int(f.perPeer),
		NoRule: f.other[refusedNoRule].sum(), Unknown: f.other[refusedUnknown].sum(), Full: f.other[refusedFull].sum(),
	}
	for i := range f.count {
		c := &f.count[i]
		// First the smaller numbers, so that the difference is never below zero.
		first := c.out.firstPackets.Load() + c.in.firstPackets.Load()
		firstBytes := c.out.firstBytes.Load() + c.in.firstBytes.Load()
		r := FilterRuleStats{Flows: first, Outbound: c.out.load(), Inbound: c.in.load()}
		s.Rules[i] = r
		if !f.rules[i].Deny && !f.stateless {
			s.Known.Packets += r.Outbound.Packets + r.Inbound.Packets - first
			s.Known.Bytes += r.Outbound.Bytes + r.Inbound.Bytes - firstBytes
		}
	}
	return s
}
