package tunwrap

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// pieces cuts s into packets with payloads of the sizes, as a stack would send them; the rest goes
// into the last. Only the last keeps FIN.
func (s *spec) pieces(sizes ...int) []spec {
	var out []spec
	left, seq := s.payload, s.seq
	for i := 0; len(left) > 0; i++ {
		n := len(left)
		if i < len(sizes) {
			n = min(sizes[i], n)
		}
		p := *s
		p.payload, p.seq, p.id = left[:n], seq, s.id+uint16(100*i)
		left, seq = left[n:], seq+uint32(n)
		if len(left) > 0 {
			p.flags &^= fin
		}
		out = append(out, p)
	}
	return out
}

// readSpecs reads what comes of the packets, queued at once, in buffers of batch.
func readSpecs(t testing.TB, specs []spec, mss, batch int) ([][]byte, Stats) {
	t.Helper()
	link := &fakeLink{}
	for i := range specs {
		link.queue = append(link.queue, outboundPacket(specs[i].partial(), specs[i].hdrLen(), specs[i].gso(mss)))
	}
	w := New(link, Options{})
	defer w.Close()
	got := readAll(t, w, batch, 2000)
	if d := w.Drops(); d.Total() != 0 {
		t.Errorf("drops: %v", d)
	}
	return got, w.Stats()
}

func joinable() map[string]spec {
	body := payload(30000)
	return map[string]spec{
		"v4":            {df: true, id: 0xfff0, seq: 0xffffff00, ack: 7, flags: ack, window: 500, tcpOptions: timestamps, payload: body},
		"v4 push":       {df: true, flags: ack | psh, payload: body},
		"v4 fin":        {df: true, flags: ack | psh | fin, payload: body},
		"v6":            {v6: true, label: 9, seq: 0xffffff00, ack: 7, flags: ack, window: 500, tcpOptions: timestamps, payload: body},
		"v6 push, fin":  {v6: true, flags: ack | psh | fin, payload: body},
		"no timestamps": {df: true, tos: 0x28, flags: ack, payload: body},
	}
}

// Packets that continue each other are split as if the stack had sent one.
func TestJoin(t *testing.T) {
	const mss = 1348
	cuts := map[string][]int{
		"halves":            {15000},
		"writes of 4 KiB":   {4096, 4096, 4096, 4096, 4096, 4096, 4096},
		"small writes":      slices.Repeat([]int{100}, 100),
		"one byte":          {1, 1, 1},
		"a full segment":    {mss},
		"all but the last":  {29999},
		"at segment bounds": {mss * 5, mss * 5},
	}
	for name, s := range joinable() {
		for cutName, sizes := range cuts {
			for _, batch := range []int{1, 7, 128} {
				t.Run(fmt.Sprintf("%s/%s/%d", name, cutName, batch), func(t *testing.T) {
					got, st := readSpecs(t, s.pieces(sizes...), mss, batch)
					if err := differ(got, s.plainSegments(mss)); err != nil {
						t.Error(err)
					}
					if st.Outbound.Superpackets != 1 || st.Outbound.Packets != uint64(len(s.pieces(sizes...))) {
						t.Errorf("%+v", st.Outbound)
					}
				})
			}
		}
	}
}

// What differs in anything that splitting does not set stays apart.
func TestJoinKeepsApart(t *testing.T) {
	const mss = 1000
	for name, change := range map[string]func(a, b *spec){
		"gap":             func(_, b *spec) { b.seq++ },
		"overlap":         func(_, b *spec) { b.seq-- },
		"ack":             func(_, b *spec) { b.ack++ },
		"window":          func(_, b *spec) { b.window++ },
		"source port":     func(_, b *spec) { b.sport++ },
		"port":            func(_, b *spec) { b.dport++ },
		"TOS":             func(_, b *spec) { b.tos = 4 },
		"TTL":             func(_, b *spec) { b.ttl = 3 },
		"timestamp":       func(_, b *spec) { b.tcpOptions = slices.Clone(b.tcpOptions); b.tcpOptions[11]++ },
		"options":         func(_, b *spec) { b.tcpOptions = nil },
		"CWR":             func(a, _ *spec) { a.flags |= 0x80 },
		"second CWR":      func(_, b *spec) { b.flags |= 0x80 },
		"ECE":             func(_, b *spec) { b.flags |= 0x40 },
		"URG":             func(_, b *spec) { b.flags |= 0x20 },
		"FIN in between":  func(a, _ *spec) { a.flags |= fin },
		"no payload":      func(_, b *spec) { b.payload = nil },
		"nothing at all":  func(a, b *spec) { a.payload, b.seq = nil, a.seq },
		"more than 64 KB": func(a, b *spec) { a.payload, b.seq = payload(64000), a.seq+64000 },
	} {
		for _, v6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/%v", name, v6), func(t *testing.T) {
				s := spec{v6: v6, df: !v6, flags: ack, window: 9, tcpOptions: timestamps, payload: payload(5000)}
				p := s.pieces(2500)
				change(&p[0], &p[1])
				got, _ := readSpecs(t, p, mss, 128)
				if err := differ(got, append(p[0].plainSegments(mss), p[1].plainSegments(mss)...)); err != nil {
					t.Error(err)
				}
			})
		}
	}
	t.Run("no DF", func(t *testing.T) {
		s := spec{flags: ack, payload: payload(5000)}
		p := s.pieces(2500)
		got, _ := readSpecs(t, p, mss, 128)
		if err := differ(got, append(p[0].plainSegments(mss), p[1].plainSegments(mss)...)); err != nil {
			t.Error(err)
		}
	})
}

