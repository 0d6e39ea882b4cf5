package tunwrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A filterTest is a filter on node 10.0.0.1 and fd00::1, at a time of its own. Peer b has 10.0.0.2 and
// fd00::2, peer c 10.0.0.3, fd00::3 and 10.3.0.0/16.
type filterTest struct {
	*Filter
	t   testing.TB
	now int64
}

var filterPeers = []FilterPeer{
	{ID: "b", Prefixes: prefixes("10.0.0.2/32", "fd00::2/128")},
	{ID: "c", Group: "far", Prefixes: prefixes("10.0.0.3/32", "fd00::3/128", "10.3.0.0/16")},
}

func newFilterTest(t testing.TB, rules ...FilterRule) *filterTest {
	t.Helper()
	return newFilterTestOf(t, FilterOptions{Rules: rules, Peers: filterPeers})
}

func newFilterTestOf(t testing.TB, o FilterOptions) *filterTest {
	t.Helper()
	f, err := NewFilter(o)
	if err != nil {
		t.Fatal(err)
	}
	return &filterTest{Filter: f, t: t}
}

func (f *filterTest) wait(d time.Duration) { f.now += int64(d) }

// passes tells whether the packet b passes in direction d, and fails the test if it is changed.
func (f *filterTest) passes(d Direction, b []byte) bool {
	f.t.Helper()
	was := bytes.Clone(b)
	l, drop := locate(b, len(b))
	if drop != DropNone {
		f.t.Fatalf("%v: %x", drop, b)
	}
	switch drop = f.judge(b, &l, len(b), d, f.now); {
	case !bytes.Equal(b, was):
		f.t.Fatalf("%x has become %x", was, b)
	case drop != DropNone && drop != DropFilter:
		f.t.Fatal(drop)
	}
	return drop == DropNone
}

// must fails the test unless the packets pass, or not, in direction d.
func (f *filterTest) must(pass bool, d Direction, name string, packets ...[]byte) {
	f.t.Helper()
	for i, b := range packets {
		if got := f.passes(d, b); got != pass {
			f.t.Errorf("%s (%d): passes %v, want %v: %x", name, i, got, pass, b)
		}
	}
}

// Packets between this node's port 1000 and a peer's port 80 (or the other way round), over both families.
func packetOut(udp bool, flags uint8, own, far uint16, host byte) (both [][]byte) {
	for _, v6 := range []bool{false, true} {
		s := spec{v6: v6, udp: udp, sport: own, dport: far, flags: flags, payload: payload(11)}
		s.src, s.dst = nodeAddr(v6), hostAddr(v6, host)
		both = append(both, s.full())
	}
	return both
}

func packetIn(udp bool, flags uint8, far, own uint16, host byte) (both [][]byte) {
	for _, v6 := range []bool{false, true} {
		s := spec{v6: v6, udp: udp, sport: far, dport: own, flags: flags, payload: payload(11)}
		s.src, s.dst = hostAddr(v6, host), nodeAddr(v6)
		both = append(both, s.full())
	}
	return both
}

func nodeAddr(v6 bool) netip.Addr { return hostAddr(v6, 1) }

func hostAddr(v6 bool, host byte) netip.Addr {
	if v6 {
		a := netip.MustParseAddr("fd00::").As16()
		a[15] = host
		return netip.AddrFrom16(a)
	}
	return netip.AddrFrom4([4]byte{10, 0, 0, host})
}

// icmpOf makes an ICMP message over each family, with the types given. body[0] is the rest of
// the header and what follows over IPv4, body[1] over IPv6; one serves for both.
func icmpOf(src, dst byte, t4, t6, code uint8, body ...[]byte) (both [][]byte) {
	for i, v6 := range []bool{false, true} {
		t := append([]byte{t4, code, 0, 0}, body[min(i, len(body)-1)]...)
		s := spec{v6: v6, udp: true, src: hostAddr(v6, src), dst: hostAddr(v6, dst), payload: make([]byte, len(t)-8)}
		b := s.full()
		if copy(b[s.l4Offset():], t); v6 {
			b[s.l4Offset()] = t6
			b[ip6NextHeader] = protoICMPv6
		} else {
			b[ip4Proto] = protoICMP
		}
		repair(b)
		both = append(both, b)
	}
	return both
}

func pingOut(host byte, id uint16) [][]byte { return icmpOf(1, host, 8, 128, 0, echoBody(id)) }
func pongIn(host byte, id uint16) [][]byte  { return icmpOf(host, 1, 0, 129, 0, echoBody(id)) }
func pingIn(host byte, id uint16) [][]byte  { return icmpOf(host, 1, 8, 128, 0, echoBody(id)) }
func pongOut(host byte, id uint16) [][]byte { return icmpOf(1, host, 0, 129, 0, echoBody(id)) }
func echoBody(id uint16) []byte             { return binary.BigEndian.AppendUint32(nil, uint32(id)<<16|7) }
func ports(ps ...uint16) (rs []PortRange) {
	for _, p := range ps {
		rs = append(rs, PortRange{p, p})
	}
	return rs
}
func tcpOut(flags uint8, own, far uint16) [][]byte { return packetOut(false, flags, own, far, 2) }
func tcpIn(flags uint8, far, own uint16) [][]byte  { return packetIn(false, flags, far, own, 2) }
func udpOut(own, far uint16) [][]byte              { return packetOut(true, 0, own, far, 2) }
func udpIn(far, own uint16) [][]byte               { return packetIn(true, 0, far, own, 2) }

