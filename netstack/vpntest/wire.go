package vpntest

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// Wire says how an in-memory network treats datagrams. The zero value delivers all
// of them, at once, in order. It is an [Option] of Pair and Mesh.
//
// Chances are from 0 to 1 and drawn for each datagram alone, from generators that Seed
// and the order of the nodes start: the same datagrams meet the same fate in every run.
// (Which datagrams the nodes send depends on timing, so whole runs still differ.)
type Wire struct {
	// Latency is how long a datagram travels; Jitter is added to it, evenly from 0 to
	// itself, without changing the order.
	Latency, Jitter time.Duration
	// Bandwidth is what each node can send, in bits of outer IP packets per second; 0
	// is without limit. A sender's queue holds 100 ms, or 64 KiB if that is more;
	// what comes on top is lost.
	Bandwidth int64
	// Loss is the chance that a datagram vanishes.
	Loss float64
	// Reorder is the chance that a datagram travels longer than others, by a quarter of
	// the latency and at least a millisecond, so that later ones overtake it.
	Reorder float64
	// Duplicate is the chance that a datagram arrives twice.
	Duplicate float64
	// MTU is the largest outer IP packet in bytes; larger ones vanish without a
	// message, as on a path with a black hole. 0 is without limit.
	MTU int
	// Seed starts the random generators. Only the one that a network is made
	// with counts.
	Seed uint64
}

// outerHeaders are an IPv4 and a UDP header; the wire's addresses are IPv4.
const outerHeaders = 20 + 8

const (
	queueTime    = 100 * time.Millisecond
	minQueueSize = 64 << 10
)

func (w *Wire) validate() error {
	for name, p := range map[string]float64{"Loss": w.Loss, "Reorder": w.Reorder, "Duplicate": w.Duplicate} {
		if !(p >= 0 && p <= 1) {
			return fmt.Errorf("vpntest: Wire.%s is %v, expected a chance from 0 to 1", name, p)
		}
	}
	if w.Latency < 0 || w.Jitter < 0 || w.Bandwidth < 0 || w.MTU < 0 {
		return fmt.Errorf("vpntest: negative value in %+v", *w)
	}
	return nil
}

// An uplink is the state of one sender on the wire.
type uplink struct {
	rng  *rand.Rand
	free time.Time // when the last datagram has left; later than now: a queue
	last time.Time // latest arrival given out in order
}

func newUplink(seed uint64, n int) uplink {
	return uplink{rng: rand.New(rand.NewPCG(seed, uint64(n)))}
}

// chance draws. It draws nothing for impossible events, so that adding one impairment does
// not change the fate by another.
func (u *uplink) chance(p float64) bool { return p > 0 && u.rng.Float64() < p }

// send decides over a datagram of size payload bytes sent now: when it arrives, and, if
// twice is set, that it does so again. ok is false when it is lost.
func (u *uplink) send(w *Wire, size int, now time.Time) (at time.Time, twice, ok bool) {
	if w.MTU > 0 && size+outerHeaders > w.MTU {
		return at, false, false
	}
	leaves := now
	if w.Bandwidth > 0 {
		onWire := transmission(size+outerHeaders, w.Bandwidth)
		if u.free.Before(now) {
			u.free = now
		}
		if u.free.Sub(now) > max(queueTime, transmission(minQueueSize, w.Bandwidth)) {
			return at, false, false
		}
		u.free = u.free.Add(onWire)
		leaves = u.free
	}
	if u.chance(w.Loss) {
		return at, false, false
	}
	at = leaves.Add(w.Latency)
	if w.Jitter > 0 {
		at = at.Add(time.Duration(u.rng.Int64N(int64(w.Jitter) + 1)))
	}
	if u.chance(w.Reorder) {
		at = at.Add(max(w.Latency/4, time.Millisecond))
	} else {
		if at.Before(u.last) {
			at = u.last
		}
		u.last = at
	}
	return at, u.chance(w.Duplicate), true
}

// transmission is how long n bytes take at rate bits per second.
func transmission(n int, rate int64) time.Duration {
	return time.Duration(float64(n*8) / float64(rate) * float64(time.Second))
}
