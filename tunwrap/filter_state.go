package tunwrap

import (
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// filterShards is how many parts the flows are in, each with a lock: many more than goroutines that
// meet there, and so few that a pass over one is short.
const filterShards = 64

// Times after which flows are forgotten, beside TCPIdle and UDPIdle.
const (
	// patienceBegun is for a flow that has not been answered. A SYN that is repeated later
	// than that begins another. (Linux: nf_conntrack_udp_timeout.)
	patienceBegun = 30 * time.Second
	// patienceEcho is for ping (Linux: nf_conntrack_icmp_timeout).
	patienceEcho = 30 * time.Second
	// patienceClosed is for a TCP connection with a FIN from both sides
	// (Linux: nf_conntrack_tcp_timeout_time_wait).
	patienceClosed = 2 * time.Minute
	// patienceReset is for one with a RST (Linux: nf_conntrack_tcp_timeout_close).
	patienceReset = 10 * time.Second
	// patienceFragments is for the rest of a datagram in fragments. A path does not delay one behind
	// another for longer.
	patienceFragments = 5 * time.Second
)

// A flowTable remembers flows, up to a limit. All times are in nanoseconds since start.
//
// Entries lie in slices that grow and never shrink; what is free is in a list. So nothing is
// allocated once the table is as large as it gets. A packet takes one lock for a few instructions.
// Whoever has a packet clears out a shard every 1/64 second, so forgotten flows are gone after a second:
// there is no goroutine, and when there are no packets nobody needs the room.
type flowTable struct {
	start   time.Time
	seed    maphash.Seed
	limit   int64
	perPeer int64
	tcpIdle time.Duration
	udpIdle time.Duration
	open    atomic.Int64 // flows
	swept   atomic.Int64 // in units of sweepEvery
	shards  [filterShards]flowShard
}

const sweepEvery = int64(time.Second / filterShards)

// A flowShard is a hash table with chains. Indices are those of flows plus one, 0 is none.
type flowShard struct {
	mu      sync.Mutex
	buckets []int32 // as many as fit, a power of two
	flows   []flow
	free    int32
	_       [128 - 8 - 2*24 - 8]byte // cache lines of its own
}

// A flow is an entry of the table.
type flow struct {
	key        flowKey
	class      packetClass // of the packet that began it; classLater: a datagram in fragments
	opener     Direction   // the way of the packet that began it
	peer       *filterPeer // nil: the entry is free
	deadline   int64
	hash       uint32
	next       int32 // in the chain, or of the free
	generation uint32
	rule       int32
	seen       uint8

	// Of a datagram in fragments: bytes seen, and bytes in all once the last has been seen.
	got, end uint32
	header   uint16 // bytes that only the first may contain
}

// What has been seen of a flow. The opener's bits are shifted by one from the answerer's.
const (
	seenAnswer = 1 << iota // a packet from the answerer
	seenAfter              // TCP: and the opener has sent more than a SYN
	seenFIN
	_
	seenRST
	_
)

func (f *flowTable) init(o *FilterOptions) {
	f.start, f.seed = time.Now(), maphash.MakeSeed()
	f.limit, f.perPeer = int64(o.Flows), int64(o.FlowsPerPeer)
	f.tcpIdle, f.udpIdle = o.TCPIdle, o.UDPIdle
}

// now is the time for a batch of packets.
func (f *flowTable) now() int64 { return int64(time.Since(f.start)) }

func (f *flowTable) hash(k *flowKey) uint32 { return uint32(maphash.Bytes(f.seed, k[:])) }

func (f *flowTable) shard(h uint32) *flowShard { return &f.shards[h%filterShards] }

func (s *flowShard) bucket(h uint32) *int32 {
	return &s.buckets[h/filterShards&uint32(len(s.buckets)-1)]
}

// find is the entry of k, or nil. The shard's lock is held.
func (s *flowShard) find(h uint32, k *flowKey) *flow {
	if len(s.buckets) == 0 {
		return nil
	}
	for i := *s.bucket(h); i != 0; {
		e := &s.flows[i-1]
		if e.hash == h && e.key == *k {
			return e
		}
		i = e.next
	}
	return nil
}

// live is the entry of k if it is to be believed: one that is over, or that t does not allow, goes.
// The shard's lock is held.
func (f *flowTable) live(s *flowShard, h uint32, k *flowKey, t *filterTable, now int64) *flow {
	e := s.find(h, k)
	switch {
	case e == nil:
		return nil
	case e.deadline <= now, e.generation != t.generation && !e.revalidate(t):
		f.remove(s, e)
		return nil
	}
	return e
}

// insert makes an entry for k, or returns nil if there are too many. The shard's lock is
// held; the entry is valid until it is given up.
func (f *flowTable) insert(s *flowShard, h uint32, k *flowKey, peer *filterPeer) *flow {
	if f.open.Add(1) > f.limit {
		f.open.Add(-1)
		return nil
	}
	if peer.flows.Add(1) > f.perPeer {
		peer.flows.Add(-1)
		f.open.Add(-1)
		return nil
	}
	i := s.free
	if i != 0 {
		s.free = s.flows[i-1].next
	} else {
		s.flows = append(s.flows, flow{})
		i = int32(len(s.flows))
		if len(s.flows) > len(s.buckets) {
			s.rehash()
		}
	}
	head := s.bucket(h)
	e := &s.flows[i-1]
	*e = flow{key: *k, hash: h, peer: peer, next: *head}
	*head = i
	return e
}

// rehash doubles the buckets. The last entry is not in use yet.
func (s *flowShard) rehash() {
	s.buckets = make([]int32, max(8, 2*len(s.buckets)))
	for i := range s.flows {
		if e := &s.flows[i]; e.peer != nil {
			head := s.bucket(e.hash)
			e.next, *head = *head, int32(i+1)
		}
	}
}

// remove forgets e. The shard's lock is held.
func (f *flowTable) remove(s *flowShard, e *flow) {
	p := s.bucket(e.hash)
	for &s.flows[*p-1] != e {
		p = &s.flows[*p-1].next
	}
	i := *p
	*p = e.next
	e.peer.flows.Add(-1)
	f.open.Add(-1)
	*e = flow{next: s.free}
	s.free = i
}

// sweepSome clears the shards whose turn it is.
func (f *flowTable) sweepSome(now int64) {
	due, last := now/sweepEvery, f.swept.Load()
	if due <= last || !f.swept.CompareAndSwap(last, due) {
		return
	}
	for i := range min(due-last, filterShards) {
		s := &f.shards[(due-i)%filterShards]
		s.mu.Lock()
		for i := range s.flows {
			if e := &s.flows[i]; e.peer != nil && e.deadline <= now {
				f.remove(s, e)
			}
		}
		s.mu.Unlock()
	}
}

// revalidateAll forgets what t does not allow. A packet under way may still have the table before t;
// what it adds is found out by its generation.
func (f *flowTable) revalidateAll(t *filterTable) {
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		for i := range s.flows {
			if e := &s.flows[i]; e.peer != nil && e.generation != t.generation && !e.revalidate(t) {
				f.remove(s, e)
			}
		}
		s.mu.Unlock()
	}
}

