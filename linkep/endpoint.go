package linkep

import (
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	// DefaultGSOMaxSize is the largest superpacket, headers included, that the
	// stack is told to send, in bytes. gVisor's TCP leaves 161 bytes of it for
	// headers (measured), so that an IP packet never passes 65,535 bytes.
	DefaultGSOMaxSize = 64 << 10

	// DefaultQueueBytes bounds the outbound queue: 8 MiB are some 13,000 segments of
	// TCP, super or not, or 5,000 full-sized datagrams.
	DefaultQueueBytes = 8 << 20

	// DefaultMTU is what every IPv6 path carries (RFC 8200 5).
	DefaultMTU = 1280
)

// Options configure an [Endpoint]. The zero value is good.
type Options struct {
	// MTU is the largest segment, in bytes; 0 means DefaultMTU. SetMTU changes it
	// later.
	MTU uint32

	// GSOMaxSize is the largest superpacket in bytes. 0, and anything above it,
	// means DefaultGSOMaxSize.
	GSOMaxSize uint32

	// NoGSO tells the stack to split by itself: every packet then fits the MTU and
	// carries a full checksum.
	NoGSO bool

	// QueueBytes bounds each outbound queue by the memory that the packets in it cost:
	// stack.PacketBufferStructSize and their bytes, but not the payload of TCP connections,
	// which lies in their send buffers anyway. 0 means DefaultQueueBytes.
	QueueBytes int

	// Queues is the number of outbound queues, for as many readers; 0 means 1. A
	// flow always uses the same one.
	Queues int
}

// Endpoint is a link endpoint of a gVisor stack. Create it with [New].
type Endpoint struct {
	noGSO      bool
	gsoMaxSize uint32
	queues     []*Queue

	mtu        atomic.Uint32
	closed     atomic.Bool
	dispatcher atomic.Pointer[stack.NetworkDispatcher]

	// Inbound drops. Outbound ones are counted by the queues, under their locks.
	notAttached atomic.Uint64
	malformed   atomic.Uint64
}

var (
	_ stack.LinkEndpoint = (*Endpoint)(nil)
	_ stack.GSOEndpoint  = (*Endpoint)(nil)
)

// New makes an Endpoint. It has no goroutines; Close releases what is queued.
func New(o Options) *Endpoint {
	if o.MTU == 0 {
		o.MTU = DefaultMTU
	}
	if o.GSOMaxSize == 0 || o.GSOMaxSize > DefaultGSOMaxSize {
		o.GSOMaxSize = DefaultGSOMaxSize
	}
	if o.QueueBytes <= 0 {
		o.QueueBytes = DefaultQueueBytes
	}
	e := &Endpoint{noGSO: o.NoGSO, gsoMaxSize: o.GSOMaxSize}
	e.mtu.Store(o.MTU)
	for range max(o.Queues, 1) {
		e.queues = append(e.queues, newQueue(e, o.QueueBytes))
	}
	return e
}

// WritePackets queues outbound packets; it implements [stack.LinkWriter]. The
// caller keeps its references: the queue adds one of its own to each packet, which
// goes to whoever dequeues it. It never waits; see the package comment for a full
// queue. Nothing but Close makes it fail.
func (e *Endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	for i, pkt := range pkts.AsSlice() {
		h := flowHash(pkt)
		// The bucket is picked by the high bits, the queue by the low ones.
		q := e.queues[0]
		if n := uint32(len(e.queues)); n > 1 {
			q = e.queues[h%n]
		}
		if !q.enqueue(pkt, h) {
			return i, &tcpip.ErrClosedForSend{}
		}
	}
	return pkts.Len(), nil
}

// Dequeue is the Dequeue of the first queue.
func (e *Endpoint) Dequeue(pkts []*stack.PacketBuffer) (n int, err error) {
	return e.queues[0].Dequeue(pkts)
}

// Queues are the outbound queues, Options.Queues of them. Each wants one reader.
func (e *Endpoint) Queues() []*Queue { return e.queues }

