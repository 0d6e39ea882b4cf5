package netstack

import (
	"context"
	"encoding/binary"
	"net"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// forwardUDP carries datagrams between the peers and sockets of the system. A flow
// is a client's address and port with a target's; the stack's part in it is to
// reassemble and to fragment. There is no socket of the stack, so a flow costs one
// of the system, one goroutine and no buffer while it is silent.
type forwardUDP struct{ flowTable }

func (f *forwardUDP) init(r *router) {
	l := &r.cfg.Limits
	f.flowTable.init(r, 0, l.UDP, l.UDPPerPeer, min(r.cfg.Timeouts.UDPIdle, r.cfg.Timeouts.DNSIdle))
	r.stack.SetTransportProtocolHandler(udp.ProtocolNumber, f.handle)
}

// handle is the stack's handler for datagrams. It borrows pkt. It always answers
// for it, lest the stack do.
func (f *forwardUDP) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.UDP(pkt.TransportHeader().Slice())
	payload, ok := pkt.Data().PullUp(pkt.Data().Size())
	// The length in the header may be below that of the packet (RFC 768).
	size := int(h.Length()) - header.UDPMinimumSize
	if !ok || size < 0 || size > len(payload) || id.LocalPort == 0 || !validUDP(pkt) {
		f.router.refuse(refusedMalformed)
		return true
	}
	flow := f.find(id)
	if flow == nil {
		if flow = f.begin(id, pkt); flow == nil {
			return true
		}
	}
	ttl, mayFragment := forwardedAs(pkt)
	flow.send(payload[:size:size], ttl, mayFragment)
	return true
}

// begin makes the flow of a client's first datagram; nil if there is none to be.
func (f *forwardUDP) begin(id stack.TransportEndpointID, pkt *stack.PacketBuffer) *datagramFlow {
	r := f.router
	peer := r.peerOf(id.RemoteAddress)
	if peer == nil {
		r.refuse(refusedPeer)
		return nil
	}
	v := r.policy.decide(peer.key, "udp", targetOf(id))
	if v.refusal != notRefused {
		r.refuse(v.refusal)
		r.errs.send(errProhibited, pkt)
		return nil
	}
	idle := r.cfg.Timeouts.UDPIdle
	if id.LocalPort == 53 {
		idle = r.cfg.Timeouts.DNSIdle
	}
	return f.admit(&datagramFlow{
		kind: f, id: id, peer: peer, verdict: v, idle: idle, head: headOf(pkt, uint8(udp.ProtocolNumber)),
	})
}

// forwardedAs is the TTL that is left for pkt, and whether it may be fragmented on
// its way. (IPv6 has no routers that fragment, but this one is where its packets
// begin anew.)
func forwardedAs(pkt *stack.PacketBuffer) (ttl uint8, mayFragment bool) {
	b := pkt.NetworkHeader().Slice()
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		return header.IPv6(b).HopLimit(), true
	}
	h := header.IPv4(b)
	return h.TTL(), h.Flags()&header.IPv4FlagDontFragment == 0
}

// headSize is enough of a packet for an ICMP error about it: the longest IPv4
// header, or that of IPv6, and the 8 bytes that RFC 792 asks for.
const headSize = header.IPv4MaximumHeaderSize + 8

// headOf copies the beginning of pkt: its IP header, without the extension headers
// of IPv6, and the first 8 bytes after them.
func headOf(pkt *stack.PacketBuffer, proto uint8) []byte {
	b := make([]byte, 0, headSize)
	network := pkt.NetworkHeader().Slice()
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		b = append(b, network[:header.IPv6MinimumSize]...)
		header.IPv6(b).SetNextHeader(proto)
	} else {
		b = append(b, network...)
	}
	t := pkt.TransportHeader().Slice()
	return append(b, t[:min(len(t), 8)]...)
}

// setLength writes the length of the packet that begins with b into its IP header.
func setLength(b []byte, total int) {
	if b[0]>>4 == header.IPv6Version {
		header.IPv6(b).SetPayloadLength(uint16(total - header.IPv6MinimumSize))
		return
	}
	h := header.IPv4(b)
	h.SetTotalLength(uint16(total))
	h.SetChecksum(0)
	h.SetChecksum(^h.CalculateChecksum())
}

// open implements flowKind.
func (f *forwardUDP) open(ctx context.Context, flow *datagramFlow) (flowSocket, error) {
	c, err := f.router.open(ctx, flow.peer.flow("udp", flow.id), flow.verdict)
	if err != nil {
		return nil, err
	}
	if s := newUDPFlowSocket(c); s != nil {
		return s, nil
	}
	return newConnSocket(f.router, c), nil
}

// reply implements flowKind: the datagram comes from the address that was asked.
func (f *forwardUDP) reply(flow *datagramFlow, route *stack.Route, d []byte) bool {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(d),
	})
	defer pkt.DecRef()
	h := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	pkt.TransportProtocolNumber = udp.ProtocolNumber
	length := uint16(header.UDPMinimumSize + len(d))
	h.Encode(&header.UDPFields{SrcPort: flow.id.LocalPort, DstPort: flow.id.RemotePort, Length: length})
	sum := ^h.CalculateChecksum(checksum.Combine(route.PseudoHeaderChecksum(udp.ProtocolNumber, length), checksum.Checksum(d, 0)))
	if sum == 0 {
		sum = 0xffff // 0 would mean none (RFC 768)
	}
	h.SetChecksum(sum)
	return route.WritePacket(stack.NetworkHeaderParams{Protocol: udp.ProtocolNumber, TTL: route.DefaultTTL()}, pkt) == nil
}

// cause implements flowKind: the ports of a flow are those of all its packets.
func (f *forwardUDP) cause(flow *datagramFlow, head []byte) []byte {
	b := append([]byte(nil), flow.head...)
	if n := len(b) - header.UDPMinimumSize; head != nil && n > 0 {
		size := header.UDPMinimumSize + len(head)
		binary.BigEndian.PutUint16(b[n+4:], uint16(size))
		setLength(b, n+size)
		b = append(b, head[:min(len(head), mostError4)]...)
	}
	return b
}

// A connSocket is a flowSocket of any connection, such as a hook gives. Its Write
// may wait, which the tunnel cannot, so a goroutine does it; what is too fast for it
// is dropped.
type connSocket struct {
	net.Conn
	receiver func() (*burst, error)
	queue    chan []byte
	closed   chan struct{}
	once     sync.Once
}

// connQueue is how many datagrams wait for a connection that is not a socket.
const connQueue = 64

func newConnSocket(r *router, c net.Conn) *connSocket {
	s := &connSocket{Conn: c, receiver: burstReader(c), queue: make(chan []byte, connQueue), closed: make(chan struct{})}
	r.spawn(func() {
		for {
			select {
			case b := <-s.queue:
				s.Conn.Write(b) // an error comes again in receive, or is a lost datagram
			case <-s.closed:
				return
			}
		}
	})
	return s
}

func (s *connSocket) send(b []byte, _ uint8, _ bool) error {
	select {
	case s.queue <- append([]byte(nil), b...):
		return nil
	default:
		return &net.OpError{Op: "write", Net: "udp", Err: refusal(droppedSend)}
	}
}

func (s *connSocket) receive() (*burst, error) { return s.receiver() }
func (s *connSocket) troubles() []trouble      { return nil }

func (s *connSocket) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}
