package tunwrap

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var (
	timestamps = []byte{1, 1, 8, 10, 0, 0, 1, 2, 3, 4, 5, 6}
	ip4Options = []byte{7, 7, 4, 0, 0, 0, 0, 0}  // record route, empty, end
	hopByHop   = []byte{6, 0, 5, 2, 0, 0, 1, 0}  // router alert, TCP next
	destOpts   = []byte{17, 0, 1, 4, 0, 0, 0, 0} // padding, UDP next
	longChain  = append([]byte{60, 3, 1, 28}, append(make([]byte, 28), 6, 0, 1, 4, 0, 0, 0, 0)...)
	atomicFrag = []byte{6, 0, 0, 0, 1, 2, 3, 4} // fragment header of a whole packet
)

const (
	fin = uint8(header.TCPFlagFin)
	syn = uint8(header.TCPFlagSyn)
	rst = uint8(header.TCPFlagRst)
	psh = uint8(header.TCPFlagPsh)
	ack = uint8(header.TCPFlagAck)
	urg = uint8(header.TCPFlagUrg)
	ece = uint8(0x40)
	cwr = uint8(0x80)
)

type segmentCase struct {
	name string
	spec spec
	size int
	want int // segments
}

func segmentCases() []segmentCase {
	var cs []segmentCase
	for _, v6 := range []bool{false, true} {
		name := []string{"IPv4", "IPv6"}[b2i(v6)]
		add := func(what string, s spec, size, want int) {
			s.v6 = v6
			if s.sport == 0 {
				s.sport, s.dport = 40000, 80
			}
			cs = append(cs, segmentCase{name + "/" + what, s, size, want})
		}
		tcp := spec{seq: 1000, ack: 77, flags: ack | psh, window: 500, tcpOptions: timestamps, id: 9}
		with := func(n int, f func(*spec)) spec {
			s := tcp
			s.payload = payload(n)
			if f != nil {
				f(&s)
			}
			return s
		}
		add("exact multiple", with(4200, nil), 1400, 3)
		add("odd tail", with(4201, nil), 1400, 4)
		add("odd size", with(4201, nil), 1399, 4)
		add("one segment", with(1000, nil), 1400, 1)
		add("exactly one", with(1400, nil), 1400, 1)
		add("two", with(1401, nil), 1400, 2)
		add("no payload", with(0, nil), 1400, 1)
		add("size one", with(5, nil), 1, 5)
		add("no options", with(5000, func(s *spec) { s.tcpOptions = nil }), 1448, 4)
		add("all options", with(5000, func(s *spec) { s.tcpOptions = bytes.Repeat([]byte{1}, 40) }), 1448, 4)
		add("FIN", with(5000, func(s *spec) { s.flags |= fin }), 1000, 5)
		add("CWR ECE", with(5000, func(s *spec) { s.flags |= cwr | ece }), 1000, 5)
		add("URG", with(5000, func(s *spec) { s.flags |= urg; s.urgent = 17 }), 1000, 5)
		add("sequence wraps", with(5000, func(s *spec) { s.seq = 1<<32 - 1500 }), 1000, 5)
		add("ID wraps", with(5000, func(s *spec) { s.id = 0xfffe }), 1000, 5)
		add("DF", with(5000, func(s *spec) { s.df = true; s.id = 0 }), 1000, 5)
		add("64K at the smallest MSS", with(65535-40-20-12, func(s *spec) { s.seq = 1<<32 - 9 }), 536-12, 125)
		add("64K at 88", with(65535-40-20-12, nil), 88, 744)
		add("ECT TOS label", with(5000, func(s *spec) { s.tos = 0xb9; s.label = 0xabcde; s.ttl = 3 }), 1000, 5)
		if v6 {
			add("hop by hop", with(5000, func(s *spec) { s.ipExtra, s.ext = hopByHop, 0 }), 1000, 5)
			add("chain", with(5000, func(s *spec) { s.ipExtra, s.ext = longChain, 0 }), 1000, 5)
		} else {
			add("IP options", with(5000, func(s *spec) { s.ipExtra = ip4Options }), 1000, 5)
			add("all IP options", with(5000, func(s *spec) { s.ipExtra = bytes.Repeat([]byte{1}, 40) }), 1000, 5)
		}
		udp := func(n int) spec { return spec{udp: true, id: 0xffff, payload: payload(n)} }
		add("USO", udp(4000), 1200, 4)
		add("USO exact", udp(3600), 1200, 3)
		add("USO odd", udp(3601), 1199, 4)
		add("USO one", udp(7), 1200, 1)
		if v6 {
			s := udp(3601)
			s.ipExtra, s.ext = destOpts, 60
			add("USO destination options", s, 1199, 4)
		} else {
			s := udp(3601)
			s.ipExtra = ip4Options
			add("USO IP options", s, 1199, 4)
		}
	}
	return cs
}

