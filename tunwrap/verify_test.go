package tunwrap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// echo is an ICMP or ICMPv6 echo request.
func echo(v6 bool, n int) []byte {
	s := spec{v6: v6, payload: payload(n)}
	b := s.full()[:s.l4Offset()+8+n]
	t := b[s.l4Offset():]
	copy(t[8:], s.payload)
	binary.BigEndian.PutUint16(t[4:], 77)
	binary.BigEndian.PutUint16(t[6:], 1)
	if v6 {
		header.IPv6(b).SetPayloadLength(uint16(len(t)))
		header.IPv6(b).SetNextHeader(58)
		t[0], t[1] = 128, 0
	} else {
		header.IPv4(b).SetTotalLength(uint16(len(b)))
		b[9] = 1
		t[0], t[1] = 8, 0
		binary.BigEndian.PutUint16(t[2:], 0)
		binary.BigEndian.PutUint16(t[2:], ^slowSum(t))
	}
	if !repair(b) {
		panic("echo")
	}
	return b
}

func TestVerify(t *testing.T) {
	tcp := spec{flags: ack, tcpOptions: timestamps, payload: payload(101)}
	tcp6 := tcp
	tcp6.v6 = true
	chain := tcp6
	chain.ipExtra, chain.ext = longChain, 0
	opts := tcp
	opts.ipExtra = ip4Options
	udp := spec{udp: true, payload: payload(33)}
	udp6 := udp
	udp6.v6 = true
	atomic := tcp6
	atomic.ipExtra, atomic.ext = atomicFrag, 44
	// Routing header type 2 with a segment left: the pseudo-header's destination is elsewhere.
	routed := tcp6
	routed.ipExtra, routed.ext = append([]byte{6, 2, 2, 1}, make([]byte, 20)...), 43
	arrived := routed
	arrived.ipExtra = append([]byte{6, 2, 2, 0}, make([]byte, 20)...)
	experiment := tcp6
	experiment.ipExtra, experiment.ext = []byte{6, 0xff, 1, 2, 3, 4, 5, 6}, 253

	fix4 := func(b []byte) {
		header.IPv4(b).SetChecksum(0)
		header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	}
	type change = func(b []byte) []byte
	flip := func(at int) change {
		return func(b []byte) []byte { b[(at+len(b))%len(b)] ^= 0x10; return b }
	}
	short := func(n int) change { return func(b []byte) []byte { return b[:n] } }
	for _, c := range []struct {
		name string
		b    []byte
		f    change
		want Drop
		keep int // length of the result, 0 for all
	}{
		{"TCP", tcp.full(), nil, DropNone, 0},
		{"TCP IPv6", tcp6.full(), nil, DropNone, 0},
		{"IP options", opts.full(), nil, DropNone, 0},
		{"extension headers", chain.full(), nil, DropNone, 0},
		{"atomic fragment", atomic.full(), nil, DropNone, 0},
		{"experiment header", experiment.full(), nil, DropNone, 0},
		{"routed, arrived", arrived.full(), nil, DropNone, 0},
		{"UDP", udp.full(), nil, DropNone, 0},
		{"UDP IPv6", udp6.full(), nil, DropNone, 0},
		{"echo", echo(false, 56), nil, DropNone, 0},
		{"echo IPv6", echo(true, 56), nil, DropNone, 0},
		{"trailing bytes", append(tcp.full(), 1, 2, 3), nil, DropNone, len(tcp.full())},
		{"trailing bytes IPv6", append(tcp6.full(), 1, 2, 3), nil, DropNone, len(tcp6.full())},

		{"TCP payload", tcp.full(), flip(-1), DropTCPChecksum, 0},
		{"TCP header", tcp.full(), flip(25), DropTCPChecksum, 0},
		{"TCP IPv6 payload", tcp6.full(), flip(-1), DropTCPChecksum, 0},
		{"TCP IPv6 address", tcp6.full(), flip(12), DropTCPChecksum, 0},
		{"behind extension headers", chain.full(), flip(-1), DropTCPChecksum, 0},
		{"behind an atomic fragment header", atomic.full(), flip(-1), DropTCPChecksum, 0},
		{"behind an experiment header", experiment.full(), flip(-1), DropTCPChecksum, 0},
		{"behind a used routing header", arrived.full(), flip(-1), DropTCPChecksum, 0},
		{"routed onwards", routed.full(), flip(-1), DropNone, 0},
		{"IPv4 address", tcp.full(), flip(14), DropIPChecksum, 0},
		{"IPv4 options", opts.full(), flip(21), DropIPChecksum, 0},
		{"IPv4 TTL", udp.full(), flip(8), DropIPChecksum, 0},
		{"UDP payload", udp.full(), flip(-1), DropUDPChecksum, 0},
		{"UDP IPv6 payload", udp6.full(), flip(-1), DropUDPChecksum, 0},
		{"echo payload", echo(false, 56), flip(-1), DropICMPChecksum, 0},
		{"echo IPv6 payload", echo(true, 56), flip(-1), DropICMPChecksum, 0},

		{"UDP without checksum", udp.full(), func(b []byte) []byte { b[26], b[27] = 0, 0; return b }, DropNone, 0},
		{"UDP IPv6 without checksum", udp6.full(), func(b []byte) []byte { b[46], b[47] = 0, 0; return b }, DropUDPNoChecksum, 0},

		{"empty", nil, nil, DropMalformed, 0},
		{"one byte", tcp.full(), short(1), DropMalformed, 0},
		{"short", tcp.full(), short(80), DropMalformed, 0},
		{"short IPv6", tcp6.full(), short(80), DropMalformed, 0},
		{"half an IPv6 header", tcp6.full(), short(39), DropMalformed, 0},
		{"version 0", tcp.full(), func(b []byte) []byte { b[0] = 5; return b }, DropMalformed, 0},
		{"no TCP header", (&spec{}).full(), func(b []byte) []byte {
			header.IPv4(b).SetTotalLength(39)
			fix4(b)
			return b
		}, DropMalformed, 0},
		{"data offset", tcp.full(), func(b []byte) []byte { b[32] = 0x40; return b }, DropMalformed, 0},
		{"data offset beyond", (&spec{}).full(), func(b []byte) []byte { b[32] = 0xf0; return b }, DropMalformed, 0},
		{"no UDP header", (&spec{udp: true}).full(), func(b []byte) []byte {
			header.IPv4(b).SetTotalLength(27)
			fix4(b)
			return b
		}, DropMalformed, 0},
		{"UDP length 7", udp.full(), func(b []byte) []byte { b[25] = 7; return b }, DropMalformed, 0},
		{"UDP length beyond", udp.full(), func(b []byte) []byte { b[25]++; return b }, DropMalformed, 0},
		{"no ICMP header", echo(false, 0), func(b []byte) []byte {
			header.IPv4(b).SetTotalLength(27)
			fix4(b)
			return b
		}, DropMalformed, 0},
		{"no ICMPv6 header", echo(true, 0), func(b []byte) []byte {
			header.IPv6(b).SetPayloadLength(3)
			return b
		}, DropMalformed, 0},
		{"extension header beyond", chain.full(), func(b []byte) []byte { b[41] = 255; return b }, DropMalformed, 0},
		{"extension header cut", chain.full(), func(b []byte) []byte { header.IPv6(b).SetPayloadLength(4); return b }, DropMalformed, 0},

		{"fragment", tcp.full(), func(b []byte) []byte { b[6] = 0x20; b[60] ^= 1; fix4(b); return b }, DropNone, 0},
		{"later fragment", tcp.full(), func(b []byte) []byte { b[7] = 9; b[60] ^= 1; fix4(b); return b }, DropNone, 0},
		{"IPv6 fragment", atomic.full(), func(b []byte) []byte { b[43] = 1; b[80] ^= 1; return b }, DropNone, 0},
		{"header longer than the packet", (&spec{}).full(), func(b []byte) []byte {
			b[0] = 0x4a
			header.IPv4(b).SetTotalLength(39)
			header.IPv4(b).SetChecksum(0)
			header.IPv4(b).SetChecksum(^header.IPv4(b[:40]).CalculateChecksum())
			return b
		}, DropMalformed, 0},
		{"later fragment of an extension header", (&spec{v6: true, ipExtra: []byte{60, 0, 0, 8, 1, 2, 3, 4}, ext: 44}).full(), func(b []byte) []byte {
			b[49] = 255 // would be a length
			return b
		}, DropNone, 0},
		{"later IPv6 fragment", atomic.full(), func(b []byte) []byte { b[43] = 8; b[80] ^= 1; return b }, DropNone, 0},
		{"other protocol", tcp.full(), func(b []byte) []byte { b[9] = 132; fix4(b); return b }, DropNone, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := c.b
			if c.f != nil {
				b = c.f(b)
			}
			before := bytes.Clone(b)
			got, _, d := verify(b)
			if d != c.want {
				t.Fatalf("%v, want %v", d, c.want)
			}
			if !bytes.Equal(b, before) {
				t.Error("changed")
			}
			if d == DropNone && len(got) != cmpOr(c.keep, len(b)) {
				t.Errorf("%d bytes", len(got))
			}
		})
	}
}

func cmpOr(a, b int) int {
	if a != 0 {
		return a
	}
	return b
}

// A UDP packet may be shorter than the IP packet around it, and its checksum covers only itself.
func TestVerifyUDPSurplus(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		s := spec{v6: v6, udp: true, payload: payload(30)}
		short := s.full()
		long := s
		long.payload = append(payload(30), 9, 9, 9)
		b := long.full()
		copy(b[s.l4Offset():], short[s.l4Offset():])
		if _, _, d := verify(b); d != DropNone {
			t.Errorf("v6=%v: %v", v6, d)
		}
		b[len(b)-4] ^= 1
		if _, _, d := verify(b); d != DropUDPChecksum {
			t.Errorf("v6=%v: %v", v6, d)
		}
	}
}

// verifySeeds are good packets of every kind that verify looks into.
func verifySeeds() (seeds [][]byte) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			s := spec{v6: v6, udp: udp, flags: ack, payload: payload(40)}
			seeds = append(seeds, s.full())
			if v6 && !udp {
				s.ipExtra, s.ext = longChain, 0
				seeds = append(seeds, s.full())
				s.ipExtra, s.ext = atomicFrag, 44
				seeds = append(seeds, s.full())
			}
		}
		seeds = append(seeds, echo(v6, 9))
	}
	return seeds
}

// The seeds of the fuzzers are what they claim.
func TestSeeds(t *testing.T) {
	protos := map[uint8]int{}
	for i, b := range verifySeeds() {
		if err := valid(b); err != nil {
			t.Errorf("verify %d: %v", i, err)
		}
		l, _ := locate(b, len(b))
		protos[l.proto]++
	}
	for _, p := range []uint8{protoTCP, protoUDP, protoICMP, protoICMPv6} {
		if protos[p] == 0 {
			t.Errorf("verify: no seed has protocol %d", p)
		}
	}
	quotes := 0
	for i, b := range natSeeds() {
		if err := valid(b); err != nil {
			t.Errorf("NAT %d: %v", i, err)
		}
		l, _ := locate(b, len(b))
		if _, _, ok := quoted(b, &l); ok {
			quotes++
		}
	}
	if quotes != 8 {
		t.Errorf("NAT: %d of the seeds quote", quotes)
	}
}

// FuzzVerify compares verify with gVisor's opinion of the same bytes.
func FuzzVerify(f *testing.F) {
	for _, b := range verifySeeds() {
		f.Add(b, true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		if mend {
			repair(b)
		}
		input := bytes.Clone(b)
		got, l, d := verify(b)
		if d == DropNone && (l.fragment || l.version == 6 && l.proto == 43) {
			return // nothing can be said about fragments and about packets on their way
		}
		if d == DropNone {
			if !bytes.Equal(input, b) || len(got) != l.total {
				t.Fatal("changed")
			}
			if err := valid(got); err != nil {
				t.Fatalf("verify takes what gVisor does not: %v\n%x", err, got)
			}
			return
		}
		// What verify refuses, gVisor must refuse as well. Give it what the IP header says.
		if n := ipTotal(input); n > 0 && n <= len(input) {
			if err := valid(input[:n]); err == nil && d != DropUDPNoChecksum {
				t.Fatalf("verify refuses (%v) what gVisor takes\n%x", d, input)
			}
		}
	})
}

// ipTotal is the length in the IP header, 0 if there is none.
func ipTotal(b []byte) int {
	switch {
	case len(b) >= header.IPv4MinimumSize && b[0]>>4 == 4:
		return int(header.IPv4(b).TotalLength())
	case len(b) >= header.IPv6MinimumSize && b[0]>>4 == 6:
		return header.IPv6MinimumSize + int(header.IPv6(b).PayloadLength())
	}
	return 0
}
