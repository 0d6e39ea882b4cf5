package transport

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// CSTP, the stream of a session (draft-mavrogiannopoulos-openconnect 2.3):
//
//	byte  0  1  2   3     4  5      6     7
//	     'S' 'T' 'F' 0x01  length   type  0     body
const (
	// streamHeaderSize is the size of the header before a frame's body in bytes.
	streamHeaderSize = 8
	// maxStreamBody bounds the length that is accepted: no packet is longer, and nothing else has a reason to be.
	maxStreamBody = maxPlaintext
)

// parseStreamHeader reads the header of the frame that b begins with, which it borrows. n is the length of
// the body. ok is false when b, of at least streamHeaderSize bytes, begins with no header, or with that of
// a body longer than any packet.
func parseStreamHeader(b []byte) (typ frameType, n int, ok bool) {
	h := (*[streamHeaderSize]byte)(b)
	n = int(binary.BigEndian.Uint16(h[4:6]))
	return frameType(h[6]), n, [4]byte(h[:4]) == [4]byte{'S', 'T', 'F', 1} && h[7] == 0 && n <= maxStreamBody
}

// putStreamHeader writes the header of a frame with a body of n bytes to the start of b.
func putStreamHeader(b []byte, typ frameType, n int) {
	h := (*[streamHeaderSize]byte)(b)
	*h = [streamHeaderSize]byte{'S', 'T', 'F', 1, 0, 0, byte(typ), 0}
	binary.BigEndian.PutUint16(h[4:6], uint16(n))
}

const (
	// retiredStreamTime bounds how long a stream that was replaced is still read, for what was under way.
	retiredStreamTime = 5 * time.Second
	// lastWordsTime bounds how long a stream may take for the goodbye.
	lastWordsTime = time.Second
)

// A stream is one CSTP channel of a session, from a CONNECT until it is closed. Its inbound pump is a
// goroutine; its outbound pump is one while there is something to send. At rest it holds no buffer.
type stream struct {
	s    *Session
	t    *Transport
	conn net.Conn
	wire *StreamConn // under conn; nil where there is none
	pack bool

	lastInbound  atomic.Int64 // clock reading of the last bytes
	lastOutbound atomic.Int64 // of the last frame queued

	partial []byte // the start of a frame whose rest has not come; the inbound pump's

	out     streamQueue
	checked bool // the records were looked at; the outbound pump's

	asked int64 // clock reading of the last DPD-REQ; guarded by peer.mu

	endMu   sync.Mutex
	reason  error       // why it ends; set once
	closing *time.Timer // closes conn at last
	ends    time.Time   // when
}

func newStream(s *Session, l *SessionLink) *stream {
	st := &stream{s: s, t: s.t, conn: l.Stream, wire: streamConnUnder(l.Stream), pack: l.PackFrames}
	st.partial = append([]byte(nil), l.Buffered...)
	now := s.t.clock.now()
	st.lastInbound.Store(now)
	st.lastOutbound.Store(now)
	if st.wire != nil {
		st.wire.takeOver()
	}
	return st
}

// streamConnUnder finds the StreamConn that carries conn, through whatever names what it lies on.
func streamConnUnder(conn net.Conn) *StreamConn {
	for {
		if c, ok := conn.(*StreamConn); ok {
			return c
		}
		above, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return nil
		}
		conn = above.NetConn()
	}
}

// start runs the inbound pump. It reports false, and closes the stream, once the Transport is closing.
func (st *stream) start() bool {
	ok := st.t.spawn(st.inboundPump)
	if !ok {
		st.conn.Close()
	}
	return ok
}

// fail ends the stream at once, for a reason that is told unless there was another one before.
func (st *stream) fail(reason error) {
	st.endMu.Lock()
	if st.reason == nil {
		st.reason = reason
	}
	st.endMu.Unlock()
	st.out.abandon()
	st.conn.Close()
}

// finish lets what is queued leave, and body as a last DISCONNECT unless it is nil. Then it says that nothing more comes, if
// closes is set, and waits for the far end to do so. What still arrives meanwhile is read. finish itself does not wait: within patience
// all is over.
func (st *stream) finish(body []byte, closes bool, patience time.Duration) {
	st.endMu.Lock()
	if st.reason == nil {
		st.reason = ErrClosed
	}
	if ends := time.Now().Add(patience); st.closing == nil || ends.Before(st.ends) {
		st.ends = ends
		st.conn.SetWriteDeadline(ends)
		if st.closing == nil {
			st.closing = time.AfterFunc(patience, func() { st.conn.Close() })
		} else {
			st.closing.Reset(patience)
		}
	}
	st.endMu.Unlock()
	st.out.finish(st, body, closes)
}

// ended is the last that the inbound pump does.
func (st *stream) ended(err error) {
	st.conn.Close()
	st.out.abandon()
	st.endMu.Lock()
	if st.reason == nil {
		st.reason = err
	}
	reason := st.reason
	if st.closing != nil {
		st.closing.Stop()
	}
	st.endMu.Unlock()
	if errors.Is(reason, ErrStreamProtocol) {
		st.s.end(reason)
	}
	st.s.streamEnded(st, reason)
}

// livenessLocked asks after silence, keeps NATs open, and gives up. peer.mu is held.
func (st *stream) livenessLocked(now int64, after *actions) (due int64) {
	dpd, dead, keepalive := int64(st.s.streamDPD), int64(st.s.streamTimeout), int64(st.s.streamKeepalive)
	heard := st.lastInbound.Load()
	due = heard + dpd
	if now >= heard+dead {
		after.add(func() { st.fail(errStreamSilent) })
		return never
	}
	if now >= due {
		if due = st.asked + dpd/4; now >= due {
			st.asked = now
			var body [dpdBodySize]byte
			binary.BigEndian.PutUint64(body[:], uint64(now))
			after.add(func() { st.send(frameDPDRequest, body[:]) })
			due = now + dpd/4
		}
		due = min(due, heard+dead)
	}
	if keepalive <= 0 {
		return due
	}
	idle := st.lastOutbound.Load() + keepalive
	if now >= idle {
		st.lastOutbound.Store(now)
		after.add(func() { st.send(frameKeepalive, nil) })
		idle = now + keepalive
	}
	return min(due, idle)
}