func TestSegment(t *testing.T) {
	for _, c := range segmentCases() {
		for _, cuts := range [][]int{nil, {c.spec.hdrLen()}, {10, 3, 0, 30, 1, 1399, 2}} {
			t.Run(fmt.Sprintf("%s/%v", c.name, cuts), func(t *testing.T) {
				got := split(t, c.spec.partial(), c.spec.gso(c.size), nil, cuts)
				if err := differ(got, c.spec.plainSegments(c.size)); err != nil {
					t.Fatal(err)
				}
				if len(got) != c.want {
					t.Fatalf("%d segments, want %d", len(got), c.want)
				}
				for i, s := range got {
					if err := valid(s); err != nil {
						t.Fatalf("segment %d: %v", i, err)
					}
				}
			})
		}
	}
}

// The one UDP checksum that must not be sent as computed: it is 0, so 0xFFFF.
func TestSegmentUDPZeroChecksum(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		s := spec{v6: v6, udp: true, sport: 1, dport: 2, payload: make([]byte, 4)}
		// Choose the first two bytes so that the first segment sums up to 0xffff.
		s.payload[0], s.payload[1] = 0, 0
		c := header.UDP(func() []byte { p := s; p.payload = s.payload[:2]; return p.full() }()[s.l4Offset():]).Checksum()
		s.payload[0], s.payload[1] = byte(c>>8), byte(c)
		got := split(t, s.partial(), s.gso(2), nil, nil)
		if c := header.UDP(got[0][s.l4Offset():]).Checksum(); c != 0xffff {
			t.Errorf("v6=%v: checksum %#x", v6, c)
		}
		if err := differ(got, s.plainSegments(2)); err != nil {
			t.Error(err)
		}
		// The same for a packet that is not split.
		p := s
		p.payload = s.payload[:2]
		b := p.partial()
		if d := finish(b, &GSO{NeedsCsum: true, CsumOffset: 6}, nil); d != DropNone || !bytes.Equal(b, p.full()) {
			t.Errorf("v6=%v: finish: %v, %x", v6, d, b)
		}
	}
}

