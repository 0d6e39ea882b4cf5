package tunwrap

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A modelPacket is a packet as people describe it.
type modelPacket struct {
	d        Direction
	v6       bool
	host     byte   // of the far side
	protocol string // "tcp", "udp", "icmp", "gre" or "error", which quotes the packet before
	own, far uint16 // ports; own is the identifier of a ping
	flags    uint8
	request  bool
}

func (p modelPacket) bytes(quoted []byte) []byte {
	src, dst, sport, dport := byte(1), p.host, p.own, p.far
	if p.d == Inbound {
		src, dst, sport, dport = dst, src, dport, sport
	}
	i := b2i(p.v6)
	switch p.protocol {
	case "tcp", "udp":
		s := spec{v6: p.v6, udp: p.protocol == "udp", sport: sport, dport: dport, flags: p.flags, src: hostAddr(p.v6, src), dst: hostAddr(p.v6, dst)}
		return s.full()
	case "icmp":
		if p.request {
			return icmpOf(src, dst, 8, 128, 0, echoBody(p.own))[i]
		}
		return icmpOf(src, dst, 0, 129, 0, echoBody(p.own))[i]
	case "gre":
		return gre(src, dst)[i]
	}
	return icmpOf(src, dst, 3, 1, 1, quotes([][]byte{quoted}, 64)[0])[i]
}

// A modelFlow is a flow the slow way.
type modelFlow struct {
	modelPacket // that began it
	until       time.Duration
	answered    bool
	after       bool
	fin, rst    [3]bool // by direction
}

// A modelFilter is a filter the slow way: one list of flows, no locks, no limits.
type modelFilter struct {
	rules []FilterRule
	peers []FilterPeer
	flows []*modelFlow
	now   time.Duration
}

func (m *modelFilter) peerOf(p modelPacket) string {
	for _, peer := range m.peers {
		for _, prefix := range peer.Prefixes {
			if prefix.Contains(hostAddr(p.v6, p.host)) {
				return peer.ID
			}
		}
	}
	return ""
}

