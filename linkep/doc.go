// Package linkep is the link-layer endpoint between a gVisor stack and the rest
// of the path:
//
//	app ─ netstack ─ linkep ─ tunwrap ─ transport ─ UDP
//
// Outbound (from the local stack towards a peer) an [Endpoint] tells the stack's
// TCP that superpackets of up to 64 KiB are welcome, queues what the stack sends
// and gives it out in batches by Dequeue. Inbound (from a peer) Deliver hands
// packets, superpackets included, to the stack.
//
// # The queue
//
// The stack writes one packet at a time, with the lock of the sending
// connection held, and sometimes on the goroutine that delivers inbound packets
// (an echo reply, a reset, a step of a handshake). A full queue therefore never
// blocks the writer: the writer may be the very goroutine on which the reader
// waits. Instead the queue is fair. Packets are sorted by flow into buckets, the
// buckets take turns of 64 KiB, a bucket that was idle comes first, and when the
// memory queued exceeds the bound, the oldest packet of the bucket that holds most
// is dropped. So it is the bulk flow that loses a packet, never the ping
// beside it. (The scheme is that of RFC 8290 without its CoDel part.) Within a
// flow order is kept.
//
// The two kinds of bulk traffic seldom get there, because each is bounded by its sender.
// A queued TCP segment shares its payload with the send buffer of its connection, where it
// stays until it is acknowledged, so it is charged for its headers only: dropping it would
// free nothing, and the stack takes the loss of superpackets badly (8 flows in a queue
// of 4 MiB with payload charged fell to a quarter of their rate at twice the processor
// time a byte; measured). A queued UDP datagram counts against the send buffer of its
// socket, because the queue holds a reference to the packet itself and not to a clone: a
// socket that sends faster than the queue is drained waits in Write and loses nothing.
//
// A reader sleeps only when the queue is empty and is woken only then, once per
// burst.
//
// The package knows neither UDP nor DTLS nor NAT.
package linkep
