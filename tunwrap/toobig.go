package tunwrap

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// tooBigPerSecond and tooBigBurst limit messages to the stack over all flows. They
	// cost a delivery each and nothing on the wire; a thousand flows may hit a
	// shrunken path at once.
	tooBigPerSecond = 1000
	tooBigBurst     = 256

	// tooBigQuiet is how long a flow is not told the same MTU again. A superpacket
	// becomes dozens of segments that are all too big, and the stack acts upon the first
	// message.
	tooBigQuiet = 100 * time.Millisecond

	// icmp4Quote bounds an ICMP error in bytes (RFC 1812 4.3.2.3), and an
	// ICMPv6 error is bounded by the minimum MTU (RFC 4443 2.4 c).
	icmp4Quote = 576

	// icmpTTL is what Linux gives to ICMP errors by default (net.ipv4.ip_default_ttl).
	icmpTTL = 64
	// icmp4TOS is the precedence "internetwork control" (RFC 1812 4.3.2.5).
	icmp4TOS = 0xc0
)

// tooBig is the state of TooBig. Nothing of it is touched while packets fit.
type tooBig struct {
	limit    *rate.Limiter
	messages atomic.Uint64
	frags    atomic.Uint64

	mu sync.Mutex
	// told is a cache of the flows told lately, by the low bits of their hash.
	told [64]struct {
		flow uint64
		at   time.Time
	}
}

var tooBigSeed = maphash.MakeSeed()

// A tooBigSink is what stands behind a TooBig: the local stack, or the kernel.
type tooBigSink interface {
	// takeMessage takes b, an inbound ICMP message that is made here.
	takeMessage(b []byte)
	// requeueFragments cuts the IPv4 packet b, which may be fragmented, into pieces of at
	// most mtu bytes, to come out of a later Read. It borrows b.
	requeueFragments(b []byte, l *layout, mtu int)
}

// TooBig is for whoever has got packet from Read and finds that its path carries only
// packets of mtu bytes. It borrows packet until it returns and may be called from any
// goroutine; it calls Deliver or WritePackets of the Link on the caller's.
//
// If packet may not be fragmented (IPv6, or IPv4 with DF), the stack gets an ICMP "packet
// too big" (RFC 4443 3.2) or "fragmentation needed" (RFC 792, RFC 1191), which seems to
// come from packet's destination: an address the stack routes to the tunnel, and of which
// it asks no more than that the packet quoted be its own (so do gVisor's handleControl and
// Linux's icmp_unreach). Otherwise packet is fragmented (RFC 791 3.2), and
// the fragments are queued at the Link to come out of a later Read.
//
// Nobody is told about an ICMP error, a packet to or from a group or an address that is
// nobody's, or a fragment other than the first (RFC 1122 3.2.2, RFC 4443 2.4 e). The MTU
// reported is never below 1280 for IPv6 (RFC 8200 5) and 68 for IPv4 (RFC 791 3.2), since
// stacks take less for an attack or, worse, at its word.
func (w *Wrapper) TooBig(packet []byte, mtu int) {
	w.tooBig.report(packet, mtu, w.nat.Load(), &w.drops, w)
}

// report is the TooBig of a device with these rules, counters and sink.
func (t *tooBig) report(packet []byte, mtu int, nat *natTable, drops *dropCounters, sink tooBigSink) {
	l, d := locate(packet, len(packet))
	if d != DropNone {
		drops.add(d)
		return
	}
	packet = packet[:l.total]
	if l.version == 4 && binary.BigEndian.Uint16(packet[ip4FragOff:])&ip4FlagDF == 0 {
		if len(packet) <= mtu {
			drops.add(DropTooBig) // it would come back for ever
			return
		}
		sink.requeueFragments(packet, &l, mtu)
		return
	}
	least := header.IPv4MinimumMTU
	if l.version == 6 {
		least = header.IPv6MinimumMTU
	}
	mtu = max(mtu, least)
	if len(packet) <= mtu || !mayReport(packet, &l) {
		drops.add(DropTooBig)
		return
	}
	if !t.allow(packet, &l, mtu) {
		drops.add(DropTooBigRate)
		return
	}
	m := fragmentationNeeded
	if l.version == 6 {
		m = packetTooBig
	}
	b := m(packet, mtu)
	if nat != nil { // as if it had come from the peer
		l, _ := locate(b, len(b))
		nat.inbound(b, &l)
	}
	t.messages.Add(1)
	sink.takeMessage(b)
}