// Translated after they are joined, the segments are those of one translated packet.
func TestJoinNAT(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		s := spec{v6: v6, df: !v6, flags: ack | psh, payload: payload(20000)}
		src, dst := s.addrs()
		rule := NATRule{Peer: []netip.Prefix{netip.PrefixFrom(dst, dst.BitLen())}, Inside: src, Outside: src.Next().Next().Next()}
		link := &fakeLink{}
		for _, p := range s.pieces(4096, 4096, 4096) {
			link.queue = append(link.queue, outboundPacket(p.partial(), p.hdrLen(), p.gso(1348)))
		}
		w := New(link, Options{})
		if err := w.SetNAT([]NATRule{rule}); err != nil {
			t.Fatal(err)
		}
		want := s
		want.src = rule.Outside
		if err := differ(readAll(t, w, 128, 2000), want.plainSegments(1348)); err != nil {
			t.Error(err)
		}
		w.Close()
	}
}

// Whatever the packets and their order: every flow's payload comes out whole and in order, in
// segments that fit and whose checksums gVisor accepts.
func FuzzJoin(f *testing.F) {
	f.Add(uint64(1), uint16(1348), uint8(3), uint8(1))
	f.Add(uint64(2), uint16(536), uint8(40), uint8(3))
	f.Add(uint64(3), uint16(1), uint8(2), uint8(1))
	f.Fuzz(func(t *testing.T, seed uint64, mss uint16, packets, flows uint8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		size := int(mss)%1400 + 1
		n, k := int(packets)%60+1, int(flows)%4+1
		state := make([]spec, k)
		want := make([][]byte, k)
		for i := range state {
			state[i] = spec{v6: i%2 == 1, df: rng.IntN(4) > 0, sport: uint16(i), dport: 80, seq: rng.Uint32(), flags: ack, window: 100}
			if rng.IntN(2) == 0 {
				state[i].tcpOptions = timestamps
			}
		}
		var specs []spec
		for range n {
			i := rng.IntN(k)
			s := &state[i]
			p := *s
			p.payload = payload(rng.IntN(min(size*5, 4000)))
			for j := range p.payload {
				p.payload[j] = byte(rng.Uint32())
			}
			if rng.IntN(3) == 0 {
				p.flags |= psh
			}
			if rng.IntN(10) == 0 {
				s.ack++
			}
			if rng.IntN(10) == 0 {
				p.flags |= 0x80
			}
			s.seq += uint32(len(p.payload))
			s.id++
			want[i] = append(want[i], p.payload...)
			specs = append(specs, p)
		}
		got, _ := readSpecs(t, specs, size, rng.IntN(130)+1)
		have := make([][]byte, k)
		next := make([]uint32, k)
		for i := range next {
			next[i] = state[i].seq - uint32(len(want[i]))
		}
		for _, b := range got {
			if err := valid(b); err != nil {
				t.Fatal(err)
			}
			l, d := locate(b, len(b))
			if d != DropNone || l.total != len(b) {
				t.Fatalf("%v, total %d of %d", d, l.total, len(b))
			}
			tcp := header.TCP(b[l.l4:])
			i := int(tcp.SourcePort())
			body := b[l.l4+int(tcp.DataOffset()):]
			if len(body) > size || tcp.SequenceNumber() != next[i] {
				t.Fatalf("flow %d: %d bytes at %d, want at %d at most %d", i, len(body), tcp.SequenceNumber(), next[i], size)
			}
			next[i] += uint32(len(body))
			have[i] = append(have[i], body...)
		}
		for i := range want {
			if !slices.Equal(have[i], want[i]) {
				t.Fatalf("flow %d: %d bytes came out of %d", i, len(have[i]), len(want[i]))
			}
		}
	})
}

// Joining allocates nothing.
func TestJoinAllocs(t *testing.T) {
	s := spec{df: true, flags: ack, tcpOptions: timestamps, payload: payload(61440)}
	link := &fakeLink{}
	for _, p := range s.pieces(slices.Repeat([]int{4096}, 15)...) {
		link.forever = append(link.forever, outboundPacket(p.partial(), p.hdrLen(), p.gso(1348), 1000))
	}
	w := New(link, Options{})
	bufs, sizes := buffers(46, 1500)
	if n := testing.AllocsPerRun(200, func() {
		if n, err := w.Read(bufs, sizes, headroom); n != 46 || err != nil {
			t.Fatal(n, err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	packets := link.forever
	w.Close()
	for _, p := range packets {
		p.DecRef()
	}
}
