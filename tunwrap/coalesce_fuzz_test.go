package tunwrap

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// FuzzCoalesce makes superpackets of several flows, splits them, mixes the segments, changes some,
// and coalesces. Splitting the result must give the same packets in each flow, in order.
func FuzzCoalesce(f *testing.F) {
	f.Add(uint64(1), uint8(3), uint16(5000), uint16(1000), []byte{})
	f.Add(uint64(2), uint8(16), uint16(9000), uint16(1400), []byte{3, 1, 9, 40, 6, 0, 200, 13, 8})
	f.Add(uint64(3), uint8(1), uint16(65000), uint16(536), []byte{0, 33, 5})
	f.Fuzz(func(t *testing.T, seed uint64, flows uint8, length, size uint16, changes []byte) {
		if size == 0 || flows == 0 || flows > 40 || int(length)/int(size) > 200 {
			t.Skip()
		}
		in := mixedFlows(seed, int(flows), int(length), int(size), changes)
		c := coalescer{udp: seed%2 == 0}
		got := coalesced(t, &c, in)
		for _, d := range got {
			if len(d.b) > maxPacket {
				t.Fatal("too long")
			}
		}
		if err := sameStreams(resplit(t, got), in); err != nil {
			t.Fatal(err)
		}
		if n := len(in); len(got) > n {
			t.Fatalf("%d packets became %d", n, len(got))
		}
	})
}

// mixedFlows makes superpackets of several flows, splits them, mixes the segments and changes some; every
// packet is valid.
func mixedFlows(seed uint64, flows, length, size int, changes []byte) [][]byte {
	rnd := rand.New(rand.NewPCG(seed, 0))
	queues := make([][][]byte, 0, flows)
	for i := range flows {
		s := spec{
			v6: rnd.IntN(2) == 0, sport: uint16(i), dport: 80, seq: rnd.Uint32(), ack: 1, id: uint16(rnd.Uint32()),
			df: rnd.IntN(2) == 0, flags: ack, window: 5, udp: rnd.IntN(4) == 0,
		}
		if rnd.IntN(2) == 0 {
			s.tcpOptions = timestamps
		}
		if s.v6 && !s.udp && rnd.IntN(4) == 0 {
			s.ipExtra, s.ext = hopByHop, 0
		}
		if rnd.IntN(2) == 0 {
			s.flags |= psh
		}
		s.payload = payload(min(length, 60000))
		q := s.plainSegments(size)
		if rnd.IntN(2) == 0 { // the next superpacket
			s.seq += uint32(len(s.payload))
			s.id += uint16(len(q))
			q = append(q, s.plainSegments(size)...)
		}
		queues = append(queues, q)
	}
	// Mix, keeping the order in each flow.
	var in [][]byte
	for len(queues) > 0 {
		i := rnd.IntN(len(queues))
		n := min(1+rnd.IntN(5), len(queues[i]))
		in = append(in, queues[i][:n]...)
		if queues[i] = queues[i][n:]; len(queues[i]) == 0 {
			queues = append(queues[:i], queues[i+1:]...)
		}
	}
	// Change bytes, then mend the checksums so that the packets stay valid; or swap
	// two packets; or repeat one.
	for i := 0; i+2 < len(changes); i += 3 {
		p, at := int(changes[i])*len(in)/256, int(changes[i+1])
		switch changes[i+2] % 8 {
		case 0:
			q := (p + 1) % len(in)
			in[p], in[q] = in[q], in[p]
		case 1:
			in = append(in, bytes.Clone(in[p]))
		default:
			b := bytes.Clone(in[p])
			if at < len(b) {
				b[at] ^= changes[i+2]
			}
			if repair(b) {
				in[p] = b
			}
		}
	}
	return in
}

// repair computes the checksums in b anew and reports whether verify then takes b whole.
func repair(b []byte) bool {
	l, d := locate(b, len(b))
	if d != DropNone || l.total != len(b) {
		return false
	}
	if l.version == 4 {
		header.IPv4(b).SetChecksum(0)
		header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	}
	if at, ok := transportChecksum(&l); ok && at+2 <= len(b) && !l.fragment {
		binary.BigEndian.PutUint16(b[at:], 0)
		c := ^fold(uint32(pseudoSum(b, &l, len(b)-l.l4)) + uint32(slowSum(b[l.l4:])))
		if c == 0 && l.proto == protoUDP {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(b[at:], c)
	}
	v, _, d := verify(bytes.Clone(b))
	return d == DropNone && len(v) == len(b)
}