// Source NAT before splitting gives what splitting the translated packet would.
func TestSegmentNAT(t *testing.T) {
	nat, err := newNATTable([]NATRule{
		{Peer: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")},
			Inside: netip.MustParseAddr("10.0.0.1"), Outside: netip.MustParseAddr("192.168.255.254")},
		{Peer: []netip.Prefix{netip.MustParsePrefix("fd00::/64")},
			Inside: netip.MustParseAddr("fd00::1"), Outside: netip.MustParseAddr("2001:db8:ffff::77")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range segmentCases() {
		t.Run(c.name, func(t *testing.T) {
			translated := c.spec
			translated.src = netip.MustParseAddr([]string{"192.168.255.254", "2001:db8:ffff::77"}[b2i(c.spec.v6)])
			want := translated.plainSegments(c.size)
			if err := differ(split(t, c.spec.partial(), c.spec.gso(c.size), nat, nil), want); err != nil {
				t.Fatal("superpacket:", err)
			}
			// Packets that are not superpackets, with partial and with full checksums.
			g := c.spec.gso(c.size)
			g.Type = GSONone
			b := c.spec.partial()
			if d := finish(b, &g, nat); d != DropNone || !bytes.Equal(b, translated.full()) {
				t.Fatalf("partial: %v\n got %x\nwant %x", d, b[:100], translated.full()[:100])
			}
			b = c.spec.full()
			if d := finish(b, &GSO{}, nat); d != DropNone || !bytes.Equal(b, translated.full()) {
				t.Fatalf("full: %v\n got %x\nwant %x", d, b[:100], translated.full()[:100])
			}
		})
	}
}

func TestSegmentRefuses(t *testing.T) {
	tcp := spec{flags: ack, payload: payload(3000)}
	tcp6 := spec{v6: true, flags: ack, payload: payload(3000)}
	udp := spec{udp: true, payload: payload(3000)}
	change := func(s spec, f func(b []byte)) []byte {
		b := s.partial()
		if f != nil {
			f(b)
		}
		return b
	}
	good, good6, goodUDP := tcp.gso(1000), tcp6.gso(1000), udp.gso(1000)
	g := func(f func(*GSO)) GSO { x := good; f(&x); return x }
	for _, c := range []struct {
		name string
		b    []byte
		gso  GSO
		want Drop
	}{
		{"size zero", change(tcp, nil), g(func(g *GSO) { g.GSOSize = 0 }), DropGSO},
		{"UFO", change(udp, nil), g(func(g *GSO) { g.Type = 3; g.CsumOffset = 6 }), DropGSO},
		{"UDP as TCP", change(udp, nil), good, DropGSO},
		{"TCP as UDP", change(tcp, nil), goodUDP, DropGSO},
		{"v6 as v4", change(tcp6, nil), good, DropGSO},
		{"v4 as v6", change(tcp, nil), good6, DropGSO},
		{"ECN on UDP", change(udp, nil), GSO{Type: GSOUDPL4 | GSOECN, GSOSize: 100, CsumOffset: 6}, DropGSO},
		{"CsumStart elsewhere", change(tcp, nil), g(func(g *GSO) { g.CsumStart = 24 }), DropGSO},
		{"CsumStart beyond", change(tcp, nil), g(func(g *GSO) { g.CsumStart = 65535 }), DropGSO},
		{"CsumOffset elsewhere", change(tcp, nil), g(func(g *GSO) { g.CsumOffset = 6 }), DropGSO},
		{"CsumOffset beyond", change(tcp, nil), g(func(g *GSO) { g.CsumOffset = 65535 }), DropGSO},
		{"fragment", change(tcp, func(b []byte) { b[6] = 0x20 }), good, DropGSO},
		{"atomic fragment", func() []byte { s := tcp6; s.ipExtra, s.ext = atomicFrag, 44; return s.partial() }(), good6, DropGSO},
		{"total too short", change(tcp, func(b []byte) { b[3]-- }), good, DropGSO},
		{"total too long", change(tcp, func(b []byte) { b[3]++ }), good, DropMalformed},
		{"data offset small", change(tcp, func(b []byte) { b[32] = 0x40 }), good, DropMalformed},
		{"headers beyond the packet", func() []byte { s := tcp; s.payload = nil; b := s.partial(); b[32] = 0xf0; return b }(), good, DropMalformed},
		{"header length", change(tcp, func(b []byte) { b[0] = 0x44 }), good, DropMalformed},
		{"version", change(tcp, func(b []byte) { b[0] = 0x55 }), good, DropMalformed},
		{"empty", nil, good, DropMalformed},
		{"half a header", change(tcp, nil)[:15], good, DropMalformed},
		{"endless extension", func() []byte {
			s := tcp6
			s.ipExtra, s.ext = []byte{6, 255, 1, 4, 0, 0, 0, 0}, 60
			return s.partial()
		}(), good6, DropMalformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s segmenter
			if d := s.load([][]byte{c.b}, len(c.b), c.gso); d != c.want {
				t.Errorf("load: %v, want %v", d, c.want)
			}
			if s.busy {
				t.Error("busy")
			}
		})
	}
	// The same for packets that are only to get their checksum.
	for name, g := range map[string]GSO{
		"start beyond":  {NeedsCsum: true, CsumStart: 65535, CsumOffset: 16},
		"offset beyond": {NeedsCsum: true, CsumStart: 20, CsumOffset: 65535},
		"half":          {NeedsCsum: true, CsumStart: 20, CsumOffset: 3019},
	} {
		b := tcp.partial()
		if d := finish(b, &g, nil); d != DropGSO || !bytes.Equal(b, tcp.partial()) {
			t.Errorf("%s: %v", name, d)
		}
	}
	// A HdrLen that is wrong is not even looked at, and the ECN bit is masked.
	for _, h := range []uint16{0, 1, 65535} {
		x := g(func(g *GSO) { g.HdrLen = h; g.Type |= GSOECN })
		if err := differ(split(t, tcp.partial(), x, nil, nil), tcp.plainSegments(1000)); err != nil {
			t.Errorf("HdrLen %d: %v", h, err)
		}
	}
}

// FuzzSegment makes a superpacket out of the arguments, splits it and compares with the slow
// segmenter; gVisor's code verifies each segment.
func FuzzSegment(f *testing.F) {
	f.Add(uint16(1400), uint16(9000), uint32(1<<32-5000), uint16(65530), uint8(ack|psh), uint8(3), []byte{1, 200, 7})
	f.Add(uint16(1), uint16(40), uint32(0), uint16(0), uint8(0xff), uint8(0x15), []byte{})
	f.Add(uint16(536), uint16(65000), uint32(1), uint16(1), uint8(cwr|ece|ack|fin), uint8(0x0a), []byte{0, 0, 60})
	f.Add(uint16(1200), uint16(30000), uint32(1), uint16(1), uint8(0), uint8(0x0e), []byte{28})
	f.Fuzz(func(t *testing.T, size, length uint16, seq uint32, id uint16, flags, kind uint8, cuts []byte) {
		if size == 0 || int(length)/int(size) > 2000 {
			t.Skip()
		}
		s := spec{
			v6: kind&1 != 0, udp: kind&2 != 0, df: kind&4 != 0, seq: seq, ack: seq * 3, id: id, flags: flags,
			sport: id, dport: size, window: length, tos: kind, label: uint32(id) << 4,
		}
		if !s.udp && kind&8 != 0 {
			s.tcpOptions = timestamps
		}
		if kind&16 != 0 {
			switch {
			case !s.v6:
				s.ipExtra = ip4Options
			case s.udp:
				s.ipExtra, s.ext = destOpts, 60
			default:
				s.ipExtra, s.ext = longChain, 0
			}
		}
		s.payload = payload(min(int(length), 65535-s.hdrLen()))
		var places []int
		for _, c := range cuts {
			places = append(places, int(c)*int(c))
		}
		b := s.partial()
		got := split(t, b, s.gso(int(size)), nil, places)
		if err := differ(got, s.plainSegments(int(size))); err != nil {
			t.Fatal(err)
		}
		var whole []byte
		for i, g := range got {
			if err := valid(g); err != nil {
				t.Fatalf("segment %d: %v", i, err)
			}
			if len(g) > s.hdrLen()+int(size) {
				t.Fatalf("segment %d has %d bytes", i, len(g))
			}
			whole = append(whole, g[s.hdrLen():]...)
		}
		if !bytes.Equal(whole, s.payload) {
			t.Fatal("payload")
		}
	})
}

// FuzzGSO takes any bytes with any metadata. What is accepted must come out whole.
func FuzzGSO(f *testing.F) {
	for _, c := range segmentCases()[:8] {
		g := c.spec.gso(c.size)
		f.Add(c.spec.partial(), uint8(g.Type), g.GSOSize, g.CsumStart, g.CsumOffset, g.HdrLen)
	}
	u := spec{v6: true, udp: true, payload: payload(2000), ipExtra: destOpts, ext: 60}
	f.Add(u.partial(), uint8(GSOUDPL4), uint16(900), uint16(48), uint16(6), uint16(9999))
	f.Fuzz(func(t *testing.T, b []byte, typ uint8, size, start, offset, hdrLen uint16) {
		if len(b) > 70000 || size > 0 && len(b)/int(size) > 2000 {
			t.Skip()
		}
		g := GSO{Type: GSOType(typ), GSOSize: size, CsumStart: start, CsumOffset: offset, HdrLen: hdrLen, NeedsCsum: true}
		var s segmenter
		if d := s.load([][]byte{b}, len(b), g); d == DropNone {
			want := b[s.hdrLen:]
			s.prime()
			var got []byte
			for s.busy {
				dst := make([]byte, s.segmentLen())
				h := s.hdrLen
				s.next(dst)
				got = append(got, dst[h:]...)
				if err := valid(dst); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Fatal("payload")
			}
		}
		// And as a packet that is not split.
		g.Type = GSONone
		c := bytes.Clone(b)
		if d := finish(c, &g, nil); d == DropNone {
			at := int(g.CsumStart) + int(g.CsumOffset)
			if !bytes.Equal(c[:at], b[:at]) || !bytes.Equal(c[at+2:], b[at+2:]) {
				t.Fatal("finish has changed more than the checksum")
			}
		}
	})
}