// revalidate asks t whether the flow may go on, and notes it.
func (e *flow) revalidate(t *filterTable) bool {
	o := openingOf(&e.key, e.class, e.opener, t)
	if o.peer != e.peer {
		return false
	}
	if e.class != classLater { // a datagram in fragments has nothing to ask about, and is soon over
		rule, allowed := t.decide(&o)
		if !allowed {
			return false
		}
		e.rule = rule
	}
	e.generation = t.generation
	return true
}

// begin makes e the flow that p begins.
func (e *flow) begin(p *filterPacket, rule int32, generation uint32) {
	e.class, e.opener, e.rule, e.generation, e.seen = p.class, p.direction, rule, generation, 0
	e.pass(p)
}

// continues tells whether p belongs to the flow e, whose key it has. A SYN from the
// answerer is a connection of its own, about which the rules are asked.
func (e *flow) continues(p *filterPacket) bool {
	return p.class != classTCP || p.flags&(flagSYN|flagACK) != flagSYN || p.direction == e.opener
}

// pass notes what the packet p says about the flow e.
func (e *flow) pass(p *filterPacket) {
	fromOpener := p.direction == e.opener
	if !fromOpener {
		e.seen |= seenAnswer
	}
	if p.class != classTCP {
		return
	}
	syn := p.flags&flagSYN != 0
	if syn && fromOpener && e.over() {
		e.seen = 0 // the same ports again
	}
	if fromOpener && !syn {
		e.seen |= seenAfter
	}
	side := uint8(0)
	if fromOpener {
		side = 1
	}
	if p.flags&flagFIN != 0 {
		e.seen |= seenFIN << side
	}
	switch {
	case p.flags&flagRST != 0:
		e.seen |= seenRST << side
	case p.flags&flagACK != 0:
		// Who goes on after a RST has not sent it: it was forged, or for an older connection.
		e.seen &^= seenRST << side
	}
}

// over tells whether the TCP connection e has ended.
func (e *flow) over() bool {
	const fins, rsts = seenFIN | seenFIN<<1, seenRST | seenRST<<1
	return e.seen&fins == fins || e.seen&rsts != 0
}

// patience is how long e is remembered from now on.
func (f *flowTable) patience(e *flow) int64 {
	d := patienceBegun
	switch {
	case e.class == classEcho:
		d = patienceEcho
	case e.class == classTCP && e.seen&(seenRST|seenRST<<1) != 0:
		d = patienceReset
	case e.class == classTCP && e.over():
		d = patienceClosed
	case e.class == classTCP && e.seen&(seenAnswer|seenAfter) == seenAnswer|seenAfter:
		d = f.tcpIdle
	case e.class != classTCP && e.seen&seenAnswer != 0:
		d = f.udpIdle
	}
	return int64(d)
}
