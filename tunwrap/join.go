package tunwrap

import (
	"bytes"
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Joining: packets of one TCP flow that follow each other in what a Read has dequeued, and
// whose headers differ only in what splitting sets anyway, are split as one superpacket. A
// program that writes 4 KiB at a time makes packets of 4 KiB, each of three full segments and a
// small one; joined they become full segments, which fill whole runs. Nothing is waited for:
// it happens when the stack is faster than the way out, which is when it pays.
// (Linux does the same to its write queue: tcp_tso_should_defer, tcp_skb_collapse.)

// A joinHead is the headers of a TCP packet without IP options or extension headers that may be
// joined. It borrows the packet.
type joinHead struct {
	b       []byte // at least the headers
	l4      int    // offset of the TCP header
	hdrLen  int    // bytes of headers
	payload int
	gso     GSO
}

// joinHeadOf reads the headers of pkt; ok is false if it cannot take part.
func joinHeadOf(pkt *stack.PacketBuffer) (h joinHead, ok bool) {
	h.gso = FromStack(pkt)
	if h.gso.GSOSize == 0 || !h.gso.NeedsCsum {
		return h, false
	}
	h.b = firstBytes(pkt)
	if len(h.b) < header.IPv4MinimumSize+header.TCPMinimumSize {
		return h, false
	}
	switch {
	// Without DF every packet needs an IP ID of its own, and splitting takes those that
	// follow the first packet's.
	case h.b[0] == 0x45 && h.b[ip4Proto] == protoTCP && be16(h.b, ip4FragOff) == ip4FlagDF:
		h.l4 = header.IPv4MinimumSize
	case h.b[0]>>4 == 6 && h.b[ip6NextHeader] == protoTCP && len(h.b) >= header.IPv6MinimumSize+header.TCPMinimumSize:
		h.l4 = header.IPv6MinimumSize
	default:
		return h, false
	}
	h.hdrLen = h.l4 + int(h.b[h.l4+tcpDataOff]>>4)*4
	h.payload = pkt.Size() - h.hdrLen
	return h, h.hdrLen >= h.l4+header.TCPMinimumSize && h.hdrLen <= len(h.b) && h.payload > 0
}

// firstBytes lends the first piece of pkt.
func firstBytes(pkt *stack.PacketBuffer) []byte {
	list, skip := pkt.AsViewList()
	for v := list.Front(); v != nil; v = v.Next() {
		if b := v.AsSlice(); skip < len(b) {
			return b[skip:]
		} else {
			skip -= len(b)
		}
	}
	return nil
}

func (h *joinHead) flags() uint8 { return h.b[h.l4+tcpFlags] }

// continues reports whether h may follow first when the next sequence number is seq and
// total bytes are joined already.
func (h *joinHead) continues(first *joinHead, seq uint32, total int) bool {
	if h.gso != first.gso || h.hdrLen != first.hdrLen || total+h.payload > maxPacket {
		return false
	}
	// FIN and PSH end up on the last segment, so they may be the last packet's.
	if h.flags()&^(flagPSH|flagFIN) != flagACK {
		return false
	}
	a, b := first.b, h.b
	if h.l4 == header.IPv4MinimumSize {
		// Version and TOS; flags and offset, TTL and protocol; addresses.
		if be16(a, 0) != be16(b, 0) || be32(a, ip4FragOff) != be32(b, ip4FragOff) ||
			!bytes.Equal(a[ip4Src:header.IPv4MinimumSize], b[ip4Src:header.IPv4MinimumSize]) {
			return false
		}
	} else if be32(a, 0) != be32(b, 0) || !bytes.Equal(a[ip6NextHeader:header.IPv6MinimumSize], b[ip6NextHeader:header.IPv6MinimumSize]) {
		return false
	}
	t, u := a[h.l4:h.hdrLen], b[h.l4:h.hdrLen]
	return be32(u, 0) == be32(t, 0) && be32(u, tcpSeq) == seq && be32(u, tcpAck) == be32(t, tcpAck) &&
		u[tcpDataOff] == t[tcpDataOff] && be16(u, tcpWindow) == be16(t, tcpWindow) && be16(u, tcpUrgent) == be16(t, tcpUrgent) &&
		bytes.Equal(u[header.TCPMinimumSize:], t[header.TCPMinimumSize:])
}

// followers counts the packets at the head of the queue that continue pkt.
func (r *Reader) followers(pkt *stack.PacketBuffer) (n int) {
	if r.head == r.tail {
		return 0
	}
	first, ok := joinHeadOf(pkt)
	if !ok || first.flags()&^flagPSH != flagACK {
		return 0
	}
	seq, total := be32(first.b, first.l4+tcpSeq)+uint32(first.payload), first.hdrLen+first.payload
	for _, q := range r.queue[r.head:r.tail] {
		h, ok := joinHeadOf(q)
		if !ok || !h.continues(&first, seq, total) {
			break
		}
		n++
		if h.flags()&flagFIN != 0 {
			break
		}
		seq, total = seq+uint32(h.payload), total+h.payload
	}
	return n
}

// join adds the payloads of the next n packets of the queue, which followers has found, to what
// the segmenter has loaded, and keeps the packets until it is done.
func (r *Reader) join(n int) {
	loaded := len(r.views) - len(r.seg.views)
	for range n {
		q := r.next()
		r.appendViews(q, r.seg.hdrLen)
		r.seg.extend(q.Size()-r.seg.hdrLen, firstBytes(q)[r.seg.layout.l4+tcpFlags])
		r.current = append(r.current, q)
	}
	r.seg.views = r.views[loaded:]
}

// extend makes the superpacket that was just loaded n bytes longer, with the PSH and FIN of what is added.
// The caller adds the views.
func (s *segmenter) extend(n int, flags uint8) {
	s.left += n
	s.head[s.layout.l4+tcpFlags] |= flags & (flagPSH | flagFIN)
	if s.layout.version == 4 { // for whoever looks at the headers before prime
		binary.BigEndian.PutUint16(s.head[ip4TotalLen:], uint16(s.hdrLen+s.left))
	} else {
		binary.BigEndian.PutUint16(s.head[ip6PayloadLen:], uint16(s.hdrLen+s.left-header.IPv6MinimumSize))
	}
}
