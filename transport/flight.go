package transport

import (
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

const (
	// maxHandshakeDatagram is the largest datagram that takes part in a handshake:
	// pion reads into 8192 bytes (inboundBufferSize, conn.go of v2.2.12).
	maxHandshakeDatagram = 8192
	// A handshakeConn queues at most this much. A flight is 2 KiB in two datagrams; a peer with
	// a long certificate chain sends 8 KiB in eight.
	maxQueuedBytes     = 16 << 10
	maxQueuedDatagrams = 32
	// maxHandshakeBytes bounds what one handshake takes in over its whole life.
	// pion keeps every fragment it cannot use yet, up to 2 MB (fragmentBufferMaxSize), so
	// the bound must be here. 25 retransmissions of a flight are 35 KiB.
	maxHandshakeBytes = 64 << 10
	// fragmentCharge is the least that a handshake fragment takes of that. With every record pion goes anew through
	// all the fragments of the message that it waits for, each of which leads it through the others: 64 KiB in crumbs of a byte
	// took it two seconds. Stock software sends none smaller but those that are whole or last.
	fragmentCharge = 128
	// maxEarlyBytes bounds the application records kept until the agreement is handed
	// over: one whole receive of a peer that begins to send at once.
	maxEarlyBytes = 64 << 10
)

// connPhase is what a handshakeConn lets through.
type connPhase uint8

const (
	// phaseHandshake: everything a handshake is made of, both ways.
	phaseHandshake connPhase = iota
	// phaseEstablished: inbound only sealed handshake records, that is a retransmitted
	// Finished; outbound only the answer to it. No datagram that does not
	// authenticate can make pion do anything, and no alert of pion's reaches
	// the peer.
	phaseEstablished
	// phaseMuted: nothing, either way.
	phaseMuted
)

// handshakeConn is the net.Conn under pion: a bounded queue inbound, a function
// outbound. It judges every record on the way, as pion would give up a handshake or
// stall on records that anybody can forge, and takes application data for
// itself, which would block pion's reader for good.
//
// When the queue is full push refuses, and the peer retransmits. Close wakes
// Read and drops what is queued. pion is the only reader and writer.
type handshakeConn struct {
	local, remote netip.AddrPort
	send          func(datagram []byte)

	mu      sync.Mutex
	arrived sync.Cond
	queue   []byte // the records of the queued datagrams, end to end
	ends    []int  // where each datagram ends in queue
	budget  int    // bytes that may still come in
	phase   connPhase
	closed  bool

	// wholeFlights: a server's flight is given to pion in one Read, or not yet.
	// See needsMore. To be set before the handshake begins.
	wholeFlights bool

	// addressVerified: the remote address echoed a cookie of ours a moment ago, so
	// pion need not ask again. To be set before the handshake begins.
	addressVerified bool

	readDeadline time.Time
	deadlineWake *time.Timer

	// nextSeq is the first sequence number of epoch 1 that pion has not used;
	// from seqLimit on they are ours.
	nextSeq, seqLimit uint64

	early      [][]byte
	earlyBytes int

	fatal   alert // the last alert of epoch 0 that ends a handshake
	alerted bool
}

var _ net.Conn = (*handshakeConn)(nil)

// newHandshakeConn makes the connection for one handshake with remote. send is called
// from pion's goroutines with one datagram, which it borrows until it returns.
func newHandshakeConn(local, remote netip.AddrPort, send func(datagram []byte)) *handshakeConn {
	c := &handshakeConn{local: local, remote: remote, send: send, budget: maxHandshakeBytes, seqLimit: maxSequence + 1}
	c.arrived.L = &c.mu
	return c
}

// push copies what pion may see of an inbound datagram into the queue, and what is
// application data aside (see takeEarly). It reports whether any record was taken:
// false means full, closed, or nothing but records that have no business in a
// handshake, and the caller counts it.
func (c *handshakeConn) push(datagram []byte) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	taken := false
	start := len(c.queue)
	for rest := datagram; len(rest) > 0; {
		hdr, record, next, ok := nextRecord(rest)
		if !ok {
			break
		}
		rest = next
		switch {
		case hdr.typ == contentApplicationData:
			taken = c.keepEarly(hdr, record) || taken
		case c.admits(hdr, record):
			if len(c.ends) == maxQueuedDatagrams || len(c.queue)+len(record) > maxQueuedBytes ||
				len(c.queue)-start+len(record) > maxHandshakeDatagram || charge(hdr, record) > c.budget {
				continue
			}
			c.budget -= charge(hdr, record)
			c.queue = append(c.queue, record...)
			taken = true
		}
	}
	if len(c.queue) > start {
		c.ends = append(c.ends, len(c.queue))
		c.arrived.Signal()
	}
	return taken
}