func (m *modelFilter) allows(p modelPacket) bool {
	src, dst, port := nodeAddr(p.v6), hostAddr(p.v6, p.host), p.far
	if p.d == Inbound {
		src, dst, port = dst, src, p.own
	}
	in := func(ps []netip.Prefix, a netip.Addr) bool {
		return len(ps) == 0 || slices.ContainsFunc(ps, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	for _, r := range m.rules {
		if r.Direction != 0 && r.Direction != p.d || r.Peer != "" && r.Peer != m.peerOf(p) || r.Protocol != "" && r.Protocol != p.protocol ||
			!in(r.From, src) || !in(r.To, dst) {
			continue
		}
		if len(r.Ports) > 0 && (p.protocol != "tcp" && p.protocol != "udp" ||
			!slices.ContainsFunc(r.Ports, func(r PortRange) bool { return r.First <= port && port <= r.Last })) {
			continue
		}
		return !r.Deny
	}
	return false
}

// same tells whether p has the addresses, ports and so on of the flow.
func (f *modelFlow) same(p modelPacket) bool {
	if f.v6 != p.v6 || f.host != p.host || f.protocol != p.protocol {
		return false
	}
	switch f.protocol {
	case "icmp":
		return f.own == p.own && p.request == (p.d == f.d)
	case "gre":
		return true
	}
	return f.own == p.own && f.far == p.far
}

func (f *modelFlow) note(p modelPacket, now time.Duration) {
	if p.d == f.d && p.flags&syn != 0 && (f.fin[1] && f.fin[2] || f.rst[1] || f.rst[2]) {
		f.answered, f.after, f.fin, f.rst = false, false, [3]bool{}, [3]bool{}
	}
	f.answered = f.answered || p.d != f.d
	wait := 30 * time.Second
	if f.protocol == "tcp" {
		f.after = f.after || p.d == f.d && p.flags&syn == 0
		f.fin[p.d] = f.fin[p.d] || p.flags&fin != 0
		f.rst[p.d] = p.flags&rst != 0 || f.rst[p.d] && p.flags&ack == 0
		switch {
		case f.rst[1] || f.rst[2]:
			wait = 10 * time.Second
		case f.fin[1] && f.fin[2]:
			wait = 2 * time.Minute
		case f.answered && f.after:
			wait = 124 * time.Minute
		}
	} else if f.protocol != "icmp" && f.answered {
		wait = 2 * time.Minute
	}
	f.until = now + wait
}

// passes is what the filter must say about p.
func (m *modelFilter) passes(p, quoted modelPacket) bool {
	m.flows = slices.DeleteFunc(m.flows, func(f *modelFlow) bool { return f.until <= m.now })
	of := p
	if p.protocol == "error" {
		of = quoted
		if quoted.protocol == "error" || quoted.d == p.d || m.peerOf(quoted) != m.peerOf(p) || quoted.v6 != p.v6 {
			return false
		}
	}
	i := slices.IndexFunc(m.flows, func(f *modelFlow) bool { return f.same(of) })
	if p.protocol == "error" {
		return i >= 0
	}
	isSYN := p.protocol == "tcp" && p.flags&(syn|ack) == syn
	if i >= 0 && (!isSYN || p.d == m.flows[i].d) {
		m.flows[i].note(p, m.now)
		return true
	}
	begins := p.protocol == "udp" || p.protocol == "gre" || p.protocol == "icmp" && p.request ||
		p.protocol == "tcp" && (isSYN && p.flags&(fin|rst) == 0 || p.flags&(syn|ack|rst) == ack)
	if !begins || !m.allows(p) {
		return false
	}
	if i >= 0 {
		m.flows = slices.Delete(m.flows, i, i+1)
	}
	f := &modelFlow{modelPacket: p}
	f.note(p, m.now)
	m.flows = append(m.flows, f)
	return true
}

func (m *modelFilter) setPeers(peers []FilterPeer) {
	before := make([]string, len(m.flows))
	for i, f := range m.flows {
		before[i] = m.peerOf(f.modelPacket)
	}
	m.peers = peers
	i := 0
	m.flows = slices.DeleteFunc(m.flows, func(f *modelFlow) bool {
		i++
		return m.peerOf(f.modelPacket) != before[i-1] || !m.allows(f.modelPacket)
	})
}

// FuzzFilter sends packets of few flows in any order at random times through the filter and through a
// slow model of it, under random rules.
func FuzzFilter(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed, uint16(300))
	}
	f.Fuzz(func(t *testing.T, seed uint64, steps uint16) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		protocols := []string{"tcp", "udp", "icmp", "gre"}
		var rules []FilterRule
		for range rnd.IntN(5) {
			r := FilterRule{Deny: rnd.IntN(3) == 0, Direction: Direction(rnd.IntN(3)), Peer: []string{"", "b", "c", "gone"}[rnd.IntN(4)]}
			if r.Protocol = append(protocols[:3:3], "")[rnd.IntN(4)]; r.Protocol != "icmp" && rnd.IntN(3) == 0 {
				r.Ports = ports(uint16(rnd.IntN(2)))
			}
			if rnd.IntN(4) == 0 {
				r.To = prefixes("10.0.0.2/31", "fd00::2/128")
			}
			if rnd.IntN(4) == 0 {
				r.From = prefixes("10.0.0.0/31", "fd00::2/127")
			}
			rules = append(rules, r)
		}
		peers := [][]FilterPeer{filterPeers, filterPeers[:1], {{ID: "c", Prefixes: filterPeers[0].Prefixes}, {ID: "b", Prefixes: filterPeers[1].Prefixes[1:]}}}
		x := newFilterTest(t, rules...)
		m := &modelFilter{rules: rules, peers: filterPeers}
		var last modelPacket
		var lastBytes []byte
		for i := range int(steps % 1000) {
			switch rnd.IntN(40) {
			case 0, 1, 2:
				d := []time.Duration{time.Millisecond, 9 * time.Second, 29 * time.Second, 119 * time.Second, 2 * time.Hour}[rnd.IntN(5)]
				x.wait(d)
				m.now += d
			case 3:
				p := peers[rnd.IntN(len(peers))]
				if err := x.SetPeers(p); err != nil {
					t.Fatal(err)
				}
				m.setPeers(p)
			}
			p := modelPacket{
				d: Direction(1 + rnd.IntN(2)), v6: rnd.IntN(4) == 0, host: byte(2 + rnd.IntN(2)), protocol: append(protocols, "error", "tcp")[rnd.IntN(6)],
				own: uint16(rnd.IntN(2)), far: uint16(rnd.IntN(2)), request: rnd.IntN(2) == 0,
				flags: []uint8{syn, syn | ack, ack, ack, ack | fin, rst, rst | ack, uint8(rnd.IntN(64))}[rnd.IntN(8)],
			}
			if p.protocol == "error" {
				if lastBytes == nil {
					continue
				}
				p.v6 = last.v6
			}
			b := p.bytes(lastBytes)
			want := m.passes(p, last)
			if got := x.passes(p.d, b); got != want {
				t.Fatalf("step %d: %+v after %+v: passes %v, want %v; rules %s", i, p, last, got, want, fmt.Sprintf("%+v", rules))
			}
			last, lastBytes = p, b
		}
		x.sweepSome(x.now + int64(time.Second))
		m.flows = slices.DeleteFunc(m.flows, func(f *modelFlow) bool { return f.until <= m.now+time.Second })
		if n := x.Stats().Flows; n != len(m.flows) {
			t.Errorf("%d flows, want %d", n, len(m.flows))
		}
	})
}

// FuzzFilterPacket: any bytes that have IP headers. The filter must not touch them, nor read beyond their end,
// and lets nothing through when there are no rules.
func FuzzFilterPacket(f *testing.F) {
	for _, b := range tcpOut(syn, 1, 2) {
		f.Add(b)
		f.Add(icmpOf(2, 1, 3, 1, 1, quotes([][]byte{b}, 64)[0])[b2i(b[0]>>4 == 6)])
		for _, frag := range fragmentsOf(b, 24, 1) {
			f.Add(frag)
		}
	}
	f.Add((&spec{flags: syn, ipExtra: []byte{1, 131, 7, 4, 10, 9, 9, 9}}).full())
	f.Fuzz(func(t *testing.T, b []byte) {
		b = slices.Clip(b)
		l, d := locate(b, len(b))
		if d != DropNone {
			t.Skip()
		}
		closed, open := newFilterTest(t), newFilterTest(t, FilterRule{})
		for _, d := range []Direction{Outbound, Inbound} {
			if closed.passes(d, b) {
				t.Error("no rule, and yet it passes")
			}
			first := open.passes(d, b)
			if again := open.passes(d, b); first && !l.later && !again {
				t.Error("passes once only")
			}
		}
		// Cut off anywhere behind the IP headers.
		for n := l.l4; n <= min(len(b), l.l4+80); n++ {
			c := slices.Clone(b[:n:n])
			if d := open.judge(c, &l, l.total, Inbound, 0); d != DropNone && d != DropFilter {
				t.Error(d)
			}
		}
	})
}