// quotes puts the error's four bytes before each of the packets, cut to length bytes.
func quotes(packets [][]byte, length int) (bodies [][]byte) {
	for _, p := range packets {
		bodies = append(bodies, append(make([]byte, 4), p[:min(length, len(p))]...))
	}
	return bodies
}

// TestFilterRules: which rule decides about what begins a flow.
func TestFilterRules(t *testing.T) {
	for _, c := range []struct {
		name  string
		rules []FilterRule
		yes   []string
		no    []string
	}{
		{"no rules", nil, nil, []string{"tcp out", "tcp in", "udp out", "udp in", "ping out", "ping in", "gre out", "gre in", "tcp out c"}},
		{"everything", []FilterRule{{}}, []string{"tcp out", "tcp in", "udp out", "udp in", "ping out", "ping in", "gre out", "gre in", "tcp out c"}, nil},
		{"out", []FilterRule{{Direction: Outbound}}, []string{"tcp out", "udp out", "ping out", "gre out"}, []string{"tcp in", "udp in", "ping in", "gre in"}},
		{"in", []FilterRule{{Direction: Inbound}}, []string{"tcp in", "udp in", "ping in", "gre in"}, []string{"tcp out", "udp out", "ping out", "gre out"}},
		{"tcp", []FilterRule{{Protocol: "tcp"}}, []string{"tcp out", "tcp in", "tcp in c"}, []string{"udp out", "udp in", "ping out", "gre in"}},
		{"udp", []FilterRule{{Protocol: "udp"}}, []string{"udp out", "udp in"}, []string{"tcp out", "ping in", "gre out"}},
		{"icmp", []FilterRule{{Protocol: "icmp"}}, []string{"ping out", "ping in"}, []string{"tcp out", "udp in", "gre in"}},
		{"port", []FilterRule{{Ports: ports(80)}}, []string{"tcp out", "tcp in", "udp out", "udp in"}, []string{"tcp out 81", "tcp in 79", "ping in", "gre in"}},
		{"ports", []FilterRule{{Ports: []PortRange{{1, 79}, {80, 81}}}}, []string{"tcp out", "tcp out 81", "tcp in 79"}, []string{"tcp out 82"}},
		{"peer", []FilterRule{{Peer: "b"}}, []string{"tcp out", "tcp in", "gre in"}, []string{"tcp out c", "tcp in c", "tcp out x", "udp in x"}},
		{"group", []FilterRule{{Group: "far"}}, []string{"tcp out c", "tcp in c"}, []string{"tcp out", "tcp in", "gre in", "tcp out x", "udp in x"}},
		{"deny a group", []FilterRule{{Deny: true, Group: "far"}, {}}, []string{"tcp out", "tcp out x"}, []string{"tcp out c", "tcp in c"}},
		{"nobody", []FilterRule{{Peer: "gone"}}, nil, []string{"tcp out", "tcp in", "tcp out c"}},
		{"to", []FilterRule{{To: prefixes("10.0.0.0/31", "fd00::/127")}}, []string{"tcp in", "tcp in c", "ping in"}, []string{"tcp out", "ping out"}},
		{"from", []FilterRule{{From: prefixes("10.0.0.2/31", "fd00::2/127")}}, []string{"tcp in", "tcp in c"}, []string{"tcp out", "tcp in x"}},
		{"first wins", []FilterRule{{Deny: true, Ports: ports(81)}, {Protocol: "tcp"}, {Deny: true}}, []string{"tcp out", "tcp in 79"}, []string{"tcp out 81", "udp in"}},
		{"deny a peer", []FilterRule{{Deny: true, Peer: "c"}, {}}, []string{"tcp out", "tcp out x"}, []string{"tcp out c", "tcp in c"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			openings := map[string]struct {
				d       Direction
				packets [][]byte
			}{
				"tcp out": {Outbound, tcpOut(syn, 1000, 80)}, "tcp in": {Inbound, tcpIn(syn, 1000, 80)},
				"udp out": {Outbound, udpOut(1000, 80)}, "udp in": {Inbound, udpIn(1000, 80)},
				"ping out": {Outbound, pingOut(2, 5)}, "ping in": {Inbound, pingIn(2, 5)},
				"gre out": {Outbound, gre(1, 2)}, "gre in": {Inbound, gre(2, 1)},
				"tcp out 81": {Outbound, tcpOut(syn, 1000, 81)}, "tcp out 82": {Outbound, tcpOut(syn, 1000, 82)}, "tcp in 79": {Inbound, tcpIn(syn, 1000, 79)},
				"tcp out c": {Outbound, packetOut(false, syn, 1, 80, 3)}, "tcp in c": {Inbound, packetIn(false, syn, 1, 80, 3)},
				"tcp out x": {Outbound, packetOut(false, syn, 1, 80, 9)}, "tcp in x": {Inbound, packetIn(false, syn, 1, 80, 9)}, "udp in x": {Inbound, packetIn(true, 0, 1, 80, 9)},
			}
			for pass, names := range map[bool][]string{true: c.yes, false: c.no} {
				for _, name := range names {
					o, ok := openings[name]
					if !ok {
						t.Fatal(name)
					}
					newFilterTest(t, c.rules...).must(pass, o.d, name, o.packets...)
				}
			}
		})
	}
}

