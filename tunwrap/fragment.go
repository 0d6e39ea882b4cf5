package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// requeueFragments cuts the IPv4 packet b, which may be fragmented, into pieces of at most mtu
// bytes and queues them at the Link. It borrows b.
func (w *Wrapper) requeueFragments(b []byte, l *layout, mtu int) {
	if nat := w.nat.Load(); nat != nil {
		// The fragments will pass NAT like everything that comes from the Link.
		b = append([]byte(nil), b...)
		nat.undoOutbound(b, l)
	}
	var list stack.PacketBufferList
	ok := fragment(b, mtu, func(head, payload []byte) {
		v := buffer.NewView(len(head) + len(payload))
		v.Write(head)
		v.Write(payload)
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(v)})
		// A link may sort packets into flows by these.
		pkt.NetworkHeader().Consume(len(head))
		pkt.NetworkProtocolNumber = header.IPv4ProtocolNumber
		pkt.TransportProtocolNumber = header.IPv4(head).TransportProtocol()
		list.PushBack(pkt)
	})
	if !ok {
		w.drops.add(DropTooBig)
		return
	}
	n, _ := w.link.WritePackets(list)
	w.tooBig.frags.Add(uint64(n))
	if n < list.Len() {
		w.drops.add(DropClosed)
	}
	list.DecRef()
}

// fragment cuts the IPv4 packet b, which may be a fragment itself, into pieces of at most mtu
// bytes and lends the header and the payload of each to emit, in order. If the headers
// leave no room it does nothing and returns false. It borrows b.
func fragment(b []byte, mtu int, emit func(head, payload []byte)) bool {
	hlen := int(b[0]&0x0f) * 4
	var buf [header.IPv4MaximumHeaderSize]byte
	head := buf[:copy(buf[:hlen], b)]
	payload := b[hlen:]
	word := binary.BigEndian.Uint16(b[ip4FragOff:])
	more, at := word&ip4FlagMF, int(word&ip4Offset)*8
	// The first fragment has the longest header. Offsets above 64 KiB do not exist.
	if mtu-hlen < 8 || len(payload) == 0 || at+len(payload) > maxPacket {
		return false
	}
	for {
		n := len(payload)
		mf := more
		if n > mtu-len(head) {
			n, mf = (mtu-len(head))&^7, ip4FlagMF
		}
		binary.BigEndian.PutUint16(head[ip4TotalLen:], uint16(len(head)+n))
		binary.BigEndian.PutUint16(head[ip4FragOff:], mf|uint16(at/8))
		binary.BigEndian.PutUint16(head[ip4Checksum:], 0)
		binary.BigEndian.PutUint16(head[ip4Checksum:], ^sumOf(head))
		emit(head, payload[:n])
		payload = payload[n:]
		at += n
		if len(payload) == 0 {
			return true
		}
		head = head[:copiedOptions(head)]
	}
}

// copiedOptions reduces the options in the IPv4 header h to those that every fragment carries,
// in place, and returns the new length of the header (RFC 791 3.1).
func copiedOptions(h []byte) int {
	const end, nop, copied = 0, 1, 0x80
	n := header.IPv4MinimumSize
	for i := n; i < len(h) && h[i] != end; {
		size := 1
		if h[i] != nop {
			if i+1 == len(h) || h[i+1] < 2 || i+int(h[i+1]) > len(h) {
				break // malformed: nothing after it can be told apart
			}
			size = int(h[i+1])
		}
		if h[i]&copied != 0 {
			n += copy(h[n:], h[i:i+size])
		}
		i += size
	}
	for n%4 != 0 {
		h[n] = end
		n++
	}
	h[0] = 4<<4 | uint8(n/4)
	return n
}
