package tunwrap

import "gvisor.dev/gvisor/pkg/tcpip/stack"

// Link is the stack side of a [Wrapper]: where outbound packets come from and
// inbound packets go. linkep.Endpoint is one. A Link that has a method Close() or
// Close() error is closed together with its Wrapper.
type Link interface {
	Source

	// Deliver hands an inbound packet, its network header still in Data, to the
	// stack. It takes the caller's reference. After Close the packet is released.
	// The checksums of pkt have been verified by the caller. Any number of
	// goroutines may be in it.
	Deliver(pkt *stack.PacketBuffer)

	// WritePackets queues outbound packets as if the stack had sent them, for
	// fragments made by TooBig. It adds references of its own and the caller keeps its
	// own. It must not wait for Dequeue: the caller may be the one to call that next.
	stack.LinkWriter
}

// Source is where a [Reader] gets its outbound packets. linkep.Queue is one.
type Source interface {
	// Dequeue waits until at least one outbound packet is queued and moves up to
	// len(pkts) of them into pkts, oldest first. The caller takes the one
	// reference that each holds and releases it. After Close it returns an error
	// that wraps [os.ErrClosed], and so does every later call.
	Dequeue(pkts []*stack.PacketBuffer) (n int, err error)
}