// gre is a packet of a protocol without ports.
func gre(src, dst byte) [][]byte {
	both := icmpOf(src, dst, 0, 0, 0, make([]byte, 20))
	for _, b := range both {
		if b[0]>>4 == 4 {
			b[ip4Proto] = 47
		} else {
			b[ip6NextHeader] = 47
		}
		repair(b)
	}
	return both
}

func TestFilterMistakes(t *testing.T) {
	for name, o := range map[string]FilterOptions{
		"protocol":     {Rules: []FilterRule{{Protocol: "sctp"}}},
		"icmp ports":   {Rules: []FilterRule{{Protocol: "icmp", Ports: ports(1)}}},
		"ports":        {Rules: []FilterRule{{Ports: []PortRange{{2, 1}}}}},
		"direction":    {Rules: []FilterRule{{Direction: 3}}},
		"prefix":       {Rules: []FilterRule{{To: []netip.Prefix{{}}}}},
		"from":         {Rules: []FilterRule{{From: prefixes("::ffff:10.0.0.0/104")}}},
		"no ID":        {Peers: []FilterPeer{{}}},
		"twice":        {Peers: []FilterPeer{{ID: "b"}, {ID: "b"}}},
		"peers prefix": {Peers: []FilterPeer{{ID: "b", Prefixes: []netip.Prefix{{}}}}},
	} {
		if _, err := NewFilter(o); !errors.Is(err, ErrFilterRule) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFilterTCP: a connection that may begin in one direction only, from SYN to the end.
func TestFilterTCP(t *testing.T) {
	f := newFilterTest(t, FilterRule{Direction: Outbound, Protocol: "tcp", Ports: ports(80)})
	for name, flags := range map[string]uint8{"SYN": syn, "SYN ACK": syn | ack, "ACK": ack, "RST": rst, "RST ACK": rst | ack, "FIN ACK": fin | ack, "none": 0, "all": 0xff} {
		f.must(false, Inbound, "before: "+name, tcpIn(flags, 80, 1000)...)
	}
	for name, flags := range map[string]uint8{"SYN ACK": syn | ack, "RST": rst, "RST ACK": rst | ack, "FIN": fin, "SYN FIN": syn | fin, "SYN RST": syn | rst, "none": 0, "all": 0xff} {
		f.must(false, Outbound, "begun with "+name, tcpOut(flags, 1000, 80)...)
		f.must(false, Inbound, "after "+name, tcpIn(ack, 80, 1000)...)
	}
	if n := f.Stats().Flows; n != 0 {
		t.Fatalf("%d flows from packets that begin none", n)
	}
	f.must(true, Outbound, "SYN", tcpOut(syn, 1000, 80)...)
	f.must(false, Inbound, "SYN from the answerer", tcpIn(syn, 80, 1000)...)
	f.must(true, Inbound, "SYN ACK", tcpIn(syn|ack, 80, 1000)...)
	f.must(true, Outbound, "ACK", tcpOut(ack, 1000, 80)...)
	for name, packets := range map[string][][]byte{
		"other port": tcpIn(ack, 81, 1000), "other own port": tcpIn(ack, 80, 1001),
		"other peer": packetIn(false, ack, 80, 1000, 3), "UDP": udpIn(80, 1000),
	} {
		f.must(false, Inbound, name, packets...)
	}
	f.must(false, Inbound, "SYN later", tcpIn(syn, 80, 1000)...)
	f.wait(DefaultTCPIdle - time.Second)
	f.must(true, Inbound, "after a long time", tcpIn(ack|psh, 80, 1000)...)
	f.wait(DefaultTCPIdle - time.Second)
	f.must(true, Inbound, "after another", tcpIn(fin|ack, 80, 1000)...)
	f.wait(DefaultTCPIdle - time.Second)
	f.must(true, Outbound, "half closed", tcpOut(ack, 1000, 80)...)
	f.must(true, Outbound, "FIN", tcpOut(fin|ack, 1000, 80)...)
	f.wait(patienceClosed - time.Second)
	f.must(true, Inbound, "last ACK", tcpIn(ack, 80, 1000)...)
	f.wait(patienceClosed)
	f.must(false, Inbound, "after the end", tcpIn(ack, 80, 1000)...)
	if s := f.Stats(); s.Flows != 0 || s.Rules[0].Flows != 2 || s.Known.Packets == 0 {
		t.Errorf("%+v", s)
	}
}

// TestFilterTCPTimes: how long a connection is known at each stage.
func TestFilterTCPTimes(t *testing.T) {
	type step struct {
		d     Direction
		flags uint8
	}
	const in, out = Inbound, Outbound
	for _, c := range []struct {
		name  string
		steps []step
		want  time.Duration
	}{
		{"SYN", []step{{out, syn}}, patienceBegun},
		{"SYN twice", []step{{out, syn}, {out, syn}}, patienceBegun},
		{"answered", []step{{out, syn}, {in, syn | ack}}, patienceBegun},
		{"established", []step{{out, syn}, {in, syn | ack}, {out, ack}}, DefaultTCPIdle},
		{"joined late", []step{{out, ack}}, patienceBegun},
		{"joined late, answered", []step{{out, ack}, {in, ack}}, DefaultTCPIdle},
		{"half closed", []step{{out, syn}, {in, syn | ack}, {out, ack | fin}}, DefaultTCPIdle},
		{"closed", []step{{out, syn}, {in, syn | ack}, {out, ack | fin}, {in, ack | fin}}, patienceClosed},
		{"refused", []step{{out, syn}, {in, rst | ack}}, patienceReset},
		{"reset", []step{{out, syn}, {in, syn | ack}, {out, ack}, {out, rst}}, patienceReset},
		{"data crosses a reset", []step{{out, syn}, {in, syn | ack}, {out, ack}, {out, rst}, {in, ack}}, patienceReset},
		{"forged reset", []step{{out, syn}, {in, syn | ack}, {out, ack}, {in, rst}, {in, ack}}, DefaultTCPIdle},
		{"again", []step{{out, syn}, {in, rst | ack}, {out, syn}, {in, syn | ack}, {out, ack}}, DefaultTCPIdle},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFilterTest(t, FilterRule{Direction: Outbound})
			packet := func(s step) []byte {
				if s.d == Outbound {
					return tcpOut(s.flags, 5, 6)[0]
				}
				return tcpIn(s.flags, 6, 5)[0]
			}
			for i, s := range c.steps {
				f.must(true, s.d, "step", packet(s))
				if n := f.open.Load(); n != 1 {
					t.Fatalf("%d flows after step %d", n, i)
				}
			}
			f.wait(c.want - time.Nanosecond)
			f.sweepSome(f.now)
			if n := f.open.Load(); n != 1 {
				t.Error("forgotten too soon")
			}
			f.wait(time.Second)
			f.sweepSome(f.now)
			if n := f.open.Load(); n != 0 {
				t.Error("remembered too long")
			}
		})
	}
}

