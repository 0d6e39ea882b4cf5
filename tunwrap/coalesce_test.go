package tunwrap

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A delivery is what became of some packets: the superpacket (or the packet) and what the
// coalescer says about it.
type delivery struct {
	b       []byte
	members int
	gso     GSO
}

// coalesced runs the packets, which must be valid, through a coalescer. It leaves them as they are.
func coalesced(t testing.TB, c *coalescer, packets [][]byte) []delivery {
	t.Helper()
	c.begin(len(packets))
	for i, p := range packets {
		b, l, d := verify(bytes.Clone(p))
		if d != DropNone {
			t.Fatalf("packet %d is bad: %v", i, d)
		}
		c.add(b, &l)
	}
	var out []delivery
	for i := range c.groups {
		g := &c.groups[i]
		d := delivery{members: int(g.count)}
		if g.count > 1 {
			d.gso = c.merge(g)
		}
		pkt := packetBuffer(c, g)
		d.b = bytesOf(pkt)
		pkt.DecRef()
		out = append(out, d)
	}
	c.end()
	return out
}

// resplit takes deliveries apart again, the way a kernel would that is handed the GSO metadata.
func resplit(t testing.TB, ds []delivery) [][]byte {
	t.Helper()
	var out [][]byte
	for _, d := range ds {
		if d.members == 1 {
			out = append(out, d.b)
			continue
		}
		segs := split(t, d.b, d.gso, nil, nil)
		if len(segs) != d.members {
			t.Fatalf("%d segments coalesced, %d when split again", d.members, len(segs))
		}
		out = append(out, segs...)
	}
	return out
}

