package transport

import "sync"

const (
	// streamChunk is the unit in which a stream's queue takes memory, in bytes.
	streamChunk = 64 << 10
	// maxStreamQueue bounds what waits for a stream, in bytes, beside what the kernel has: half a second at 8 Mbit/s. What
	// exceeds it is dropped, as any router on the way would do.
	maxStreamQueue = 512 << 10
	// packedRecord is the most that goes into one TLS record when frames are packed (RFC 8446 5.1: 2^14).
	packedRecord = maxPlaintext
)

// chunks are the pieces of queues. A slice is as long as it is filled.
var chunks = sync.Pool{New: func() any {
	b := make([]byte, 0, streamChunk)
	return &b
}}

// A streamQueue is the frames that wait for a stream, ready to be sealed, end to end in chunks. When it is full the
// newest frame is refused: the caller, a pump, never waits.
type streamQueue struct {
	mu      sync.Mutex
	chunks  []*[]byte
	bytes   int  // in the chunks and in the one being sent
	sending bool // the outbound pump runs
	last    bool // finish was called: nothing is taken any more
	closes  bool // and the far end is to know
	dead    bool // the stream has ended
}

// send queues one frame with a copy of body. It reports whether there was room.
func (st *stream) send(typ frameType, body []byte) bool {
	q := &st.out
	q.mu.Lock()
	ok := q.addLocked(typ, body)
	start := q.startLocked()
	q.mu.Unlock()
	if start {
		st.startOutbound()
	}
	if ok {
		st.lastOutbound.Store(st.t.clock.now())
	}
	return ok
}

// sendPackets queues copies of the k packets from i on of a batch, and returns how many there was room for, and their size. The
// stream carries what the session does, whatever the path of datagrams may.
func (st *stream) sendPackets(o *outbound, i, k int) (packets, bytes int) {
	q, drops := &st.out, &st.t.drops
	q.mu.Lock()
	for j := i; j < i+k; j++ {
		packet := o.packet(j)
		switch {
		case len(packet) > int(st.s.mtu.Load()):
			defer st.s.tooBig(packet) // with the lock released
		case q.addLocked(frameData, packet):
			packets++
			bytes += len(packet)
		default:
			drops.add(DropStreamQueue, 1)
		}
	}
	start := q.startLocked()
	q.mu.Unlock()
	if start {
		st.startOutbound()
	}
	st.lastOutbound.Store(st.t.clock.now())
	return packets, bytes
}

func (q *streamQueue) addLocked(typ frameType, body []byte) bool {
	size := streamHeaderSize + len(body)
	if q.dead || q.last || q.bytes+size > maxStreamQueue {
		return false
	}
	q.bytes += size
	var c *[]byte
	if n := len(q.chunks); n > 0 && len(*q.chunks[n-1])+size <= streamChunk {
		c = q.chunks[n-1]
	} else {
		c = chunks.Get().(*[]byte)
		q.chunks = append(q.chunks, c)
	}
	b := *c
	at := len(b)
	b = b[:at+size]
	putStreamHeader(b[at:], typ, len(body))
	copy(b[at+streamHeaderSize:], body)
	*c = b
	return true
}

// startLocked tells whether the outbound pump has to be started.
func (q *streamQueue) startLocked() bool {
	if q.sending || q.dead || len(q.chunks) == 0 && !q.closes {
		return false
	}
	q.sending = true
	return true
}

// startOutbound runs the outbound pump; sending is set.
func (st *stream) startOutbound() {
	if !st.t.spawn(st.outboundPump) {
		st.conn.Close()
		st.out.abandon()
	}
}

// outboundPump carries what is queued into the stream, many records in one system call, until nothing is left.
func (st *stream) outboundPump() {
	q := &st.out
	st.cork()
	for {
		c, ok := q.next()
		if !ok {
			if err := st.uncork(); err != nil {
				st.fail(err)
				return
			}
			if c, ok = q.nextOrRest(); !ok {
				break
			}
			st.cork()
		}
		err := st.write(*c)
		q.sent(c)
		if err != nil {
			st.uncork()
			st.fail(err)
			return
		}
	}
	if q.isClosing() {
		st.closeWrite()
	}
}