func TestFilterUDPAndPing(t *testing.T) {
	f := newFilterTest(t, FilterRule{Direction: Inbound, Peer: "b"})
	f.must(false, Outbound, "out", udpOut(53, 999)...)
	f.must(true, Inbound, "query", udpIn(999, 53)...)
	f.wait(patienceBegun - 1)
	f.must(true, Outbound, "answer", udpOut(53, 999)...)
	f.wait(DefaultUDPIdle - 1)
	f.must(true, Outbound, "later", udpOut(53, 999)...)
	f.wait(DefaultUDPIdle)
	f.must(false, Outbound, "too late", udpOut(53, 999)...)

	f.must(false, Outbound, "reply to nobody", pongOut(2, 9)...)
	f.must(false, Inbound, "reply to nobody", pongIn(2, 9)...)
	f.must(true, Inbound, "ping", pingIn(2, 9)...)
	f.must(true, Outbound, "pong", pongOut(2, 9)...)
	f.must(false, Outbound, "ping back", pingOut(2, 9)...)
	f.must(false, Inbound, "pong of their own", pongIn(2, 9)...)
	f.must(false, Outbound, "other identifier", pongOut(2, 8)...)
	f.wait(patienceEcho)
	f.must(false, Outbound, "too late", pongOut(2, 9)...)

	f.must(true, Inbound, "GRE", gre(2, 1)...)
	f.must(true, Outbound, "GRE back", gre(1, 2)...)
	f.must(false, Outbound, "GRE to another", gre(1, 3)...)
	// ICMP that is neither an error nor a ping: a timestamp request, a router solicitation.
	f.must(false, Outbound, "other ICMP", icmpOf(1, 2, 13, 133, 0, make([]byte, 16))...)
	f.must(true, Inbound, "other ICMP", icmpOf(2, 1, 13, 133, 0, make([]byte, 16))...)
	f.must(false, Outbound, "pong after other ICMP", pongOut(2, 0)...)
}

