package tunwrap

import (
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// viewSize is how much of a superpacket goes into one view, in bytes. gVisor's chunks have
// powers of two as sizes, up to 64 KiB, and are cleared whole when they are taken: large
// ones waste clearing on all but the largest superpackets, small ones cost their overhead
// over and over. By BenchmarkPacketBuffer 16 to 64 KiB differ little (about 2.2 to 2.6 us
// for 60,000 bytes), 8 KiB is slower (3.4 us).
const viewSize = 32 << 10

// packetBuffer makes the packet that group g of c becomes, ready for Link.Deliver. It
// copies every byte once. The headers of a superpacket get a view of their own: the
// stack reads them through PullUp, which copies the whole chunk when it is shared, and
// the chunks of a payload are shared as soon as TCP queues it.
func packetBuffer(c *coalescer, g *group) *stack.PacketBuffer {
	return packetBufferOf(c, g, viewSize)
}

// packetBufferOf is packetBuffer with views of size bytes.
func packetBufferOf(c *coalescer, g *group, size int) *stack.PacketBuffer {
	first := c.packets[g.first].b
	var payload buffer.Buffer
	if g.count == 1 {
		payload = buffer.MakeWithView(buffer.NewViewWithData(first))
	} else {
		payload = buffer.MakeWithView(buffer.NewViewWithData(first[:g.hdrLen]))
		left := g.total - g.hdrLen
		v := buffer.NewView(min(left, size))
		for i := g.first; i != none; i = c.packets[i].next {
			for b := c.packets[i].b[g.hdrLen:]; len(b) > 0; {
				room := v.AvailableSize()
				if room == 0 {
					appendView(&payload, v)
					v = buffer.NewView(min(left, size))
					continue
				}
				n := min(room, len(b))
				v.Write(b[:n]) // never short: there is room
				b = b[n:]
				left -= n
			}
		}
		appendView(&payload, v)
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: payload})
	pkt.NetworkProtocolNumber = networkProtocol(g.layout.version)
	if g.count > 1 {
		// For a Link that sends the packet out again, and has to split it as it was. A stack does not look at it
		// without a Type.
		pkt.GSOOptions.MSS = uint16(g.size)
	}
	return pkt
}

// appendView adds v to the end of b, which takes it. Buffer.Append would copy into the
// room that the view before has left.
func appendView(b *buffer.Buffer, v *buffer.View) {
	other := buffer.MakeWithView(v)
	b.Merge(&other)
}

func networkProtocol(version uint8) tcpip.NetworkProtocolNumber {
	if version == 4 {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
