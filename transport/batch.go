package transport

import "sync/atomic"

// SocketStats counts what a [UDPSocket] did since it was opened. Everything the
// socket gave up is in one of the Drop fields, in datagrams unless said otherwise.
type SocketStats struct {
	Sends        uint64 `json:"sends"`    // system calls that sent or tried to
	Messages     uint64 `json:"messages"` // messages in them: what one sendmsg carries, up to a whole run
	Runs         uint64 `json:"runs"`     // runs handed to the network whole
	DatagramsOut uint64 `json:"outbound_datagrams"`
	BytesOut     uint64 `json:"outbound_bytes"` // UDP payload
	SendWaits    uint64 `json:"send_waits"`     // times the send buffer was full and the sender slept
	GSOResent    uint64 `json:"gso_resent"`     // runs sent again plainly because the kernel refused UDP_SEGMENT
	SourceLost   uint64 `json:"source_lost"`    // runs that went out from another address because Run.Local is gone

	DropTooBig    uint64 `json:"drop_too_big"`    // EMSGSIZE: larger than the interface's MTU
	DropNoBuffers uint64 `json:"drop_no_buffers"` // ENOBUFS: the interface's queue is full
	DropSendError uint64 `json:"drop_send_error"` // any other error on send

	Receives    uint64 `json:"receives"` // system calls that received or tried to
	Buffers     uint64 `json:"buffers"`  // elements of batches filled
	DatagramsIn uint64 `json:"inbound_datagrams"`
	BytesIn     uint64 `json:"inbound_bytes"` // UDP payload

	DropTruncated uint64 `json:"drop_truncated"` // receives larger than their buffer
	DropKernel    uint64 `json:"drop_kernel"`    // datagrams (a coalesced buffer counts as one) lost as the receive buffer was full (SO_RXQ_OVFL)
}

// counters are the live SocketStats. Each is added to once a batch.
type counters struct {
	sends, messages, runs, datagramsOut, bytesOut atomic.Uint64
	sendWaits, gsoResent, sourceLost              atomic.Uint64
	dropTooBig, dropNoBuffers, dropSendError      atomic.Uint64

	receives, buffers, datagramsIn, bytesIn atomic.Uint64
	dropTruncated, dropKernel               atomic.Uint64
}

func (c *counters) snapshot() SocketStats {
	return SocketStats{
		Sends: c.sends.Load(), Messages: c.messages.Load(), Runs: c.runs.Load(),
		DatagramsOut: c.datagramsOut.Load(), BytesOut: c.bytesOut.Load(),
		SendWaits: c.sendWaits.Load(), GSOResent: c.gsoResent.Load(), SourceLost: c.sourceLost.Load(),
		DropTooBig: c.dropTooBig.Load(), DropNoBuffers: c.dropNoBuffers.Load(),
		DropSendError: c.dropSendError.Load(),
		Receives:      c.receives.Load(), Buffers: c.buffers.Load(),
		DatagramsIn: c.datagramsIn.Load(), BytesIn: c.bytesIn.Load(),
		DropTruncated: c.dropTruncated.Load(), DropKernel: c.dropKernel.Load(),
	}
}

// addTo leaves the cache line alone when there is nothing to add.
func addTo(c *atomic.Uint64, n int) {
	if n > 0 {
		c.Add(uint64(n))
	}
}

// inboundTally sums one ReadBatch.
type inboundTally struct{ buffers, datagrams, bytes, truncated int }

// fill completes in for n bytes in datagrams of segment bytes each, 0 meaning
// one datagram.
func (t *inboundTally) fill(in *Inbound, n, segment int) {
	if segment <= 0 || segment > n {
		segment = n
	}
	in.N, in.SegmentSize = n, segment
	t.buffers++
	t.bytes += n
	if segment == n {
		t.datagrams++
	} else {
		t.datagrams += (n + segment - 1) / segment
	}
}

func (t *inboundTally) count(c *counters) {
	addTo(&c.buffers, t.buffers)
	addTo(&c.datagramsIn, t.datagrams)
	addTo(&c.bytesIn, t.bytes)
	addTo(&c.dropTruncated, t.truncated)
}