// TestFilterErrors: ICMP errors pass in the name of the flow whose packet they quote, for the same peer.
func TestFilterErrors(t *testing.T) {
	f := newFilterTest(t, FilterRule{Direction: Outbound})
	flows := map[string][2][][]byte{ // a packet of it, and one of a flow that does not exist
		"tcp":   {tcpOut(syn, 1000, 80), tcpOut(syn, 1000, 81)},
		"udp":   {udpOut(1000, 80), udpOut(1001, 80)},
		"ping":  {pingOut(2, 9), pingOut(2, 10)},
		"other": {gre(1, 2), gre(1, 3)},
	}
	types := map[string][2]uint8{"unreachable": {3, 1}, "time exceeded": {11, 3}, "parameter problem": {12, 4}, "source quench, too big": {4, 2}}
	for name, p := range flows {
		f.must(true, Outbound, name, p[0]...)
		for what, types := range types {
			name := name + ", " + what
			for _, length := range []int{48, 2000} {
				f.must(true, Inbound, name, icmpOf(2, 1, types[0], types[1], 1, quotes(p[0], length)...)...)
			}
			f.must(true, Inbound, name+" from a network of the peer", icmpOf(2, 1, types[0], types[1], 1, quotes(p[0], 48)...)...)
			f.must(false, Inbound, name+" from another peer", icmpOf(3, 1, types[0], types[1], 1, quotes(p[0], 48)...)...)
			f.must(false, Inbound, name+" about nothing", icmpOf(2, 1, types[0], types[1], 1, quotes(p[1], 48)...)...)
			f.must(false, Inbound, name+" to somebody else", icmpOf(2, 9, types[0], types[1], 1, quotes(p[0], 48)...)...)
			f.must(false, Inbound, name+" about its own packet", icmpOf(2, 1, types[0], types[1], 1, quotes(reversed(p[0]), 48)...)...)
		}
	}
	f.must(false, Inbound, "redirect", icmpOf(2, 1, 5, 137, 0, quotes(flows["udp"][0], 48)...)...)
	for _, cut := range []int{20, 21, 23} {
		f.must(false, Inbound, "quote without ports", icmpOf(2, 1, 3, 1, 0, quotes(flows["udp"][0], cut)[0], quotes(flows["udp"][0], cut+20)[1])...)
	}
	if n := f.Stats().Flows; n != 8 {
		t.Errorf("%d flows, want 8", n)
	}

	// And the other way: this node reports about what came in.
	f = newFilterTest(t, FilterRule{Direction: Inbound})
	f.must(false, Outbound, "before", icmpOf(1, 2, 3, 1, 3, quotes(udpIn(9, 53), 48)...)...)
	f.must(true, Inbound, "query", udpIn(9, 53)...)
	f.must(true, Outbound, "port unreachable", icmpOf(1, 2, 3, 1, 3, quotes(udpIn(9, 53), 48)...)...)
	f.must(true, Outbound, "from a router on this side", icmpOf(9, 2, 3, 1, 3, quotes(udpIn(9, 53), 48)...)...)
	f.must(false, Outbound, "to another", icmpOf(1, 3, 3, 1, 3, quotes(udpIn(9, 53), 48)...)...)
}

// reversed is the packets with their addresses and ports the other way round, which leaves checksums
// as they are.
func reversed(packets [][]byte) (out [][]byte) {
	for _, b := range packets {
		b = bytes.Clone(b)
		l, _ := locate(b, len(b))
		a := l.addresses(b)
		n := len(a) / 2
		copy(a, append(bytes.Clone(a[n:]), a[:n]...))
		if l.proto == protoTCP || l.proto == protoUDP {
			p := b[l.l4 : l.l4+4]
			copy(p, append(bytes.Clone(p[2:]), p[:2]...))
		}
		out = append(out, b)
	}
	return out
}

// TestFilterFragments: the first fragment is decided, the others follow.
func TestFilterFragments(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		whole := spec{v6: v6, udp: true, src: hostAddr(v6, 2), dst: nodeAddr(v6), sport: 9, dport: 53, payload: payload(4000)}
		bad := whole
		bad.dport = 54
		f := newFilterTest(t, FilterRule{Direction: Inbound, Ports: ports(53)})

		frags := fragmentsOf(whole.full(), 1208, 7)
		f.must(false, Inbound, "before the first", frags[1:]...)
		f.must(true, Inbound, "in order", frags...)
		if n := f.Stats().Flows; n != 1 {
			t.Errorf("%d entries when the datagram is whole, want that of the flow", n)
		}
		f.must(false, Inbound, "once more", frags[1:]...)
		f.must(true, Inbound, "reordered", frags[0], frags[3], frags[1], frags[2])
		f.must(false, Inbound, "refused", fragmentsOf(bad.full(), 1208, 8)...)

		f.must(true, Inbound, "first", frags[0])
		f.must(false, Inbound, "other ID", fragmentsOf(whole.full(), 1208, 9)[1:]...)
		f.must(false, Outbound, "other direction", frags[1:]...)
		f.wait(patienceFragments)
		f.must(false, Inbound, "too late", frags[1:]...)

		// TCP: the first must contain the flags, the others must not replace them.
		f = newFilterTest(t, FilterRule{Direction: Outbound, Protocol: "tcp"})
		tcp := spec{v6: v6, src: nodeAddr(v6), dst: hostAddr(v6, 2), sport: 9, dport: 80, flags: syn, payload: payload(64)}
		f.must(false, Outbound, "tiny", fragmentsOf(tcp.full(), 16, 1)...)
		frags = fragmentsOf(tcp.full(), 24, 2)
		f.must(true, Outbound, "first", frags[0])
		f.must(false, Outbound, "overlapping", fragmentsOf(tcp.full(), 8, 2)[1], fragmentsOf(tcp.full(), 16, 2)[1])
		f.must(true, Outbound, "second", frags[1])
		f.must(false, Inbound, "errors come whole", fragmentsOf(icmpOf(2, 1, 3, 1, 1, quotes([][]byte{frags[0], frags[0]}, 48)...)[b2i(v6)], 32, 3)...)
		f.must(false, Inbound, "SYN in fragments", fragmentsOf(tcpIn(syn, 80, 9)[b2i(v6)], 24, 4)...)
	}
}

