package netstack

import (
	"sync"
	"sync/atomic"
	"time"
)

// A sendBudget bounds what all connections of a node together have sent and not seen
// acknowledged, by dividing it among those that send in bulk. It also bounds their memory.
//
// A congestion window grows until something is lost, and over a tunnel that is the
// buffer of a UDP socket overflowing with the windows of all flows in it: megabytes lost
// at once, from which the stack takes long to recover. Measured over loopback on two
// busy cores: 8 and 16 flows with 6 MiB each lost some hundred receives a second, spent
// up to 4 CPU-seconds a GB and had tens of timeouts; divided, no loss at all, 1.6 to 2.2
// CPU-seconds a GB and up to twice the rate.
type sendBudget struct {
	total  int // bytes
	limits BufferSizes
	start  time.Time
	share  atomic.Int64 // of one bulk sender now, in bytes

	mu      sync.Mutex
	period  int64 // the one that senders counts
	senders int   // bulk senders in it so far
	before  int   // bulk senders in the period before
}

const (
	// sendTotal is the default size of a UDP socket's receive buffer, transport's
	// DefaultSocketBuffer: what is under way then fits the peer's socket, wherever else it may
	// be.
	sendTotal = 8 << 20
	// minSendShare keeps many senders going: 20 Mbit/s each at 100 ms.
	minSendShare = 256 << 10
	// sendPeriod is how long a connection counts after it has sent in bulk, at least.
	sendPeriod = time.Second
	// bulkBytes makes a connection a bulk sender in a period: 2 Mbit/s.
	bulkBytes = 256 << 10
)

// newSendBudget makes a budget with the limits of one connection.
func newSendBudget(limits BufferSizes) *sendBudget {
	b := &sendBudget{total: sendTotal, limits: limits, start: time.Now()}
	b.share.Store(int64(limits.Max))
	return b
}

// A bulkMeter tells whether one connection sends in bulk. Its user guards it.
type bulkMeter struct {
	period int64
	bytes  int
	share  int // applied to the connection; 0: the stack tunes it
}

// add counts n bytes sent by the connection of m at now. If the connection's send buffer is to
// be changed it returns the size, else 0.
func (b *sendBudget) add(m *bulkMeter, n int, now time.Time) (resize int) {
	period := int64(now.Sub(b.start) / sendPeriod)
	if m.period != period {
		m.period, m.bytes = period, 0
	}
	was := m.bytes
	m.bytes += n
	if m.bytes < bulkBytes {
		return 0
	}
	if was < bulkBytes {
		b.count(period)
	}
	share := int(b.share.Load())
	if share == m.share || m.share == 0 && share == b.limits.Max {
		return 0
	}
	m.share = share
	return share
}

// count notes one more bulk sender in a period and divides anew.
func (b *sendBudget) count(period int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case period == b.period+1:
		b.before, b.senders = b.senders, 0
	case period > b.period:
		b.before, b.senders = 0, 0
	}
	b.period = max(b.period, period)
	b.senders++
	share := b.total / max(b.senders, b.before)
	b.share.Store(int64(min(max(share, minSendShare), b.limits.Max)))
}
