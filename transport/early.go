package transport

import (
	"math"
	"time"
)

// An earlyDrop keeps flows from filling the queue of a socket: while receives find much
// waiting in it, it says now and then to drop a packet, sooner the longer that lasts. TCP takes it as the sign to
// send less.
//
// Without it a flow of a kernel's TCP keeps its whole window, megabytes, between the two ends of the
// tunnel, and everything else waits behind it: nothing tells it to send less, as the socket's queue
// is larger than the window. A queue that is simply smaller loses a whole receive at a time, 64 KiB, from which
// gVisor's TCP takes long to recover.
//
// The pace is that of CoDel (RFC 8289): a second drop after interval/√2, a third after interval/√3. What
// decides is not its "waited too long for a whole interval": where both ends, and the programs
// beside them, share a few processors, a window that is far too large stands nowhere, but is
// now in the one queue, now in the other.
type earlyDrop struct {
	limit int   // bytes found by one receive that are too many
	last  int64 // when a packet was dropped, in nanoseconds
	count int   // drops in a row
}

const (
	earlyInterval = 50 * time.Millisecond
	// earlyMost bounds the pace to 200 drops a second, for what does not send less.
	earlyMost = 100
)

// now tells whether to drop a packet of a receive of so many bytes.
func (e *earlyDrop) now(bytes int, now int64) bool {
	if bytes < e.limit {
		return false
	}
	since := now - e.last
	if since > int64(4*earlyInterval) {
		e.count = 0
	}
	if e.count > 0 && since < int64(float64(earlyInterval)/math.Sqrt(float64(e.count))) {
		return false
	}
	e.last = now
	e.count = min(e.count+1, earlyMost)
	return true
}
