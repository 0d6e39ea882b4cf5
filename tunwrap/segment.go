package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// maxHeader bounds the headers of a superpacket in bytes: 40 of IPv6, 60 of TCP, and
// 412 for extension headers, of which the stack here sends 8 at most.
const maxHeader = 512

// A segmenter splits one superpacket at a time into segments with finished headers and
// checksums. It can stop after any segment and go on later, so output buffers that run
// out lose nothing.
//
// The headers are copied once into a template whose fields that differ between
// segments are zero, together with the sums over it; a segment then costs a copy of the
// template, a copy of its payload, a sum over the bytes just copied and a few
// additions.
type segmenter struct {
	layout layout
	gso    GSO

	// head[:hdrLen] is the template. After prime the IPv4 length, ID and checksum,
	// the TCP sequence number, flags and checksum, and the UDP length and checksum
	// in it are zero.
	head   [maxHeader]byte
	hdrLen int

	views [][]byte // borrowed; payload from views[0][at:] on is still to come
	at    int
	left  int // bytes of payload still to come

	ipSum uint32 // of the template's IPv4 header
	l4Sum uint32 // of the pseudo-header without length and the template's transport header
	id    uint16 // IPv4 ID of the next segment
	seq   uint32 // TCP sequence number of the next segment
	flags uint8  // TCP flags of the superpacket, less those of segments already made
	busy  bool
	told  bool // the sender has been told that its segments are too big
}

// load begins with the superpacket that views hold, size bytes in all. It copies the headers
// into the template, where they may be changed (NAT) before prime is called, and
// borrows views until the last segment is made or the segmenter is reset. Nothing but
// DropNone leaves the segmenter busy.
func (s *segmenter) load(views [][]byte, size int, g GSO) Drop {
	n := 0
	for _, v := range views {
		n += copy(s.head[n:], v)
		if n == len(s.head) {
			break
		}
	}
	l, d := g.complete(s.head[:n], size)
	if d != DropNone {
		return d
	}
	s.layout, s.gso, s.hdrLen = l, g, int(g.HdrLen)
	s.views, s.at, s.left = views, 0, size-s.hdrLen
	s.skip(s.hdrLen)
	s.busy, s.told = true, false
	return DropNone
}

// headers lends the copy of the superpacket's headers between load and prime.
func (s *segmenter) headers() []byte { return s.head[:s.hdrLen] }

// prime makes the headers a template. It comes once after load.
func (s *segmenter) prime() {
	h, l4 := s.head[:s.hdrLen], s.layout.l4
	t := h[l4:]
	if s.layout.version == 4 {
		s.id = binary.BigEndian.Uint16(h[ip4ID:])
		binary.BigEndian.PutUint32(h[ip4TotalLen:], 0) // and ID
		binary.BigEndian.PutUint16(h[ip4Checksum:], 0)
		s.ipSum = uint32(sumOf(h[:l4]))
	}
	if s.layout.proto == protoTCP {
		s.seq = binary.BigEndian.Uint32(t[tcpSeq:])
		s.flags = t[tcpFlags]
		binary.BigEndian.PutUint32(t[tcpSeq:], 0)
		t[tcpFlags] = 0
		binary.BigEndian.PutUint16(t[tcpChecksum:], 0)
	} else {
		binary.BigEndian.PutUint32(t[udpLen:], 0) // and checksum
	}
	s.l4Sum = uint32(pseudoSum(h, &s.layout, 0)) + uint32(sumOf(t))
}

// reset gives the views up.
func (s *segmenter) reset() { s.views, s.left, s.busy = nil, 0, false }

// segmentLen is the length of the next segment in bytes.
func (s *segmenter) segmentLen() int { return s.hdrLen + min(s.left, int(s.gso.GSOSize)) }

// next writes the next segment to the start of dst, which has room for segmentLen bytes
// and shares none with the views. After the last one the segmenter is no longer busy.
func (s *segmenter) next(dst []byte) {
	n := min(s.left, int(s.gso.GSOSize))
	s.left -= n
	dst = dst[:s.hdrLen+n]
	copy(dst, s.head[:s.hdrLen])
	s.copyPayload(dst[s.hdrLen:])
	// The transport header has an even length, so the payload's sum needs no shift.
	sum := s.l4Sum + uint32(checksum.Checksum(dst[s.hdrLen:], 0))

	l4Len := len(dst) - s.layout.l4
	if s.layout.version == 4 {
		binary.BigEndian.PutUint16(dst[ip4TotalLen:], uint16(len(dst)))
		binary.BigEndian.PutUint16(dst[ip4ID:], s.id)
		binary.BigEndian.PutUint16(dst[ip4Checksum:], ^fold(s.ipSum+uint32(len(dst))+uint32(s.id)))
		s.id++
	} else {
		binary.BigEndian.PutUint16(dst[ip6PayloadLen:], uint16(len(dst)-header.IPv6MinimumSize))
	}

	t := dst[s.layout.l4:]
	if s.layout.proto == protoTCP {
		flags := s.flags
		if s.left > 0 {
			flags &^= flagFIN | flagPSH
		}
		s.flags &^= flagCWR // RFC 3168 6.1.2: the first segment only
		binary.BigEndian.PutUint32(t[tcpSeq:], s.seq)
		t[tcpFlags] = flags
		sum += s.seq>>16 + s.seq&0xffff + uint32(flags) + uint32(l4Len)
		binary.BigEndian.PutUint16(t[tcpChecksum:], ^fold(sum))
		s.seq += uint32(n)
	} else {
		binary.BigEndian.PutUint16(t[udpLen:], uint16(l4Len))
		c := ^fold(sum + 2*uint32(l4Len)) // pseudo-header and header
		if c == 0 {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(t[udpChecksum:], c)
	}
	if s.left == 0 {
		s.reset()
	}
}

// drop gives the next segment up. The rest keeps its sequence numbers.
func (s *segmenter) drop() {
	n := min(s.left, int(s.gso.GSOSize))
	s.left -= n
	s.skip(n)
	s.seq += uint32(n)
	s.id++
	s.flags &^= flagCWR
	if s.left == 0 {
		s.reset()
	}
}

// tooLong takes the next segment, for which there is room for fits bytes only, to tooBig, like any packet that is too
// big: it is fragmented if it may be, else the sender is told. That is done once; then segments are dropped.
func (s *segmenter) tooLong(fits int, drops *dropCounters, tooBig func(packet []byte, mtu int)) {
	if s.told {
		drops.add(DropOversize)
		s.drop()
		return
	}
	s.told = s.layout.version == 6 || be16(s.head[:], ip4FragOff)&ip4FlagDF != 0
	b := make([]byte, s.segmentLen())
	s.next(b)
	tooBig(b, fits)
}

// copyPayload fills dst from the views.
func (s *segmenter) copyPayload(dst []byte) {
	for len(dst) > 0 {
		if s.at == len(s.views[0]) {
			s.views, s.at = s.views[1:], 0
		}
		n := copy(dst, s.views[0][s.at:])
		s.at += n
		dst = dst[n:]
	}
}

// skip moves over n bytes of the views.
func (s *segmenter) skip(n int) {
	for n > 0 {
		if rest := len(s.views[0]) - s.at; n >= rest {
			n -= rest
			s.views, s.at = s.views[1:], 0
			continue
		}
		s.at += n
		return
	}
}