// fragmentsOf cuts the packet b into fragments of size bytes of payload and with the IP ID id.
func fragmentsOf(b []byte, size int, id uint16) (frags [][]byte) {
	if b[0]>>4 == 4 {
		b = bytes.Clone(b)
		binary.BigEndian.PutUint16(b[ip4ID:], id)
		fragment(b, header.IPv4MinimumSize+size, func(head, payload []byte) {
			frags = append(frags, append(bytes.Clone(head), payload...))
		})
		return frags
	}
	payload := b[header.IPv6MinimumSize:]
	for at := 0; at < len(payload); at += size {
		n := min(size, len(payload)-at)
		f := append(bytes.Clone(b[:header.IPv6MinimumSize]), b[ip6NextHeader], 0)
		word := uint16(at)
		if at+n < len(payload) {
			word |= 1
		}
		f = binary.BigEndian.AppendUint16(f, word)
		f = binary.BigEndian.AppendUint32(f, uint32(id))
		f = append(f, payload[at:at+n]...)
		f[ip6NextHeader] = 44
		binary.BigEndian.PutUint16(f[ip6PayloadLen:], uint16(8+n))
		frags = append(frags, f)
	}
	return frags
}

// TestFilterHostile: packets made to get around it.
func TestFilterHostile(t *testing.T) {
	f := newFilterTest(t, FilterRule{})
	routed := spec{v6: true, flags: syn, ext: 43, ipExtra: append([]byte{6, 2, 2, 1}, make([]byte, 20)...)}
	f.must(false, Inbound, "routing header", routed.full())
	for _, option := range []byte{131, 137} {
		s := spec{flags: syn, ipExtra: []byte{1, option, 7, 4, 10, 9, 9, 9}}
		f.must(false, Inbound, "source route", s.full())
	}
	broken := spec{flags: syn, ipExtra: []byte{7, 9, 0, 0}}
	f.must(false, Inbound, "broken options", broken.full())
	record := spec{flags: syn, ipExtra: []byte{7, 7, 4, 0, 0, 0, 0, 0}}
	f.must(true, Inbound, "record route", record.full())

	// An IPv6 fragment whose transport header begins in the next one.
	s := spec{v6: true, flags: syn, ext: 60, ipExtra: []byte{6, 0, 1, 4, 0, 0, 0, 0}}
	f.must(false, Inbound, "header behind", fragmentsOf(s.full(), 8, 1)[0])
	f.must(true, Inbound, "header with the first", fragmentsOf(s.full(), 32, 2)...)
	// ICMPv6 over IPv4 and the reverse is no ping.
	f = newFilterTest(t, FilterRule{Protocol: "icmp"})
	b := bytes.Clone(pingIn(2, 1)[0])
	b[ip4Proto] = protoICMPv6
	repair(b)
	f.must(false, Inbound, "ICMPv6 over IPv4", b)
}

// TestFilterFull: one peer uses up its share and not the others', the old stays, and what ends makes room.
func TestFilterFull(t *testing.T) {
	f := newFilterTestOf(t, FilterOptions{Rules: []FilterRule{{}}, Peers: filterPeers, Flows: 100, FlowsPerPeer: 40})
	syns := func(host byte, n int) (passed int) {
		for i := range n {
			if f.passes(Inbound, packetIn(false, syn, uint16(i), 80, host)[0]) {
				passed++
			}
		}
		return passed
	}
	if n := syns(2, 1000); n != 40 {
		t.Errorf("%d connections of one peer, want 40", n)
	}
	f.must(true, Inbound, "old one", packetIn(false, ack, 7, 80, 2)[0])
	f.must(true, Outbound, "old one", packetOut(false, ack, 80, 39, 2)[0])
	f.must(false, Outbound, "new one to the same peer", packetOut(false, syn, 1, 22, 2)[0])
	f.must(false, Inbound, "fragment of the same peer", fragmentsOf(packetIn(true, 0, 1, 1, 2)[0], 8, 1)[0])
	if n := syns(3, 1000); n != 40 {
		t.Errorf("%d connections of the other peer, want 40", n)
	}
	if n := syns(9, 1000); n != 20 {
		t.Errorf("%d connections of a stranger, want the 20 that are left", n)
	}
	if s := f.Stats(); s.Flows != 100 || s.Full.Packets != 1000+1000+1000-100+2 || s.Limit != 100 || s.LimitPerPeer != 40 {
		t.Errorf("%+v", s)
	}
	f.wait(patienceBegun + time.Second)
	if n := syns(2, 10); n != 10 {
		t.Errorf("%d connections when the old ones are over, want 10", n)
	}
	// The one that was answered has begun later than the rest, but is over too.
	if n := f.Stats().Flows; n != 10 {
		t.Errorf("%d flows, want 10", n)
	}
	for i := range f.shards {
		s := &f.shards[i]
		used := 0
		for j := range s.flows {
			if s.flows[j].peer != nil {
				used++
			}
		}
		for free := s.free; free != 0; free = s.flows[free-1].next {
			used++
		}
		if used != len(s.flows) {
			t.Errorf("shard %d: %d of %d entries are used or free", i, used, len(s.flows))
		}
	}
}