// next takes the oldest chunk.
func (q *streamQueue) next() (*[]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.nextLocked()
}

func (q *streamQueue) nextLocked() (*[]byte, bool) {
	if len(q.chunks) == 0 {
		return nil, false
	}
	c := q.chunks[0]
	n := copy(q.chunks, q.chunks[1:])
	q.chunks[n] = nil
	q.chunks = q.chunks[:n]
	return c, true
}

// nextOrRest is next, but ends the pump when there is nothing.
func (q *streamQueue) nextOrRest() (*[]byte, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	c, ok := q.nextLocked()
	q.sending = ok
	return c, ok
}

// sent gives a chunk back.
func (q *streamQueue) sent(c *[]byte) {
	q.mu.Lock()
	q.bytes -= len(*c)
	q.mu.Unlock()
	*c = (*c)[:0]
	chunks.Put(c)
}

func (q *streamQueue) isClosing() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.closes
}

// finish queues body as a DISCONNECT, if it is not nil, over the bound if need be. Behind it nothing is taken, and the stream
// is closed outbound if closes is set.
func (q *streamQueue) finish(st *stream, body []byte, closes bool) {
	q.mu.Lock()
	if q.dead || q.last && (q.closes || !closes) {
		q.mu.Unlock()
		return
	}
	if body != nil && !q.last {
		q.bytes -= maxStreamQueue // whatever waits, this shall leave
		q.addLocked(frameDisconnect, body)
		q.bytes += maxStreamQueue
	}
	q.last, q.closes = true, closes
	start := q.startLocked()
	q.mu.Unlock()
	if start {
		st.startOutbound()
	}
}

// abandon drops what waits.
func (q *streamQueue) abandon() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.dead = true
	for i, c := range q.chunks {
		*c = (*c)[:0]
		chunks.Put(c)
		q.chunks[i] = nil
	}
	q.chunks, q.bytes = nil, 0
}

// write seals the frames in b, which it borrows: each in a record of its own, or packed.
func (st *stream) write(b []byte) error {
	for len(b) > 0 {
		n := 0
		for n < len(b) {
			_, body, _ := parseStreamHeader(b[n:])
			size := streamHeaderSize + body
			if n > 0 && (!st.pack || n+size > packedRecord) {
				break
			}
			n += size
		}
		if n > minRecordCheck && !st.checked {
			if err := st.writeChecking(b[:n]); err != nil {
				return err
			}
		} else if _, err := st.conn.Write(b[:n]); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// minRecordCheck is the size of frames, in bytes, that crypto/tls cuts in two where it is left to choose the sizes of records: it
// begins with as much as fits a TCP segment (recordSizeBoostThreshold and tcpMSSEstimate of Go 1.26).
const minRecordCheck = 1250

// writeChecking is conn.Write for the first frame of some size, and complains if more than one record came of it.
func (st *stream) writeChecking(b []byte) error {
	st.checked = true
	if st.wire == nil {
		_, err := st.conn.Write(b)
		return err
	}
	before := st.wire.records.Load()
	_, err := st.conn.Write(b)
	if n := st.wire.records.Load() - before; n > 1 {
		st.t.log.Warn("frames are cut into several TLS records, which stock software does not read: set DynamicRecordSizingDisabled",
			"session", st.s.peer.name, "records", n)
	}
	return err
}

// cork makes what write sends gather, uncork sends what has gathered.
func (st *stream) cork() {
	if st.wire != nil {
		st.wire.cork()
	}
}

func (st *stream) uncork() error {
	if st.wire == nil {
		return nil
	}
	return st.wire.uncork()
}

// closeWrite says that nothing more comes.
func (st *stream) closeWrite() {
	if c, ok := st.conn.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
}
