package tunwrap

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"testing"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/refs"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/header/parse"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// TestMain makes a PacketBuffer that is never released a panic at the end. Benchmarks run without,
// as it costs a map access under a lock for every reference.
func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		refs.SetLeakMode(refs.LeaksPanic)
	}
	code := m.Run()
	refs.DoLeakCheck()
	os.Exit(code)
}

// A spec describes a packet. The zero value is an empty TCP packet over IPv4.
type spec struct {
	v6       bool
	src, dst netip.Addr // default 10.0.0.1 and 10.0.0.2, fd00::1 and fd00::2
	tos      uint8
	ttl      uint8 // default 64
	label    uint32
	id       uint16
	df       bool
	// ipExtra are IPv4 options, padded to 4 bytes, or IPv6 extension headers, the
	// first of type ext.
	ipExtra []byte
	ext     uint8

	udp          bool
	sport, dport uint16
	seq, ack     uint32
	flags        uint8
	window       uint16
	urgent       uint16
	tcpOptions   []byte // padded to 4 bytes
	payload      []byte
}

func (s *spec) addrs() (src, dst netip.Addr) {
	src, dst = s.src, s.dst
	if !src.IsValid() {
		src = netip.MustParseAddr([]string{"10.0.0.1", "fd00::1"}[b2i(s.v6)])
	}
	if !dst.IsValid() {
		dst = netip.MustParseAddr([]string{"10.0.0.2", "fd00::2"}[b2i(s.v6)])
	}
	return src, dst
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func addrOf(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// l4Offset is the length of all IP headers.
func (s *spec) l4Offset() int {
	if s.v6 {
		return header.IPv6MinimumSize + len(s.ipExtra)
	}
	return header.IPv4MinimumSize + len(s.ipExtra)
}

func (s *spec) hdrLen() int {
	if s.udp {
		return s.l4Offset() + header.UDPMinimumSize
	}
	return s.l4Offset() + header.TCPMinimumSize + len(s.tcpOptions)
}

// gso is the offload metadata that belong to the spec.
func (s *spec) gso(size int) GSO {
	g := GSO{Type: GSOTCPv4, GSOSize: uint16(size), CsumOffset: header.TCPChecksumOffset, NeedsCsum: true}
	switch {
	case s.udp:
		g.Type, g.CsumOffset = GSOUDPL4, 6
	case s.v6:
		g.Type = GSOTCPv6
	}
	return g
}

// partial makes the packet with a partial checksum, encoded by gVisor's header package.
func (s *spec) partial() []byte {
	src, dst := s.addrs()
	b := make([]byte, s.hdrLen()+len(s.payload))
	l4 := b[s.l4Offset():]
	proto := header.TCPProtocolNumber
	if s.udp {
		proto = header.UDPProtocolNumber
	}
	pseudo := header.PseudoHeaderChecksum(proto, addrOf(src), addrOf(dst), uint16(len(l4)))
	if s.udp {
		header.UDP(l4).Encode(&header.UDPFields{SrcPort: s.sport, DstPort: s.dport, Length: uint16(len(l4)), Checksum: pseudo})
	} else {
		copy(l4[header.TCPMinimumSize:], s.tcpOptions)
		header.TCP(l4).Encode(&header.TCPFields{
			SrcPort: s.sport, DstPort: s.dport, SeqNum: s.seq, AckNum: s.ack,
			DataOffset: uint8(header.TCPMinimumSize + len(s.tcpOptions)),
			Flags:      header.TCPFlags(s.flags), WindowSize: s.window, Checksum: pseudo, UrgentPointer: s.urgent,
		})
	}
	copy(b[s.hdrLen():], s.payload)

	ttl := s.ttl
	if ttl == 0 {
		ttl = 64
	}
	if s.v6 {
		copy(b[header.IPv6MinimumSize:], s.ipExtra)
		header.IPv6(b).Encode(&header.IPv6Fields{
			TrafficClass: s.tos, FlowLabel: s.label, PayloadLength: uint16(len(b) - header.IPv6MinimumSize),
			TransportProtocol: proto, HopLimit: ttl, SrcAddr: addrOf(src), DstAddr: addrOf(dst),
		})
		if len(s.ipExtra) > 0 {
			header.IPv6(b).SetNextHeader(s.ext)
		}
		return b
	}
	copy(b[header.IPv4MinimumSize:], s.ipExtra)
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{
		TOS: s.tos, TotalLength: uint16(len(b)), ID: s.id, TTL: ttl, Protocol: uint8(proto),
		SrcAddr: addrOf(src), DstAddr: addrOf(dst),
	})
	ip.SetHeaderLength(uint8(s.l4Offset()))
	if s.df {
		ip.SetFlagsFragmentOffset(header.IPv4FlagDontFragment, 0)
	}
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	return b
}

// full makes the packet with a finished checksum.
func (s *spec) full() []byte {
	b := s.partial()
	l4 := b[s.l4Offset():]
	at := header.TCPChecksumOffset
	if s.udp {
		at = 6
	}
	c := ^slowSum(l4)
	if c == 0 && s.udp {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(l4[at:], c)
	return b
}

// slowSum is the one's complement sum of b, word by word.
func slowSum(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		if i%2 == 0 {
			sum += uint32(v) << 8
		} else {
			sum += uint32(v)
		}
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// plainSegments is the slow segmenter: it makes every segment as a packet of its own.
func (s *spec) plainSegments(size int) [][]byte {
	var out [][]byte
	left := s.payload
	for i := 0; ; i++ {
		seg := *s
		n := min(size, len(left))
		seg.payload, left = left[:n], left[n:]
		seg.id = s.id + uint16(i)
		seg.seq = s.seq + uint32(i*size)
		if len(left) > 0 {
			seg.flags &^= uint8(header.TCPFlagFin | header.TCPFlagPsh)
		}
		if i > 0 {
			seg.flags &^= 0x80 // CWR
		}
		out = append(out, seg.full())
		if len(left) == 0 {
			return out
		}
	}
}

// parsed asks gVisor for the parts of a packet. It fails if gVisor cannot parse it.
func parsed(b []byte) (pkt *stack.PacketBuffer, proto tcpip.TransportProtocolNumber, err error) {
	pkt = stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	bad := func(format string, a ...any) (*stack.PacketBuffer, tcpip.TransportProtocolNumber, error) {
		pkt.DecRef()
		return nil, 0, fmt.Errorf(format, a...)
	}
	switch header.IPVersion(b) {
	case 4:
		if !parse.IPv4(pkt) {
			return bad("gVisor cannot parse the IPv4 header")
		}
		ip := header.IPv4(pkt.NetworkHeader().Slice())
		if !ip.IsValid(len(b)) {
			return bad("gVisor finds the IPv4 header invalid")
		}
		if !ip.IsChecksumValid() {
			return bad("IPv4 checksum")
		}
		if ip.FragmentOffset() != 0 || ip.More() {
			return bad("a fragment")
		}
		proto = ip.TransportProtocol()
	case 6:
		p, _, off, more, ok := parse.IPv6(pkt)
		if !ok {
			return bad("gVisor cannot parse the IPv6 header")
		}
		if off != 0 || more {
			return bad("a fragment")
		}
		if p == 0 && (pkt.Data().Size() > 0 || len(b) == header.IPv6MinimumSize && b[6] != 59) {
			return bad("gVisor's parser has stopped at an extension header")
		}
		proto = p
	default:
		return bad("no version")
	}
	return pkt, proto, nil
}

// valid checks lengths and all checksums of the whole packet b by gVisor's code.
func valid(b []byte) error {
	pkt, proto, err := parsed(b)
	if err != nil {
		return err
	}
	defer pkt.DecRef()
	net := pkt.Network()
	if int(net.(interface{ PayloadLength() uint16 }).PayloadLength()) != len(b)-ipFixed(b) {
		return fmt.Errorf("IP length: %d for %d bytes", net.(interface{ PayloadLength() uint16 }).PayloadLength(), len(b))
	}
	switch proto {
	case header.TCPProtocolNumber:
		if !parse.TCP(pkt) {
			return fmt.Errorf("gVisor cannot parse the TCP header")
		}
		if h := header.TCP(pkt.TransportHeader().Slice()); int(h.DataOffset()) > len(h) || h.DataOffset() < header.TCPMinimumSize {
			return fmt.Errorf("TCP data offset")
		}
		if !header.TCP(pkt.TransportHeader().Slice()).IsChecksumValid(net.SourceAddress(), net.DestinationAddress(), pkt.Data().Checksum(), uint16(pkt.Data().Size())) {
			return fmt.Errorf("TCP checksum")
		}
	case header.UDPProtocolNumber:
		if !parse.UDP(pkt) {
			return fmt.Errorf("gVisor cannot parse the UDP header")
		}
		u := header.UDP(pkt.TransportHeader().Slice())
		if header.IPVersion(b) == 4 && u.Checksum() == 0 {
			return nil
		}
		if u.Checksum() == 0 || !u.IsChecksumValid(net.SourceAddress(), net.DestinationAddress(), pkt.Data().Checksum()) {
			return fmt.Errorf("UDP checksum")
		}
	case header.ICMPv4ProtocolNumber:
		if header.IPVersion(b) == 6 {
			return nil // nobody's
		}
		if pkt.Data().Size() < header.ICMPv4MinimumSize {
			return fmt.Errorf("ICMP header")
		}
		if checksum.Checksum(b[4*int(b[0]&15):], 0) != 0xffff {
			return fmt.Errorf("ICMP checksum")
		}
	case header.ICMPv6ProtocolNumber:
		if header.IPVersion(b) == 4 {
			return nil // nobody's
		}
		if pkt.Data().Size() < header.ICMPv6MinimumSize {
			return fmt.Errorf("ICMPv6 header")
		}
		h := header.ICMPv6(b[len(b)-pkt.Data().Size():])
		if h.Checksum() != header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: h[:header.ICMPv6MinimumSize], Src: net.SourceAddress(), Dst: net.DestinationAddress(),
			PayloadCsum: checksum.Checksum(h[header.ICMPv6MinimumSize:], 0), PayloadLen: len(h) - header.ICMPv6MinimumSize,
		}) {
			return fmt.Errorf("ICMPv6 checksum")
		}
	}
	return nil
}

// ipFixed is the length of the part of the IP header that PayloadLength leaves out.
func ipFixed(b []byte) int {
	if header.IPVersion(b) == 4 {
		return 4 * int(b[0]&15)
	}
	return header.IPv6MinimumSize
}

// split runs b through a segmenter, its bytes cut into views at the given places. bufs is how many
// buffers there are at a time.
func split(t testing.TB, b []byte, g GSO, nat *natTable, cuts []int) [][]byte {
	t.Helper()
	input := bytes.Clone(b)
	var s segmenter
	if d := s.load(cut(b, cuts), len(b), g); d != DropNone {
		t.Fatalf("load: %v", d)
	}
	if nat != nil {
		nat.outbound(s.headers(), &s.layout, &s.gso)
	}
	s.prime()
	var out [][]byte
	for s.busy {
		dst := make([]byte, s.segmentLen())
		s.next(dst)
		out = append(out, dst)
	}
	if !bytes.Equal(input, b) {
		t.Fatal("the segmenter has changed its input")
	}
	return out
}

// cut slices b at the places.
func cut(b []byte, places []int) [][]byte {
	var views [][]byte
	for _, p := range places {
		p = min(p, len(b))
		views = append(views, b[:p:p])
		b = b[p:]
	}
	return append(views, b)
}

// A fakeLink gives out the packets it is told to and keeps what is delivered.
type fakeLink struct {
	queue     []*stack.PacketBuffer
	forever   []*stack.PacketBuffer // given out, with a reference each, when queue is empty
	delivered func(pkt *stack.PacketBuffer)
	requeued  func(pkt *stack.PacketBuffer)
	closed    bool
}

func (l *fakeLink) Dequeue(pkts []*stack.PacketBuffer) (int, error) {
	if n := copy(pkts, l.queue); n > 0 {
		l.queue = l.queue[n:]
		return n, nil
	}
	if n := copy(pkts, l.forever); n > 0 {
		for _, p := range pkts[:n] {
			p.IncRef()
		}
		return n, nil
	}
	return 0, fmt.Errorf("fakeLink: %w", os.ErrClosed)
}

func (l *fakeLink) Deliver(pkt *stack.PacketBuffer) {
	if l.delivered != nil {
		l.delivered(pkt)
	}
	pkt.DecRef()
}

func (l *fakeLink) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	for _, pkt := range list.AsSlice() {
		if l.requeued != nil {
			l.requeued(pkt)
		}
		l.queue = append(l.queue, pkt.IncRef())
	}
	return list.Len(), nil
}

