package tunwrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func prefixes(ss ...string) (ps []netip.Prefix) {
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func rule(inside, outside string, peer ...string) NATRule {
	return NATRule{Peer: prefixes(peer...), Inside: netip.MustParseAddr(inside), Outside: netip.MustParseAddr(outside)}
}

func table(t testing.TB, rules ...NATRule) *natTable {
	t.Helper()
	n, err := newNATTable(rules)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// both runs the packet outbound and inbound through n and returns what becomes of it.
func both(t testing.TB, n *natTable, b []byte) (out, in []byte) {
	t.Helper()
	l, d := locate(b, len(b))
	if d != DropNone {
		t.Fatal(d)
	}
	out, in = bytes.Clone(b), bytes.Clone(b)
	n.outbound(out, &l, &GSO{})
	n.inbound(in, &l)
	return out, in
}

func TestNAT(t *testing.T) {
	n := table(t,
		rule("10.0.0.1", "172.31.255.1", "192.0.2.0/24", "2001:db8::/32"),
		rule("10.0.0.9", "172.31.255.9", "192.0.2.0/24"),
		rule("10.0.0.1", "10.0.0.1", "192.0.2.128/25"),
		rule("10.0.0.1", "172.16.5.5", "198.51.100.7/32"),
		rule("fd00::1", "2001:db8:5::1", "2001:db8::/32", "192.0.2.0/24"),
	)
	for _, c := range []struct {
		src, dst       string
		wantSrc        string // outbound
		inDst, wantDst string // inbound from dst
	}{
		{"10.0.0.1", "192.0.2.5", "172.31.255.1", "172.31.255.1", "10.0.0.1"},
		{"10.0.0.9", "192.0.2.5", "172.31.255.9", "172.31.255.9", "10.0.0.9"},
		{"10.0.0.8", "192.0.2.5", "10.0.0.8", "10.0.0.1", "10.0.0.1"},
		{"10.0.0.1", "192.0.2.200", "10.0.0.1", "172.31.255.1", "172.31.255.1"},
		{"10.0.0.1", "198.51.100.7", "172.16.5.5", "172.16.5.5", "10.0.0.1"},
		{"10.0.0.1", "198.51.100.8", "10.0.0.1", "172.16.5.5", "172.16.5.5"},
		{"fd00::1", "2001:db8::99", "2001:db8:5::1", "2001:db8:5::1", "fd00::1"},
		{"fd00::2", "2001:db8::99", "fd00::2", "fd00::1", "fd00::1"},
	} {
		for _, udp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s-%s/udp=%v", c.src, c.dst, udp), func(t *testing.T) {
				make := func(src, dst string) []byte {
					a := netip.MustParseAddr(src)
					s := spec{v6: a.Is6(), udp: udp, src: a, dst: netip.MustParseAddr(dst), payload: payload(31), flags: ack}
					return s.full()
				}
				out, _ := both(t, n, make(c.src, c.dst))
				if want := make(c.wantSrc, c.dst); !bytes.Equal(out, want) {
					t.Errorf("outbound\n got %x\nwant %x", out, want)
				}
				_, in := both(t, n, make(c.dst, c.inDst))
				if want := make(c.dst, c.wantDst); !bytes.Equal(in, want) {
					t.Errorf("inbound\n got %x\nwant %x", in, want)
				}
			})
		}
	}

	t.Run("UDP without checksum stays without", func(t *testing.T) {
		s := spec{udp: true, dst: netip.MustParseAddr("192.0.2.5"), payload: payload(9)}
		b := s.full()
		b[26], b[27] = 0, 0
		out, _ := both(t, n, b)
		if out[26] != 0 || out[27] != 0 || netip.AddrFrom4([4]byte(out[12:16])) != netip.MustParseAddr("172.31.255.1") {
			t.Errorf("%x", out)
		}
	})
	t.Run("UDP checksum that becomes zero", func(t *testing.T) {
		for _, v6 := range []bool{false, true} {
			s := spec{v6: v6, udp: true, payload: make([]byte, 2)}
			if s.dst = netip.MustParseAddr("192.0.2.5"); v6 {
				s.dst = netip.MustParseAddr("2001:db8::5")
			}
			translated := s
			translated.src = netip.MustParseAddr([]string{"172.31.255.1", "2001:db8:5::1"}[b2i(v6)])
			c := header.UDP(translated.full()[s.l4Offset():]).Checksum()
			s.payload[0], s.payload[1] = byte(c>>8), byte(c)
			translated.payload = s.payload
			out, _ := both(t, n, s.full())
			if want := translated.full(); !bytes.Equal(out, want) || header.UDP(out[s.l4Offset():]).Checksum() != 0xffff {
				t.Errorf("\n got %x\nwant %x", out, want)
			}
		}
	})
	t.Run("later fragments have no transport header", func(t *testing.T) {
		s := spec{dst: netip.MustParseAddr("192.0.2.5"), payload: payload(99)}
		b := s.full()
		b[7] = 5
		header.IPv4(b).SetChecksum(0)
		header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
		out, _ := both(t, n, b)
		if !bytes.Equal(out[20:], b[20:]) || !header.IPv4(out).IsChecksumValid() || bytes.Equal(out[12:16], b[12:16]) {
			t.Errorf("%x", out)
		}
	})
}

func TestNATRules(t *testing.T) {
	a4, b4, a6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::1")
	p := prefixes("0.0.0.0/0", "::/0")
	for name, rules := range map[string][]NATRule{
		"no inside":          {{Peer: p, Outside: a4}},
		"no outside":         {{Peer: p, Inside: a4}},
		"two families":       {{Peer: p, Inside: a4, Outside: a6}},
		"bad prefix":         {{Peer: []netip.Prefix{{}}, Inside: a4, Outside: b4}},
		"inside twice":       {{Peer: p, Inside: a4, Outside: b4}, {Peer: p, Inside: a4, Outside: netip.MustParseAddr("1.1.1.1")}},
		"outside twice":      {{Peer: p, Inside: a4, Outside: b4}, {Peer: p, Inside: netip.MustParseAddr("1.1.1.1"), Outside: b4}},
		"unmasked but equal": {{Peer: prefixes("10.9.0.1/16"), Inside: a4, Outside: b4}, {Peer: prefixes("10.9.0.2/16"), Inside: a4, Outside: b4}},
	} {
		w := New(new(fakeLink), Options{})
		if err := w.SetNAT([]NATRule{{Peer: p, Inside: a4, Outside: b4}}); err != nil {
			t.Fatal(err)
		}
		old := w.nat.Load()
		if err := w.SetNAT(rules); !errors.Is(err, ErrNATRule) {
			t.Errorf("%s: %v", name, err)
		}
		if w.nat.Load() != old {
			t.Errorf("%s: the old rules are gone", name)
		}
		if err := w.SetNAT(nil); err != nil || w.nat.Load() != nil {
			t.Errorf("no rules: %v", err)
		}
		w.Close()
	}
	// Nothing that could ever match is nothing.
	if n, err := newNATTable([]NATRule{{Peer: prefixes("::/0"), Inside: a4, Outside: b4}}); n != nil || err != nil {
		t.Error(n, err)
	}
	// IPv4 in IPv6 clothes is IPv4.
	n := table(t, NATRule{Peer: p, Inside: netip.MustParseAddr("::ffff:10.0.0.1"), Outside: b4})
	s := spec{dst: netip.MustParseAddr("9.9.9.9")}
	if out, _ := both(t, n, s.full()); netip.AddrFrom4([4]byte(out[12:16])) != b4 {
		t.Errorf("%x", out)
	}
}

// icmpError is an ICMP or ICMPv6 error from src to dst that quotes the first n bytes of inner.
func icmpError(src, dst netip.Addr, typ uint8, inner []byte, n int) []byte {
	s := spec{v6: src.Is6(), src: src, dst: dst, payload: make([]byte, 8+n-20)}
	b := s.full()
	t := b[s.l4Offset():]
	clear(t[:8])
	t[0] = typ
	copy(t[8:], inner[:n])
	if s.v6 {
		b[6] = 58
	} else {
		b[9] = 1
		binary.BigEndian.PutUint16(t[2:], ^slowSum(t))
	}
	if !repair(b) {
		panic("icmpError")
	}
	return b
}

// The packets quoted in ICMP errors are translated with their checksums, however short the quote.
func TestNATQuoted(t *testing.T) {
	n := table(t,
		rule("10.0.0.1", "172.31.255.1", "192.0.2.0/24"),
		rule("fd00::1", "2001:db8:5::1", "2001:db8::/32"),
	)
	for _, v6 := range []bool{false, true} {
		inside := netip.MustParseAddr([]string{"10.0.0.1", "fd00::1"}[b2i(v6)])
		outside := netip.MustParseAddr([]string{"172.31.255.1", "2001:db8:5::1"}[b2i(v6)])
		peer := netip.MustParseAddr([]string{"192.0.2.5", "2001:db8::5"}[b2i(v6)])
		router := netip.MustParseAddr([]string{"192.0.2.77", "2001:db8::77"}[b2i(v6)])
		types := [][]uint8{{3, 4, 5, 11, 12}, {1, 2, 3, 4}}[b2i(v6)]
		for _, udp := range []bool{false, true} {
			quote := func(src, dst netip.Addr) ([]byte, int) {
				s := spec{v6: v6, udp: udp, src: src, dst: dst, flags: ack, payload: payload(64)}
				return s.full(), s.l4Offset()
			}
			q, l4 := quote(inside, peer)
			for _, typ := range types {
				for _, n2 := range []int{20, l4 + 8, l4 + 15, l4 + 18, len(q)} {
					if n2 < l4 {
						continue
					}
					t.Run(fmt.Sprintf("v6=%v/udp=%v/type=%d/%d", v6, udp, typ, n2), func(t *testing.T) {
						// Inbound: about a packet of ours, as the world knows it.
						theirs, _ := quote(outside, peer)
						ours, _ := quote(inside, peer)
						_, in := both(t, n, icmpError(router, outside, typ, theirs, n2))
						if want := icmpError(router, inside, typ, ours, n2); !bytes.Equal(in, want) {
							t.Errorf("inbound\n got %x\nwant %x", in, want)
						}
						// Outbound: about a packet to us, as the world had sent it.
						theirs, _ = quote(peer, outside)
						ours, _ = quote(peer, inside)
						out, _ := both(t, n, icmpError(inside, peer, typ, ours, n2))
						if want := icmpError(outside, peer, typ, theirs, n2); !bytes.Equal(out, want) {
							t.Errorf("outbound\n got %x\nwant %x", out, want)
						}
					})
				}
			}
		}
	}
}

// natSeeds are good packets, among them two ICMP errors for each kind of packet quoted.
func natSeeds() (seeds [][]byte) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			s := spec{v6: v6, udp: udp, flags: ack, payload: payload(50)}
			src, dst := s.addrs()
			seeds = append(seeds, s.full(),
				icmpError(dst, src, 3, s.full(), len(s.full())-3),
				icmpError(src, dst, 1+2*uint8(b2i(!v6)), s.full(), s.l4Offset()+8))
		}
		seeds = append(seeds, echo(v6, 20))
	}
	return seeds
}

// FuzzNAT translates a valid packet and back. It must be valid in between, and the same in the end.
func FuzzNAT(f *testing.F) {
	for i, b := range natSeeds() {
		f.Add(b, uint64(i))
	}
	f.Fuzz(func(t *testing.T, b []byte, seed uint64) {
		l, d := locate(b, len(b))
		if d != DropNone || !repair(b) {
			t.Skip()
		}
		rnd := rand.New(rand.NewPCG(seed, 1))
		random := func(n int) netip.Addr {
			a := make([]byte, n)
			for i := range a {
				// Extremes make sums wrap.
				a[i] = []byte{0, 0xff, byte(rnd.Uint32())}[rnd.IntN(3)]
			}
			addr, _ := netip.AddrFromSlice(a)
			return addr
		}
		addrs := l.addresses(b)
		src, _ := netip.AddrFromSlice(addrs[:len(addrs)/2])
		dst, _ := netip.AddrFromSlice(addrs[len(addrs)/2:])
		other := random(len(addrs) / 2)
		all := prefixes("0.0.0.0/0", "::/0")
		check := func(what string, b []byte) {
			if err := valid(b); err != nil && !l.fragment && l.proto != 43 {
				t.Fatalf("%s: %v\n%x", what, err, b)
			}
		}
		// Outbound and undone by a rule the other way round.
		if n, err := newNATTable([]NATRule{{Peer: all, Inside: src.WithZone(""), Outside: other}}); err == nil && !src.Is4In6() && !other.Is4In6() {
			c := bytes.Clone(b)
			n.outbound(c, &l, &GSO{})
			check("outbound", c)
			if !bytes.Equal(l.addresses(c)[:len(addrs)/2], other.AsSlice()) {
				t.Fatal("outbound: not translated")
			}
			if n, err := newNATTable([]NATRule{{Peer: all, Inside: other, Outside: src}}); err == nil && !quotesOwn(b, &l, other) {
				n.outbound(c, &l, &GSO{})
				same(t, c, b, &l)
			}
		}
		// Inbound likewise.
		if n, err := newNATTable([]NATRule{{Peer: all, Inside: other, Outside: dst}}); err == nil && !dst.Is4In6() && !other.Is4In6() {
			c := bytes.Clone(b)
			n.inbound(c, &l)
			check("inbound", c)
			if !bytes.Equal(l.addresses(c)[len(addrs)/2:], other.AsSlice()) {
				t.Fatal("inbound: not translated")
			}
			if n, err := newNATTable([]NATRule{{Peer: all, Inside: dst, Outside: other}}); err == nil && !quotesOwn(b, &l, other) {
				n.inbound(c, &l)
				same(t, c, b, &l)
			}
		}
	})
}

// quotesOwn reports whether b quotes a packet with the address a, which would be translated back
// although it had never been translated.
func quotesOwn(b []byte, l *layout, a netip.Addr) bool {
	inner, il, ok := quoted(b, l)
	return ok && bytes.Contains(il.addresses(inner), a.AsSlice())
}

// same compares packets, where 0 and 0xFFFF are the same in a checksum.
func same(t *testing.T, got, want []byte, l *layout) {
	t.Helper()
	got, want = bytes.Clone(got), bytes.Clone(want)
	for _, b := range [][]byte{got, want} {
		zero := func(at int) {
			if at+2 <= len(b) && b[at] == 0xff && b[at+1] == 0xff {
				b[at], b[at+1] = 0, 0
			}
		}
		if l.version == 4 {
			zero(ip4Checksum)
		}
		if at, ok := transportChecksum(l); ok {
			zero(at)
		}
		if inner, il, ok := quoted(b, l); ok {
			at := len(b) - len(inner)
			zero(l.l4 + icmpChecksum)
			if il.version == 4 {
				zero(at + ip4Checksum)
			}
			if f, ok := transportChecksum(&il); ok {
				zero(at + f)
			}
		}
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("there and back again\n got %x\nwant %x", got, want)
	}
}