// TestFilterSetPeers: flows of a peer that goes, or loses a prefix, end; others stay.
func TestFilterSetPeers(t *testing.T) {
	f := newFilterTest(t, FilterRule{Deny: true, Peer: "evil"}, FilterRule{Direction: Outbound})
	toB, toC := udpOut(1, 2), packetOut(true, 0, 1, 2, 3)
	fromB, fromC := udpIn(2, 1), packetIn(true, 0, 2, 1, 3)
	f.must(true, Outbound, "b", toB...)
	f.must(true, Outbound, "c", toC...)
	if err := f.SetPeers(filterPeers[:1]); err != nil {
		t.Fatal(err)
	}
	f.must(true, Inbound, "b", fromB...)
	f.must(false, Inbound, "c has gone", fromC...)
	if n := f.Stats().Flows; n != 2 {
		t.Errorf("%d flows, want those of b", n)
	}
	if err := f.SetPeers([]FilterPeer{filterPeers[0], {ID: "evil", Prefixes: prefixes("10.0.0.2/32")}}); err != nil {
		t.Fatal(err)
	}
	f.must(false, Inbound, "IPv4 belongs to another", fromB[0])
	f.must(true, Inbound, "IPv6 does not", fromB[1])
	f.must(false, Outbound, "denied", toB[0])
	if err := f.SetPeers([]FilterPeer{{}}); err == nil {
		t.Fatal("no error")
	}
	f.must(true, Inbound, "as before the mistake", fromB[1])
	if n := f.Stats().Rules[1].Flows; n != 4 {
		t.Errorf("%d flows counted, want 4: the counters stay", n)
	}
}

func TestFilterStats(t *testing.T) {
	f := newFilterTest(t, FilterRule{Deny: true, Protocol: "udp"}, FilterRule{Direction: Outbound})
	out, in := tcpOut(syn, 1, 2)[0], tcpIn(syn|ack, 2, 1)[0]
	n := uint64(len(out))
	f.must(true, Outbound, "SYN", out)
	f.must(true, Outbound, "SYN", out)
	f.must(true, Inbound, "SYN ACK", in)
	f.must(false, Outbound, "UDP", udpOut(1, 2)[0])
	f.must(false, Inbound, "SYN", tcpIn(syn, 5, 6)[0])
	f.must(false, Inbound, "RST", tcpIn(rst, 5, 6)[0])
	want := FilterStats{
		Rules: []FilterRuleStats{
			{Outbound: FilterCount{1, uint64(len(udpOut(1, 2)[0]))}},
			{Flows: 1, Outbound: FilterCount{2, 2 * n}, Inbound: FilterCount{1, n}},
		},
		Flows: 1, Limit: DefaultFlows, LimitPerPeer: DefaultFlows / 4,
		Known: FilterCount{2, 2 * n}, NoRule: FilterCount{1, n}, Unknown: FilterCount{1, n},
	}
	got := f.Stats()
	if got.Rules[0] != want.Rules[0] || got.Rules[1] != want.Rules[1] {
		t.Errorf("got  %+v\nwant %+v", got.Rules, want.Rules)
	}
	got.Rules, want.Rules = nil, nil
	if got.Flows != want.Flows || got.Limit != want.Limit || got.LimitPerPeer != want.LimitPerPeer ||
		got.Known != want.Known || got.NoRule != want.NoRule || got.Unknown != want.Unknown || got.Full != want.Full {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestFilterRace: many goroutines, while the peers change.
func TestFilterRace(t *testing.T) {
	f := newFilterTestOf(t, FilterOptions{Rules: []FilterRule{{Direction: Outbound}}, Peers: filterPeers, Flows: 300})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				own, host := uint16(i%200), byte(2+i%2)
				for _, p := range []struct {
					d Direction
					b []byte
				}{{Outbound, packetOut(g%2 == 0, syn, own, 80, host)[g/2]}, {Inbound, packetIn(g%2 == 0, ack, 80, own, host)[g/2]}} {
					l, _ := locate(p.b, len(p.b))
					f.judge(p.b, &l, len(p.b), p.d, int64(i)*int64(time.Second)/10)
				}
			}
		})
	}
	for i := range 200 {
		if err := f.SetPeers(filterPeers[i%2:]); err != nil {
			t.Fatal(err)
		}
		f.Stats()
	}
	wg.Wait()
	f.wait(time.Hour * 24)
	f.sweepSome(f.now)
	if n := f.Stats().Flows; n != 0 {
		t.Errorf("%d flows are left", n)
	}
	for id, p := range f.peers {
		if n := p.flows.Load(); n != 0 {
			t.Errorf("peer %s has %d flows left", id, n)
		}
	}
}

