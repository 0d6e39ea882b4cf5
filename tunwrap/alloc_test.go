//go:build !race

package tunwrap

import (
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Neither direction allocates in steady state: not per packet, and not per batch.
func TestAllocs(t *testing.T) {
	rules := []NATRule{
		rule("10.0.0.1", "172.31.255.1", "10.0.0.0/24"), rule("fd00::1", "2001:db8:5::1", "fd00::/64"),
		rule("172.31.255.2", "10.0.0.2", "10.0.0.0/24"),
	}
	for name, nat := range map[string][]NATRule{"no NAT": nil, "NAT": rules, "filter": nil} {
		t.Run(name, func(t *testing.T) {
			var filter *Filter
			if name == "filter" {
				var err error
				if filter, err = NewFilter(FilterOptions{Rules: []FilterRule{{Direction: Outbound}, {Direction: Inbound}}}); err != nil {
					t.Fatal(err)
				}
			}
			pkts, _ := mixed()
			w := New(&fakeLink{forever: pkts}, Options{})
			w.SetFilter(filter)
			if err := w.SetNAT(nat); err != nil {
				t.Fatal(err)
			}
			bufs, sizes := buffers(100, 1500)
			if n := testing.AllocsPerRun(200, func() {
				if n, err := w.Read(bufs, sizes, headroom); n == 0 || err != nil {
					t.Fatal(n, err)
				}
			}); n != 0 {
				t.Errorf("Read: %v allocations", n)
			}
			w.Close()
			for _, p := range pkts {
				p.DecRef()
			}

			link := &fakeLink{delivered: func(*stack.PacketBuffer) {}}
			w = New(link, Options{})
			w.SetFilter(filter)
			if err := w.SetNAT(nat); err != nil {
				t.Fatal(err)
			}
			var in, scratch [][]byte
			for f := range uint16(8) {
				for _, v6 := range []bool{false, true} {
					s := spec{v6: v6, sport: f, flags: ack | psh, tcpOptions: timestamps, payload: payload(9000)}
					in = append(in, s.plainSegments(1348)...)
				}
				s := spec{udp: true, sport: f, payload: payload(1000)}
				in = append(in, s.full())
			}
			for _, b := range in {
				scratch = append(scratch, make([]byte, headroom+len(b)))
			}
			if n := testing.AllocsPerRun(200, func() {
				for i, b := range in {
					copy(scratch[i][headroom:], b)
				}
				if _, err := w.Write(scratch, headroom); err != nil {
					t.Fatal(err)
				}
			}); n != 0 {
				t.Errorf("Write: %v allocations", n)
			}
			if d := w.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
			w.Close()
		})
	}
}

// The filter allocates nothing for packets of known flows, refused packets, and new flows once the table
// has the size that its limit gives it.
func TestFilterAllocs(t *testing.T) {
	f := newFilterTestOf(t, FilterOptions{Rules: tenRules(), Peers: filterPeers, Flows: 1000, FlowsPerPeer: 500})
	known, refused := tcpOut(ack, 1, 443), tcpIn(syn, 1, 23)
	about := icmpOf(2, 1, 3, 1, 1, quotes(known, 48)...)
	frags := fragmentsOf(udpOut(1, 443)[1], 8, 1)
	f.must(true, Outbound, "known", known...)
	judge := func(want Drop, d Direction, packets ...[]byte) {
		for _, b := range packets {
			l, _ := locate(b, len(b))
			if got := f.judge(b, &l, len(b), d, f.now); got != want {
				t.Fatalf("%v, want %v", got, want)
			}
		}
	}
	for name, round := range map[string]func(){
		"known": func() {
			judge(DropNone, Outbound, known...)
			judge(DropNone, Inbound, about...)
		},
		"refused":   func() { judge(DropFilter, Inbound, refused...) },
		"fragments": func() { judge(DropNone, Outbound, frags...) },
	} {
		if n := testing.AllocsPerRun(100, round); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}

	begin, own := tcpOut(syn, 1, 443)[0], uint16(0)
	flood := func() { // up to the limit, then all of it ends
		for range 1000 {
			own++
			begin[20], begin[21] = byte(own>>8), byte(own)
			l, _ := locate(begin, len(begin))
			f.judge(begin, &l, len(begin), Outbound, f.now)
		}
		f.wait(patienceBegun + time.Second)
	}
	for range 100 {
		flood() // ever more uneven numbers of flows meet in a shard
	}
	if n := testing.AllocsPerRun(50, flood); n > 1 {
		t.Errorf("%v allocations for 500 flows that begin and end", n)
	}
	if n := f.Stats().Rules[9].Flows; n < 50000 {
		t.Errorf("%d flows have begun", n)
	}
}

func TestForkAllocatesNothing(t *testing.T) {
	drop := writerFunc(func(bufs [][]byte, _ int) (int, error) { return len(bufs), nil })
	f := NewFork(ForkOptions{Stack: drop, Kernel: drop, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}})
	frags := pieces(t, udpSpec("10.0.0.2", 53), 1)
	bufs := append([][]byte{
		udpSpec("10.0.0.2", 53).full(), udpSpec("10.0.0.2", 65000).full(), tcpSpec("fd00::2", 1).full(),
		quoting("fd00::2", sentFrom("fd00::2", false, 80)),
	}, frags...)
	if n := testing.AllocsPerRun(100, func() { f.Write(bufs, 0) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