// charge is what a record takes of the budget of a handshake. It borrows record.
func charge(hdr recordHeader, record []byte) int {
	fragments := 0
	if hdr.typ == contentHandshake && hdr.epoch == 0 {
		// Cut as pion cuts them: by the length of the message, which an incomplete fragment has not.
		for body := record[recordHeaderSize:]; len(body) >= handshakeHeaderSize; fragments++ {
			body = body[min(handshakeHeaderSize+uint24(body[1:]), len(body)):]
		}
	}
	return max(len(record), fragmentCharge*max(fragments, 1))
}

// admits tells whether pion sees the record. Each condition stands for something that
// pion answers with a fatal alert or with dropping the whole datagram.
func (c *handshakeConn) admits(hdr recordHeader, record []byte) bool {
	body := record[recordHeaderSize:]
	if c.closed || c.phase == phaseMuted || len(body) == 0 || hdr.epoch > dataEpoch {
		return false
	}
	if c.phase == phaseEstablished {
		return hdr.typ == contentHandshake && hdr.epoch == dataEpoch
	}
	switch hdr.typ {
	case contentHandshake:
		return true
	case contentChangeCipherSpec:
		return hdr.epoch == 0 && len(body) == 1 && body[0] == 1
	case contentAlert:
		if hdr.epoch != 0 {
			return true
		}
		a, ok := parseAlert(body)
		if ok && a.ends() {
			c.fatal, c.alerted = a, true
		}
		return ok
	default:
		return false
	}
}

// keepEarly copies an application record that came before the agreement was taken over. Only after our own
// Finished has left: by then the peer has proved its key, so strangers cannot fill this.
// It goes on when pion is gone, until takeEarly.
func (c *handshakeConn) keepEarly(hdr recordHeader, record []byte) bool {
	if hdr.epoch != dataEpoch || c.nextSeq == 0 || c.earlyBytes+len(record) > maxEarlyBytes {
		return false
	}
	c.early = append(c.early, append([]byte(nil), record...))
	c.earlyBytes += len(record)
	return true
}

// takeEarly gives the application records that came before the caller was ready for
// them, in order, and keeps none from then on.
func (c *handshakeConn) takeEarly() [][]byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	early := c.early
	c.early, c.earlyBytes = nil, maxEarlyBytes
	return early
}

// Read waits for datagrams and copies as many of those queued as b holds, end to end: to pion,
// which cuts them into records, that is one datagram. It returns [net.ErrClosed] after
// Close and [os.ErrDeadlineExceeded] after the read deadline.
func (c *handshakeConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case !c.readDeadline.IsZero() && !time.Now().Before(c.readDeadline):
			return 0, os.ErrDeadlineExceeded
		case len(c.ends) > 0 && !c.needsMore():
			return c.take(b)
		}
		c.arrived.Wait()
	}
}

// take moves the first datagrams of the queue to b.
func (c *handshakeConn) take(b []byte) (int, error) {
	k := 0
	for k < len(c.ends) && c.ends[k] <= len(b) {
		k++
	}
	if k == 0 {
		return 0, io.ErrShortBuffer
	}
	n := copy(b, c.queue[:c.ends[k-1]])
	if k == len(c.ends) {
		// Between flights nothing is kept: a handshake that waits should be cheap.
		c.queue, c.ends = nil, nil
		return n, nil
	}
	c.queue = append(c.queue[:0], c.queue[n:]...)
	c.ends = append(c.ends[:0], c.ends[k:]...)
	for i := range c.ends {
		c.ends[i] -= n
	}
	return n, nil
}