// takeMessage delivers b to the Link.
func (w *Wrapper) takeMessage(b []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	pkt.NetworkProtocolNumber = networkProtocol(b[0] >> 4)
	w.link.Deliver(pkt)
}

// allow reports whether the flow of packet may be told mtu now.
func (t *tooBig) allow(packet []byte, l *layout, mtu int) bool {
	var h maphash.Hash
	h.SetSeed(tooBigSeed)
	h.Write(l.addresses(packet))
	h.WriteByte(l.proto)
	if len(packet) >= l.l4+4 {
		h.Write(packet[l.l4 : l.l4+4])
	}
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(mtu)))
	flow, now := h.Sum64(), time.Now()

	t.mu.Lock()
	defer t.mu.Unlock()
	e := &t.told[flow%uint64(len(t.told))]
	if e.flow == flow && now.Sub(e.at) < tooBigQuiet {
		return false
	}
	if !t.limit.AllowN(now, 1) {
		return false
	}
	e.flow, e.at = flow, now
	return true
}

// mayReport reports whether the packet b is one about which its sender may be told.
func mayReport(b []byte, l *layout) bool {
	if l.later || l.l4 < l.total && isICMPError(b, l) {
		return false
	}
	a := l.addresses(b)
	src, _ := netip.AddrFromSlice(a[:len(a)/2])
	dst, _ := netip.AddrFromSlice(a[len(a)/2:])
	broadcast := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	for _, a := range []netip.Addr{src, dst} {
		if a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a == broadcast {
			return false
		}
	}
	return true
}

// fragmentationNeeded makes the ICMP message about the IPv4 packet b, as the stack will
// see it. It borrows b.
func fragmentationNeeded(b []byte, mtu int) []byte {
	const hdr = header.IPv4MinimumSize + header.ICMPv4MinimumSize
	m := make([]byte, hdr, icmp4Quote)
	m = append(m, b[:min(len(b), icmp4Quote-hdr)]...)

	m[0], m[1] = 0x45, icmp4TOS
	binary.BigEndian.PutUint16(m[ip4TotalLen:], uint16(len(m)))
	binary.BigEndian.PutUint16(m[ip4FragOff:], ip4FlagDF) // so the ID may be 0
	m[ip4TTL], m[ip4Proto] = icmpTTL, protoICMP
	copy(m[ip4Src:], b[ip4Dst:ip4Dst+4])
	copy(m[ip4Dst:], b[ip4Src:ip4Src+4])
	binary.BigEndian.PutUint16(m[ip4Checksum:], ^sumOf(m[:header.IPv4MinimumSize]))

	t := header.ICMPv4(m[header.IPv4MinimumSize:])
	t.SetType(header.ICMPv4DstUnreachable)
	t.SetCode(header.ICMPv4FragmentationNeeded)
	t.SetMTU(uint16(min(mtu, maxPacket)))
	t.SetChecksum(^sumOf(t))
	return m
}

// packetTooBig makes the ICMPv6 message about the IPv6 packet b, as the stack will see
// it. It borrows b.
func packetTooBig(b []byte, mtu int) []byte {
	const hdr = header.IPv6MinimumSize + header.ICMPv6PacketTooBigMinimumSize
	m := make([]byte, hdr, header.IPv6MinimumMTU)
	m = append(m, b[:min(len(b), header.IPv6MinimumMTU-hdr)]...)

	m[0] = 0x60
	binary.BigEndian.PutUint16(m[ip6PayloadLen:], uint16(len(m)-header.IPv6MinimumSize))
	m[ip6NextHeader], m[ip6HopLimit] = protoICMPv6, icmpTTL
	copy(m[ip6Src:], b[ip6Dst:ip6Dst+16])
	copy(m[ip6Dst:], b[ip6Src:ip6Src+16])

	t := header.ICMPv6(m[header.IPv6MinimumSize:])
	t.SetType(header.ICMPv6PacketTooBig)
	t.SetMTU(uint32(mtu))
	l := layout{version: 6, proto: protoICMPv6, l4: header.IPv6MinimumSize, total: len(m)}
	t.SetChecksum(^fold(uint32(pseudoSum(m, &l, len(t))) + uint32(sumOf(t))))
	return m
}