func (l *fakeLink) Close() error {
	l.closed = true
	for _, p := range l.queue {
		p.DecRef()
	}
	l.queue, l.forever = nil, nil
	return nil
}

// outboundPacket makes what a stack would queue: the headers in one view, the payload in
// others. g is translated back to the stack's terms.
func outboundPacket(b []byte, hdrLen int, g GSO, cuts ...int) *stack.PacketBuffer {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{ReserveHeaderBytes: hdrLen + 10})
	copy(pkt.NetworkHeader().Push(hdrLen), b)
	for _, v := range cut(b[hdrLen:], cuts) {
		if len(v) == 0 {
			continue
		}
		buf := buffer.MakeWithData(v)
		pkt.Data().MergeBuffer(&buf)
	}
	if g.NeedsCsum {
		pkt.GSOOptions = stack.GSO{
			Type: stack.GSOTCPv4, NeedsCsum: true, CsumOffset: g.CsumOffset, MSS: g.GSOSize, L3HdrLen: header.IPv4MinimumSize,
		}
		if header.IPVersion(b) == 6 {
			pkt.GSOOptions.Type, pkt.GSOOptions.L3HdrLen = stack.GSOTCPv6, header.IPv6MinimumSize
		}
	}
	return pkt
}

// readAll reads until the link is closed, into batch buffers of size bytes at a time.
func readAll(t testing.TB, w *Wrapper, batch, size int) [][]byte {
	t.Helper()
	bufs, sizes := make([][]byte, batch), make([]int, batch)
	for i := range bufs {
		bufs[i] = make([]byte, size)
	}
	var out [][]byte
	for {
		n, err := w.Read(bufs, sizes, headroom)
		if err != nil {
			return out
		}
		if n == 0 {
			t.Fatal("Read gave nothing")
		}
		for i := range n {
			out = append(out, bytes.Clone(bufs[i][headroom:headroom+sizes[i]]))
		}
	}
}

// bytesOf copies a whole packet out.
func bytesOf(pkt *stack.PacketBuffer) []byte {
	v := pkt.ToView()
	defer v.Release()
	return v.ToSlice()
}

func payload(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}

// differ describes the first difference between two lists of packets.
func differ(got, want [][]byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d packets, want %d", len(got), len(want))
	}
	for i := range got {
		if !bytes.Equal(got[i], want[i]) {
			return fmt.Errorf("packet %d:\n got %x\nwant %x", i, got[i][:min(len(got[i]), 160)], want[i][:min(len(want[i]), 160)])
		}
	}
	return nil
}