// normal returns b without what coalescing may lose: the ID of a packet with DF, and the difference
// between the two forms of zero in a TCP checksum.
func normal(b []byte) []byte {
	b = bytes.Clone(b)
	if header.IPVersion(b) == 4 {
		if h := header.IPv4(b); h.Flags()&header.IPv4FlagDontFragment != 0 {
			h.SetID(0)
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
	}
	if l, d := locate(b, len(b)); d == DropNone && l.proto == protoTCP && !l.fragment {
		if f := b[l.l4+tcpChecksum:]; f[0] == 0xff && f[1] == 0xff {
			f[0], f[1] = 0, 0
		}
	}
	return b
}

// flowOf tells flows apart for the tests.
func flowOf(b []byte) string {
	l, _ := locate(b, len(b))
	k := fmt.Sprintf("%d/%x", l.version, l.addresses(b))
	if !l.fragment && (l.proto == protoTCP || l.proto == protoUDP) {
		k += fmt.Sprintf("/%d/%x", l.proto, b[l.l4:l.l4+4])
	}
	return k
}

func byFlow(packets [][]byte) map[string][][]byte {
	m := map[string][][]byte{}
	for _, p := range packets {
		m[flowOf(p)] = append(m[flowOf(p)], normal(p))
	}
	return m
}

// sameStreams checks that both lists have the same packets in each flow, in the same order.
func sameStreams(got, want [][]byte) error {
	g, w := byFlow(got), byFlow(want)
	if len(g) != len(w) {
		return fmt.Errorf("%d flows, want %d", len(g), len(w))
	}
	for k := range w {
		if err := differ(g[k], w[k]); err != nil {
			return fmt.Errorf("flow %s: %w", k, err)
		}
	}
	return nil
}

// coalesce(segment(x)) == x, byte for byte, wherever every segment may be coalesced.
func TestCoalesceReversesSegment(t *testing.T) {
	c := coalescer{udp: true}
	for _, sc := range segmentCases() {
		if sc.spec.udp && sc.want > maxUDPMembers {
			continue
		}
		if sc.spec.flags&(fin|urg) != 0 || sc.want == 1 || !sc.spec.v6 && len(sc.spec.ipExtra) > 0 {
			continue
		}
		t.Run(sc.name, func(t *testing.T) {
			got := coalesced(t, &c, sc.spec.plainSegments(sc.size))
			if len(got) != 1 {
				t.Fatalf("%d packets", len(got))
			}
			if want := sc.spec.partial(); !bytes.Equal(got[0].b, want) {
				t.Errorf("\n got %x\nwant %x", got[0].b[:140], want[:140])
			}
			g := sc.spec.gso(sc.size)
			g.HdrLen, g.CsumStart = uint16(sc.spec.hdrLen()), uint16(sc.spec.l4Offset())
			if sc.spec.flags&cwr != 0 {
				g.Type |= GSOECN
			}
			if got[0].gso != g {
				t.Errorf("GSO %+v, want %+v", got[0].gso, g)
			}
		})
	}
}

func TestCoalesceRules(t *testing.T) {
	const size = 100
	base := spec{
		sport: 5, dport: 6, seq: 1000, ack: 9, flags: ack, window: 99, tcpOptions: timestamps,
		tos: 2, ttl: 60, id: 7, payload: payload(size),
	}
	// nth is the n-th packet of a run, with a change.
	nth := func(v6 bool, n int, change func(*spec)) []byte {
		s := base
		s.v6 = v6
		s.seq += uint32(n * size)
		s.id += uint16(n)
		s.payload = payload(size * (n + 1))[n*size:]
		if change != nil {
			change(&s)
		}
		return s.full()
	}
	otherTS := bytes.Clone(timestamps)
	otherTS[7]++
	for _, c := range []struct {
		name   string
		change func(*spec) // of the middle one of three packets
		want   []int       // members of each delivery
		only   int         // IP version, 0 for both
		first  func(*spec)
	}{
		{name: "plain", want: []int{3}},
		{name: "PSH", change: func(s *spec) { s.flags |= psh }, want: []int{2, 1}},
		{name: "shorter", change: func(s *spec) { s.payload = s.payload[:99] }, want: []int{2, 1}},
		{name: "longer", change: func(s *spec) { s.payload = payload(101) }, want: []int{1, 1, 1}},
		{name: "no payload", change: func(s *spec) { s.payload = nil }, want: []int{1, 1, 1}},
		{name: "FIN", change: func(s *spec) { s.flags |= fin }, want: []int{1, 1, 1}},
		{name: "SYN", change: func(s *spec) { s.flags |= syn }, want: []int{1, 1, 1}},
		{name: "RST", change: func(s *spec) { s.flags |= rst }, want: []int{1, 1, 1}},
		{name: "URG", change: func(s *spec) { s.flags |= urg }, want: []int{1, 1, 1}},
		{name: "no ACK", change: func(s *spec) { s.flags = 0 }, want: []int{1, 1, 1}},
		{name: "ECE", change: func(s *spec) { s.flags |= ece }, want: []int{1, 1, 1}},
		{name: "CWR", change: func(s *spec) { s.flags |= cwr }, want: []int{1, 2}},
		{name: "ACK number", change: func(s *spec) { s.ack++ }, want: []int{1, 1, 1}},
		{name: "window", change: func(s *spec) { s.window++ }, want: []int{1, 1, 1}},
		{name: "urgent pointer", change: func(s *spec) { s.urgent++ }, want: []int{1, 1, 1}},
		{name: "gap", change: func(s *spec) { s.seq++ }, want: []int{1, 1, 1}},
		{name: "overlap", change: func(s *spec) { s.seq-- }, want: []int{1, 1, 1}},
		{name: "timestamp", change: func(s *spec) { s.tcpOptions = otherTS }, want: []int{1, 1, 1}},
		{name: "no options", change: func(s *spec) { s.tcpOptions = nil }, want: []int{1, 1, 1}},
		{name: "TTL", change: func(s *spec) { s.ttl-- }, want: []int{1, 1, 1}},
		{name: "CE", change: func(s *spec) { s.tos |= 3 }, want: []int{1, 1, 1}},
		{name: "DSCP", change: func(s *spec) { s.tos |= 0x40 }, want: []int{1, 1, 1}},
		{name: "flow label", change: func(s *spec) { s.label++ }, want: []int{1, 1, 1}, only: 6},
		{name: "extension header", change: func(s *spec) { s.ipExtra, s.ext = hopByHop, 0 }, want: []int{1, 1, 1}, only: 6},
		{name: "DF", change: func(s *spec) { s.df = true }, want: []int{1, 1, 1}, only: 4},
		{name: "ID", change: func(s *spec) { s.id += 5 }, want: []int{1, 1, 1}, only: 4},
		{name: "IP options", change: func(s *spec) { s.ipExtra = ip4Options }, want: []int{1, 1, 1}, only: 4},
		{name: "source", change: func(s *spec) { s.src = s.otherHost() }, want: []int{2, 1}},
		{name: "destination", change: func(s *spec) { s.dst = s.otherHost() }, want: []int{2, 1}},
		{name: "source port", change: func(s *spec) { s.sport++ }, want: []int{2, 1}},
		{name: "destination port", change: func(s *spec) { s.dport++ }, want: []int{2, 1}},
		{name: "UDP", change: func(s *spec) { s.udp = true }, want: []int{2, 1}},
		{name: "first with PSH", first: func(s *spec) { s.flags |= psh }, want: []int{1, 2}},
		{name: "first with CWR", first: func(s *spec) { s.flags |= cwr }, want: []int{3}},
		{name: "first with FIN", first: func(s *spec) { s.flags |= fin }, want: []int{1, 2}},
	} {
		for _, v6 := range []bool{false, true} {
			if c.only == 4 && v6 || c.only == 6 && !v6 {
				continue
			}
			t.Run(fmt.Sprintf("%s/v6=%v", c.name, v6), func(t *testing.T) {
				in := [][]byte{nth(v6, 0, c.first), nth(v6, 1, c.change), nth(v6, 2, nil)}
				// A packet of another flow in between changes nothing.
				// If the middle one does not belong, the third does not continue the first.
				if c.name == "source" || c.name == "destination" || c.name == "source port" || c.name == "destination port" || c.name == "UDP" {
					in[2] = nth(v6, 1, nil)
				}
				var co coalescer
				got := coalesced(t, &co, in)
				var members []int
				for _, d := range got {
					members = append(members, d.members)
				}
				if fmt.Sprint(members) != fmt.Sprint(c.want) {
					t.Errorf("coalesced as %v, want %v", members, c.want)
				}
				if err := sameStreams(resplit(t, got), in); err != nil {
					t.Error(err)
				}
			})
		}
	}

	t.Run("IDs with DF do not matter", func(t *testing.T) {
		var co coalescer
		got := coalesced(t, &co, [][]byte{
			nth(false, 0, func(s *spec) { s.df, s.id = true, 0 }),
			nth(false, 1, func(s *spec) { s.df, s.id = true, 0 }),
			nth(false, 2, func(s *spec) { s.df, s.id = true, 77 }),
		})
		if len(got) != 1 {
			t.Errorf("%d packets", len(got))
		}
	})
	t.Run("extension headers must be equal", func(t *testing.T) {
		var in [][]byte
		for i := range 3 {
			in = append(in, nth(true, i, func(s *spec) { s.ipExtra, s.ext = bytes.Clone(hopByHop), 0; s.ipExtra[5] = byte(i / 2) }))
		}
		var co coalescer
		if got := coalesced(t, &co, in); len(got) != 2 || got[0].members != 2 {
			t.Errorf("%d packets", len(got))
		}
	})
	t.Run("fragments stay alone", func(t *testing.T) {
		var in [][]byte
		for i := range 3 {
			b := nth(false, i, nil)
			b[6] = 0x20
			header.IPv4(b).SetChecksum(0)
			header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
			in = append(in, b)
		}
		for i := range 3 {
			in = append(in, nth(true, i, func(s *spec) { s.ipExtra, s.ext = atomicFrag, 44 }))
		}
		var co coalescer
		if got := coalesced(t, &co, in); len(got) != 6 {
			t.Errorf("%d packets", len(got))
		}
	})
	t.Run("at most 65535 bytes", func(t *testing.T) {
		for _, v6 := range []bool{false, true} {
			s := spec{v6: v6, flags: ack, payload: payload(60000)}
			in := s.plainSegments(1000)
			s.seq += 60000
			s.id += 60
			in = append(in, s.plainSegments(1000)...)
			var co coalescer
			got := coalesced(t, &co, in)
			if len(got) != 2 || got[0].members != 65 {
				t.Errorf("%d packets, the first of %d", len(got), got[0].members)
			}
			if err := sameStreams(resplit(t, got), in); err != nil {
				t.Error(err)
			}
		}
	})
}

// otherHost is an address that is neither source nor destination.
// What may become one superpacket of UDP.
func TestCoalesceUDPRules(t *testing.T) {
	const size = 100
	base := spec{udp: true, sport: 5, dport: 6, tos: 2, ttl: 60, id: 7}
	nth := func(v6 bool, n int, change func(*spec)) spec {
		s := base
		s.v6 = v6
		s.id += uint16(n)
		s.payload = payload(size * (n + 1))[n*size:]
		if change != nil {
			change(&s)
		}
		return s
	}
	for _, c := range []struct {
		name   string
		change func(*spec)  // of the middle one of three packets
		bytes  func([]byte) // likewise, of its UDP header
		want   []int        // members of each delivery
		only   int          // IP version, 0 for both
	}{
		{name: "plain", want: []int{3}},
		{name: "shorter", change: func(s *spec) { s.payload = s.payload[:99] }, want: []int{2, 1}},
		{name: "longer", change: func(s *spec) { s.payload = payload(101) }, want: []int{1, 2}},
		{name: "no payload", change: func(s *spec) { s.payload = nil }, want: []int{1, 1, 1}},
		{name: "TTL", change: func(s *spec) { s.ttl-- }, want: []int{1, 1, 1}},
		{name: "CE", change: func(s *spec) { s.tos |= 3 }, want: []int{1, 1, 1}},
		{name: "flow label", change: func(s *spec) { s.label++ }, want: []int{1, 1, 1}, only: 6},
		{name: "DF", change: func(s *spec) { s.df = true }, want: []int{1, 1, 1}, only: 4},
		{name: "ID", change: func(s *spec) { s.id += 5 }, want: []int{1, 1, 1}, only: 4},
		{name: "IP options", change: func(s *spec) { s.ipExtra = ip4Options }, want: []int{1, 1, 1}, only: 4},
		{name: "source port", change: func(s *spec) { s.sport++ }, want: []int{2, 1}},
		{name: "no checksum", bytes: func(b []byte) { b[6], b[7] = 0, 0 }, want: []int{1, 1, 1}, only: 4},
	} {
		for _, v6 := range []bool{false, true} {
			if c.only == 4 && v6 || c.only == 6 && !v6 {
				continue
			}
			t.Run(fmt.Sprintf("%s/v6=%v", c.name, v6), func(t *testing.T) {
				middle := nth(v6, 1, c.change)
				b := middle.full()
				if c.bytes != nil {
					c.bytes(b[middle.l4Offset():])
				}
				first, third := nth(v6, 0, nil), nth(v6, 2, nil)
				if c.name == "source port" {
					third = nth(v6, 1, nil)
				}
				in := [][]byte{first.full(), b, third.full()}
				co := coalescer{udp: true}
				got := coalesced(t, &co, in)
				var members []int
				for _, d := range got {
					members = append(members, d.members)
				}
				if fmt.Sprint(members) != fmt.Sprint(c.want) {
					t.Errorf("coalesced as %v, want %v", members, c.want)
				}
				if err := sameStreams(resplit(t, got), in); err != nil {
					t.Error(err)
				}
			})
		}
	}
	t.Run("no more than the kernel takes", func(t *testing.T) {
		s := spec{udp: true, payload: payload(100 * 10)}
		co := coalescer{udp: true}
		got := coalesced(t, &co, s.plainSegments(10))
		if len(got) != 2 || got[0].members != 64 || got[1].members != 36 {
			t.Errorf("%d packets, the first of %d", len(got), got[0].members)
		}
		s = spec{flags: ack, payload: payload(3000)}
		if got := coalesced(t, &co, s.plainSegments(1)); len(got) != 3 || got[0].members != maxMembers {
			t.Errorf("TCP: %d packets, the first of %d", len(got), got[0].members)
		}
	})
	t.Run("TCP and UDP of equal ports", func(t *testing.T) {
		tcp := spec{sport: 1, dport: 2, flags: ack, payload: payload(300)}
		udp := tcp
		udp.udp = true
		var in [][]byte
		for i, b := range tcp.plainSegments(100) {
			in = append(in, b, udp.plainSegments(100)[i])
		}
		co := coalescer{udp: true}
		if got := coalesced(t, &co, in); len(got) != 2 || got[0].members != 3 || got[1].members != 3 {
			t.Errorf("%d packets", len(got))
		}
	})
}

func (s *spec) otherHost() netip.Addr {
	src, _ := s.addrs()
	b := src.AsSlice()
	b[len(b)-1] = 99
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Many flows at once must each coalesce, whatever the order in which they mix.
func TestCoalesceFlows(t *testing.T) {
	for _, flows := range []int{1, 2, 8, 16, 100} {
		for _, v6 := range []bool{false, true} {
			var segs [][][]byte
			for f := range flows {
				s := spec{v6: v6, sport: uint16(1000 + f), dport: 443, flags: ack | psh, seq: uint32(f) << 28, df: true, payload: payload(1400 * 8)}
				segs = append(segs, s.plainSegments(1400))
			}
			var in [][]byte
			for i := range 8 {
				for f := range flows {
					in = append(in, segs[f][i])
				}
			}
			var c coalescer
			got := coalesced(t, &c, in)
			if len(got) != flows {
				t.Errorf("%d flows give %d packets", flows, len(got))
			}
			if err := sameStreams(resplit(t, got), in); err != nil {
				t.Error(err)
			}
		}
	}
}

// Epochs of the flow table must not leak one batch into the next, not even when they wrap.
func TestCoalesceEpochs(t *testing.T) {
	var c coalescer
	c.begin(4)
	c.epoch = 1<<32 - 3
	for i := range 6 {
		// A flow of its own each time, so that slots never used are met as well.
		s := spec{sport: uint16(i), flags: ack, payload: payload(2000)}
		segs := s.plainSegments(1000)
		for i := range segs {
			if got := coalesced(t, &c, segs[i:i+1]); len(got) != 1 || !bytes.Equal(got[0].b, segs[i]) {
				t.Fatal("changed")
			}
		}
		if got := coalesced(t, &c, segs); len(got) != 1 {
			t.Fatalf("%d packets", len(got))
		}
		if c.epoch == 0 {
			t.Fatal("0 is the epoch of slots never used")
		}
	}
	if c.epoch > 100 {
		t.Fatal("the epoch has not wrapped")
	}
}

// A writer in its pool must not keep the buffers of its last batch alive.
func TestWriterForgets(t *testing.T) {
	w := New(new(fakeLink), Options{})
	defer w.Close()
	s := spec{flags: ack, payload: payload(5000)}
	var x writer
	x.write(w, s.plainSegments(1000), 0)
	if len(x.coalescer.packets) != 5 {
		t.Fatalf("%d packets", len(x.coalescer.packets))
	}
	for i, m := range x.coalescer.packets {
		if m.b != nil {
			t.Errorf("packet %d", i)
		}
	}
}

// Write delivers what the coalescer makes.
func TestWriteDelivers(t *testing.T) {
	link := new(fakeLink)
	w := New(link, Options{})
	defer w.Close()
	var got [][]byte
	var protos []uint32
	link.delivered = func(pkt *stack.PacketBuffer) {
		got = append(got, bytesOf(pkt))
		protos = append(protos, uint32(pkt.NetworkProtocolNumber))
	}
	a := spec{sport: 1, flags: ack | psh, payload: payload(50000)}
	b := spec{v6: true, sport: 2, flags: ack, payload: payload(3000)}
	bad := a
	bad.sport = 9
	broken := bad.full()
	broken[len(broken)-1] ^= 1
	var bufs [][]byte
	for _, p := range append(append(a.plainSegments(1400), b.plainSegments(1000)...), broken) {
		bufs = append(bufs, append(make([]byte, headroom), p...))
	}
	bufs = append(bufs, make([]byte, headroom-1)) // shorter than the offset
	n, err := w.Write(bufs, headroom)
	if n != len(bufs) || err != nil {
		t.Fatalf("Write: %d, %v", n, err)
	}
	if err := differ(got, [][]byte{a.partial(), b.partial()}); err != nil {
		t.Error(err)
	}
	if fmt.Sprint(protos) != fmt.Sprint([]uint32{uint32(header.IPv4ProtocolNumber), uint32(header.IPv6ProtocolNumber)}) {
		t.Error(protos)
	}
	d := w.Drops()
	if d[DropTCPChecksum] != 1 || d[DropMalformed] != 1 || d.Total() != 2 {
		t.Errorf("drops %v", d)
	}
	s := w.Stats().Inbound
	if s.Segments != uint64(len(bufs)-1) || s.Packets != 2 || s.Superpackets != 2 {
		t.Errorf("%+v", s)
	}
}