// needsMore tells whether pion should wait: the queue begins a server's flight
// that is not whole yet. A pion client with a session store that reads a ServerHello with
// a session ID alone takes the rest of the flight for a resumption, and times out
// (flight3Parse of v2.2.12). A lost datagram is no exception: the server's
// retransmission fills the gap. A full queue is given as it is.
func (c *handshakeConn) needsMore() bool {
	return c.wholeFlights && c.phase == phaseHandshake &&
		len(c.ends) < maxQueuedDatagrams && len(c.queue) < maxQueuedBytes-maxHandshakeDatagram &&
		partOfServerFlight(c.queue)
}

// Write sends one datagram, unless the phase forbids it; then it is dropped and
// pion is none the wiser.
func (c *handshakeConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return 0, net.ErrClosed
	}
	pass := c.phase != phaseMuted && c.mayLeave(b)
	c.mu.Unlock()
	if pass {
		c.send(b)
	}
	return len(b), nil
}

// mayLeave judges an outbound datagram and notes the sequence numbers in it. In
// phaseEstablished only the last flight may leave, and never with a
// sequence number from seqLimit on, as those are the sealer's.
func (c *handshakeConn) mayLeave(datagram []byte) bool {
	for rest := datagram; len(rest) > 0; {
		hdr, _, next, ok := nextRecord(rest)
		if !ok {
			return false
		}
		rest = next
		if c.phase == phaseEstablished && hdr.typ != contentHandshake && hdr.typ != contentChangeCipherSpec {
			return false
		}
		if hdr.epoch == dataEpoch {
			if hdr.seq >= c.seqLimit {
				return false
			}
			c.nextSeq = max(c.nextSeq, hdr.seq+1)
		}
	}
	return true
}

// establish ends the handshake phase. From then on pion may seal records up to gap
// more sequence numbers, and only those of its last flight. It returns the first number that is ours.
func (c *handshakeConn) establish(gap uint64) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.phase == phaseHandshake {
		c.phase = phaseEstablished
	}
	c.seqLimit = c.nextSeq + gap
	return c.seqLimit
}

// mute stops everything in both directions, for good.
func (c *handshakeConn) mute() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.phase = phaseMuted
	c.queue, c.ends = nil, nil
}

// firstHello returns what the ClientHello at the head of the queue says that is needed to
// choose a suite. ok is false when there is none.
func (c *handshakeConn) firstHello() (hello helloInfo, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.ends) == 0 {
		return helloInfo{}, false
	}
	return peekClientHello(append([]byte(nil), c.queue[:c.ends[0]]...))
}

// fatalAlert returns the alert by which the peer, or somebody in its name, ended
// the handshake.
func (c *handshakeConn) fatalAlert() (alert, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fatal, c.alerted
}

// Close wakes Read and refuses everything from then on. It may be called twice.
func (c *handshakeConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.queue, c.ends = nil, nil
	if c.deadlineWake != nil {
		c.deadlineWake.Stop()
	}
	c.arrived.Broadcast()
	return nil
}

func (c *handshakeConn) LocalAddr() net.Addr  { return net.UDPAddrFromAddrPort(c.local) }
func (c *handshakeConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.remote) }

// SetReadDeadline ends a Read that waits, at t; the zero time means never.
func (c *handshakeConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	if c.deadlineWake != nil {
		c.deadlineWake.Stop()
		c.deadlineWake = nil
	}
	c.readDeadline = t
	if !t.IsZero() {
		if wait := time.Until(t); wait > 0 {
			c.deadlineWake = time.AfterFunc(wait, func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.arrived.Broadcast()
			})
		}
	}
	c.arrived.Broadcast()
	return nil
}

// SetWriteDeadline does nothing: Write never waits.
func (c *handshakeConn) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline sets the read deadline; Write never waits.
func (c *handshakeConn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }
