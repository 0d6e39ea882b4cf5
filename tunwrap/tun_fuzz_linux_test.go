package tunwrap

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzTUNRead has the kernel give any vnet header and any packet. What comes out is what a plain reading of both
// gives: the packet itself, with its checksum finished, or the segments that the segmenter makes of it in
// one piece; or nothing, and that counted.
func FuzzTUNRead(f *testing.F) {
	for i, c := range segmentCases() {
		s := &c.spec
		if len(s.payload) > 20000 {
			continue
		}
		g := s.gso(c.size)
		g.CsumStart, g.HdrLen = uint16(s.l4Offset()), uint16(s.hdrLen())
		f.Add(vnetBytes(g), s.partial(), uint16(1400), uint8(3+i))
		g.Type, g.GSOSize = GSONone, 0
		f.Add(vnetBytes(g), s.partial(), uint16(20000), uint8(1))
		f.Add(make([]byte, vnetHeaderSize), s.full(), uint16(1400), uint8(1))
	}
	f.Fuzz(func(t *testing.T, head, b []byte, room uint16, batch uint8) {
		if len(head) != vnetHeaderSize || len(b) == 0 || len(b) > 65535 || batch == 0 || room < 64 || room > 30000 {
			t.Skip()
		}
		dev, kernel := pipeTUN(t, TUNOptions{})
		defer func() { dev.Close(); unix.Close(kernel) }()
		if _, err := unix.Write(kernel, append(bytes.Clone(head), b...)); err != nil {
			t.Fatal(err)
		}
		give(t, kernel, GSO{}, sentinel())
		got := readUntil(t, dev, int(batch), int(room), sentinel())
		want, dropped, long := plainReading((*vnetHeader)(head).get(), b, int(room))
		if long {
			return // answered, fragmented or dropped; TestTUNReadTooLong
		}
		if err := differ(got, want); err != nil {
			t.Fatal(err)
		}
		if d := dev.Drops(); d.Total() != dropped {
			t.Fatalf("drops %v, want %d", d, dropped)
		}
	})
}

// plainReading is what a packet b with offload metadata g means, as packets of at most room bytes; long: it is
// something longer.
func plainReading(g GSO, b []byte, room int) (want [][]byte, dropped uint64, long bool) {
	if g.Type&^GSOECN == GSONone {
		at := int(g.CsumStart) + int(g.CsumOffset)
		if g.NeedsCsum && at+2 > len(b) {
			return nil, 1, false
		}
		b = bytes.Clone(b)
		if g.NeedsCsum {
			c := ^slowSum(b[g.CsumStart:])
			if c == 0 && g.CsumOffset == udpChecksum {
				c = 0xffff
			}
			binary.BigEndian.PutUint16(b[at:], c)
		}
		return [][]byte{b}, 0, len(b) > room
	}
	if !g.NeedsCsum {
		g.CsumStart, g.CsumOffset = 0, tcpChecksum
		if g.Type == GSOUDPL4 {
			g.CsumOffset = udpChecksum
		}
	}
	var s segmenter
	if s.load([][]byte{b}, len(b), g) != DropNone {
		return nil, 1, false
	}
	s.prime()
	for s.busy {
		dst := make([]byte, s.segmentLen())
		s.next(dst)
		long = long || len(dst) > room
		want = append(want, dst)
	}
	return want, 0, long
}

// FuzzTUNWrite writes segments of several flows, and any bytes as packets among them. A kernel that takes
// apart what comes out sees the packets of each flow, in order, and no others.
func FuzzTUNWrite(f *testing.F) {
	f.Add(uint64(1), uint8(3), uint16(5000), uint16(1000), []byte{}, []byte{0x45})
	f.Add(uint64(2), uint8(16), uint16(9000), uint16(1400), []byte{3, 1, 9, 40, 6, 0, 200, 13, 8}, bytes.Repeat([]byte{0x60, 0}, 30))
	s := spec{flags: ack, payload: payload(20)}
	f.Add(uint64(3), uint8(1), uint16(60000), uint16(536), []byte{0, 33, 5}, s.partial())
	f.Fuzz(func(t *testing.T, seed uint64, flows uint8, length, size uint16, changes, odd []byte) {
		if size == 0 || flows == 0 || flows > 10 || int(length)/int(size) > 200 || len(odd) > 2000 {
			t.Skip()
		}
		dev, kernel := pipeTUN(t, TUNOptions{})
		defer func() { dev.Close(); unix.Close(kernel) }()
		in := mixedFlows(seed, int(flows), int(length), int(size), changes)
		in = append(in, odd)
		want := in
		if l, d := locate(odd, len(odd)); d != DropNone {
			want = in[:len(in)-1]
		} else {
			want[len(in)-1] = odd[:l.total]
		}
		var got [][]byte
		for rest := in; len(rest) > 0; {
			n := min(100, len(rest)) // what the socket holds
			if _, err := dev.Write(withRoom(rest[:n]), headroom); err != nil {
				t.Fatal(err)
			}
			got = append(got, resplitTaken(t, taken(t, kernel))...)
			rest = rest[n:]
		}
		if err := sameStreams(got, want); err != nil {
			t.Fatal(err)
		}
		if d := dev.Drops(); d.Total() != uint64(len(in)-len(want)) {
			t.Fatalf("drops %v", d)
		}
	})
}