// Deliver hands an inbound packet, its network header still in Data, to the stack.
// It takes the caller's reference. The caller has verified the checksums of the
// packet: the stack does not look at them. When the endpoint is closed or no stack
// is attached, the packet is released and counted.
func (e *Endpoint) Deliver(pkt *stack.PacketBuffer) {
	defer pkt.DecRef()
	d := e.dispatcher.Load()
	if d == nil || e.closed.Load() {
		e.notAttached.Add(1)
		return
	}
	first, ok := pkt.Data().PullUp(1)
	if !ok {
		e.malformed.Add(1)
		return
	}
	switch first[0] >> 4 {
	case header.IPv4Version:
		(*d).DeliverNetworkPacket(header.IPv4ProtocolNumber, pkt)
	case header.IPv6Version:
		(*d).DeliverNetworkPacket(header.IPv6ProtocolNumber, pkt)
	default:
		e.malformed.Add(1)
	}
}

// Shutdown refuses packets from now on but lets Dequeue give out what is queued;
// after the last packet Dequeue fails as if closed.
func (e *Endpoint) Shutdown() {
	for _, q := range e.queues {
		q.close(false)
	}
}

// Close refuses packets from now on, releases what is queued and wakes the
// readers, whose Dequeue returns [os.ErrClosed]. It may be called twice, and the
// stack calls it when its NIC is removed.
func (e *Endpoint) Close() {
	e.closed.Store(true)
	for _, q := range e.queues {
		q.close(true)
	}
}

// MTU implements [stack.NetworkLinkEndpoint].
func (e *Endpoint) MTU() uint32 { return e.mtu.Load() }

// SetMTU implements [stack.NetworkLinkEndpoint]. Connections that are open follow
// at the next "too big" message that reaches them.
func (e *Endpoint) SetMTU(mtu uint32) { e.mtu.Store(mtu) }

// GSOMaxSize implements [stack.GSOEndpoint].
func (e *Endpoint) GSOMaxSize() uint32 {
	if e.noGSO {
		return 0
	}
	return e.gsoMaxSize
}

// SupportedGSO implements [stack.GSOEndpoint]. TCP asks once, when a connection is
// set up.
func (e *Endpoint) SupportedGSO() stack.SupportedGSO {
	if e.noGSO {
		return stack.GSONotSupported
	}
	return stack.HostGSOSupported
}

// Capabilities implements [stack.NetworkLinkEndpoint]: the checksums of inbound
// packets have been verified before Deliver. It is all or nothing; the stack
// overwrites what a packet says of itself.
func (e *Endpoint) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

// Attach implements [stack.NetworkLinkEndpoint].
func (e *Endpoint) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		e.dispatcher.Store(nil)
		return
	}
	e.dispatcher.Store(&d)
}

// IsAttached implements [stack.NetworkLinkEndpoint].
func (e *Endpoint) IsAttached() bool { return e.dispatcher.Load() != nil }

// MaxHeaderLength implements [stack.NetworkLinkEndpoint]: there is no link header.
func (*Endpoint) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements [stack.NetworkLinkEndpoint]: there is none.
func (*Endpoint) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements [stack.NetworkLinkEndpoint].
func (*Endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType implements [stack.NetworkLinkEndpoint].
func (*Endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements [stack.NetworkLinkEndpoint].
func (*Endpoint) AddHeader(*stack.PacketBuffer) {}

// ParseHeader implements [stack.NetworkLinkEndpoint].
func (*Endpoint) ParseHeader(*stack.PacketBuffer) bool { return true }

// Wait implements [stack.NetworkLinkEndpoint]: there are no goroutines to wait for.
func (*Endpoint) Wait() {}

// SetOnCloseAction implements [stack.NetworkLinkEndpoint].
func (*Endpoint) SetOnCloseAction(func()) {}

// Stats are the counters of an [Endpoint].
type Stats struct {
	Queues      []QueueStats
	NotAttached uint64 // inbound packets released: no stack attached, or closed
	Malformed   uint64 // inbound packets released: empty, or neither IPv4 nor IPv6
}

// Stats returns a snapshot.
func (e *Endpoint) Stats() Stats {
	s := Stats{NotAttached: e.notAttached.Load(), Malformed: e.malformed.Load()}
	for _, q := range e.queues {
		s.Queues = append(s.Queues, q.Stats())
	}
	return s
}