// TestFilterDevice: a Wrapper asks its filter once for a superpacket, before NAT outbound and after it
// inbound, and counts what does not pass.
func TestFilterDevice(t *testing.T) {
	f, err := NewFilter(FilterOptions{
		Rules: []FilterRule{{Direction: Outbound, Protocol: "tcp", Ports: ports(443), From: prefixes("10.0.0.1/32", "fd00::1/128")}},
		Peers: filterPeers,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, v6 := range []bool{false, true} {
		link := &fakeLink{}
		w := New(link, Options{})
		w.SetFilter(f)
		if err := w.SetNAT([]NATRule{rule("10.0.0.1", "172.31.255.1", "10.0.0.2/32"), rule("fd00::1", "2001:db8:5::1", "fd00::2/128")}); err != nil {
			t.Fatal(err)
		}
		before := f.Stats()
		super := spec{v6: v6, df: true, sport: 1000, dport: 443, flags: ack, payload: payload(9000)}
		next := super
		next.seq += 9000
		refused := super
		refused.dport = 80
		refusedNext := next
		refusedNext.dport = 80
		small := spec{v6: v6, udp: true, sport: 1, dport: 443, payload: payload(5)}
		for _, s := range []spec{super, next, refused, refusedNext} {
			link.queue = append(link.queue, outboundPacket(s.partial(), s.hdrLen(), s.gso(1000)))
		}
		link.queue = append(link.queue, outboundPacket(small.full(), small.hdrLen(), GSO{}))
		if got := readAll(t, w, 64, 1500); len(got) != 18 {
			t.Errorf("%d segments, want 18", len(got))
		}
		if d := w.Drops(); d[DropFilter] != 3 || d.Total() != 3 {
			t.Errorf("drops %v, want 3 of the filter", d)
		}

		outside := netip.MustParseAddr([]string{"172.31.255.1", "2001:db8:5::1"}[b2i(v6)])
		answer := spec{v6: v6, df: true, src: hostAddr(v6, 2), dst: outside, sport: 443, dport: 1000, flags: ack, payload: payload(5000)}
		other := answer
		other.dport = 1001
		var lengths []int
		link.delivered = func(pkt *stack.PacketBuffer) { lengths = append(lengths, pkt.Size()) }
		in := append(answer.plainSegments(1000), other.plainSegments(1000)...)
		for i := range in {
			in[i] = append(make([]byte, headroom), in[i]...)
		}
		if _, err := w.Write(in, headroom); err != nil {
			t.Fatal(err)
		}
		if len(lengths) != 1 || lengths[0] != answer.hdrLen()+5000 {
			t.Errorf("delivered %v, want one superpacket", lengths)
		}
		if d := w.Drops(); d[DropFilter] != 8 {
			t.Errorf("drops %v, want 5 more", d)
		}
		if n := w.Stats().Inbound.Packets; n != 1 {
			t.Errorf("%d packets delivered by the counters, want 1", n)
		}
		after := f.Stats().Rules[0]
		if n := after.Outbound.Packets - before.Rules[0].Outbound.Packets; n != 1 {
			t.Errorf("the filter saw %d packets outbound, want 1 of two joined superpackets", n)
		}
		if n := after.Outbound.Bytes - before.Rules[0].Outbound.Bytes; n != uint64(super.hdrLen()+18000) {
			t.Errorf("%d bytes outbound", n)
		}
		if n := after.Inbound.Packets - before.Rules[0].Inbound.Packets; n != 1 {
			t.Errorf("the filter saw %d packets inbound, want 1", n)
		}
		w.Close()
	}
}

// Without flows the rules decide about each packet by its addresses, and nothing is remembered.
func TestFilterStateless(t *testing.T) {
	f := newFilterTestOf(t, FilterOptions{Stateless: true, Peers: filterPeers, Rules: []FilterRule{
		{To: prefixes("10.0.0.1/32", "fd00::1/128")},
		{Deny: true, Direction: Inbound, To: prefixes("10.0.0.0/24", "fd00::/64")},
		{Peer: "b"},
		{Direction: Outbound, To: prefixes("10.0.0.3/32")},
	}})
	f.must(true, Inbound, "to this node", udpIn(9, 53)...)
	f.must(true, Outbound, "and back", reversed(udpIn(9, 53))...)
	f.must(true, Outbound, "reset of nothing", packetOut(false, flagRST, 1000, 80, 2)...)
	f.must(true, Inbound, "answer to nobody's ping", pingIn(2, 1)...)
	f.must(false, Inbound, "from peer to peer", (&spec{udp: true, src: hostAddr(false, 2), dst: hostAddr(false, 3), payload: payload(9)}).full())
	fragments := fragmentsOf((&spec{udp: true, src: nodeAddr(false), dst: hostAddr(false, 3), payload: payload(3000)}).full(), 1000, 2)
	f.must(true, Outbound, "fragments in any order", fragments[1], fragments[0])
	f.must(false, Outbound, "over IPv6, by no rule", (&spec{v6: true, udp: true, src: nodeAddr(true), dst: hostAddr(true, 3), payload: payload(9)}).full())
	f.must(true, Inbound, "an error about nothing", icmpOf(2, 1, 3, 1, 3, quotes(udpIn(9, 53), 48)...)...)
	for i := range 2 * DefaultFlows {
		f.must(true, Inbound, "one of many", (&spec{udp: true, sport: uint16(i), dport: uint16(i >> 16), src: hostAddr(false, 2), dst: nodeAddr(false)}).full())
	}
	if s := f.Stats(); s.Flows != 0 || s.Known.Packets != 0 || s.Rules[1].Inbound.Packets != 1 || s.NoRule.Packets != 1 || s.Full.Packets != 0 {
		t.Errorf("%+v", s)
	}
	if _, err := NewFilter(FilterOptions{Stateless: true, Rules: []FilterRule{{Protocol: "tcp"}}}); !errors.Is(err, ErrFilterRule) {
		t.Errorf("with a protocol: %v", err)
	}
}
