package linkep

import (
	"fmt"
	"os"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const (
	bucketBits = 8
	numBuckets = 1 << bucketBits

	// quantum is what a bucket may send in one turn, in bytes: at least the largest
	// packet, so that every turn sends something.
	quantum = DefaultGSOMaxSize

	// batchBytes ends a Dequeue once this many bytes are in it, so that what has
	// left the fair queue and waits its turn further on stays short. Two
	// superpackets keep a reader busy that sends one while it fetches the next.
	batchBytes = 2 * DefaultGSOMaxSize

	none = -1 // no slot, no bucket
)

// Queue is one outbound queue of an [Endpoint]: fair between flows, bounded in bytes,
// and with one reader. A full queue drops (see the package comment); Close releases
// every packet in it.
type Queue struct {
	ep       *Endpoint
	maxBytes int

	mu      sync.Mutex
	wake    sync.Cond // on mu; signalled when the first packet comes and on close
	waiting bool      // a reader sleeps, or has been woken and holds no lock yet
	closed  bool

	slots   []slot // every queued packet is in one; grows to the most ever queued
	free    int32  // head of the list of unused slots
	buckets [numBuckets]bucket
	// fresh are buckets that have just become busy, aged those that have used up
	// their first turn. fresh go first.
	fresh, aged bucketList

	packets int // queued now
	bytes   int // queued now, as charged
	stats   QueueStats
}

type slot struct {
	pkt    *stack.PacketBuffer
	size   int32 // bytes of the packet
	charge int32 // bytes counted against maxBytes
	next   int32
}

type bucket struct {
	head, tail int32 // slots, oldest and newest
	bytes      int   // charged to this bucket
	deficit    int   // bytes it may still send in this turn
	next       int32 // in fresh or aged
	listed     bool  // is in fresh or aged
}

type bucketList struct{ head, tail int32 }

// QueueStats count what a [Queue] has seen. Packets are as the stack made them:
// a superpacket is one.
type QueueStats struct {
	Packets      uint64 // accepted
	Bytes        uint64 // accepted, IP headers included
	DroppedFull  uint64 // packets dropped because the queue was full
	DroppedBytes uint64 // bytes of those
	Refused      uint64 // packets that came after Close or Shutdown, or were queued at Close
	Wakeups      uint64 // how often a sleeping reader was woken
	Depth        int    // packets queued now
	DepthBytes   int    // bytes of memory they are charged with
}

func newQueue(ep *Endpoint, maxBytes int) *Queue {
	q := &Queue{ep: ep, maxBytes: maxBytes, free: none}
	q.wake.L = &q.mu
	q.fresh = bucketList{none, none}
	q.aged = bucketList{none, none}
	for i := range q.buckets {
		q.buckets[i] = bucket{head: none, tail: none, next: none}
	}
	return q
}

// Deliver is [Endpoint.Deliver], so that a Queue alone will do as the stack side of
// one reader.
func (q *Queue) Deliver(pkt *stack.PacketBuffer) { q.ep.Deliver(pkt) }

// enqueue adds pkt with a reference of its own and tells whether it was accepted:
// false after Close. It borrows the caller's reference.
func (q *Queue) enqueue(pkt *stack.PacketBuffer, hash uint32) bool {
	size, charge := int32(pkt.Size()), int32(chargeOf(pkt))
	q.mu.Lock()
	if q.closed {
		q.stats.Refused++
		q.mu.Unlock()
		return false
	}
	s := q.takeSlot()
	q.slots[s] = slot{pkt: pkt.IncRef(), size: size, charge: charge, next: none}
	q.append(bucketOf(hash), s)
	q.stats.Packets++
	q.stats.Bytes += uint64(size)

	signal := q.waiting
	if signal {
		q.waiting = false
		q.stats.Wakeups++
	}
	full := q.bytes > q.maxBytes
	q.mu.Unlock()

	if signal {
		q.wake.Signal()
	}
	for full {
		full = q.makeRoom()
	}
	return true
}

// chargeOf is the memory that queueing pkt costs. The payload of a connection's own segments
// lies in its send buffer until it is acknowledged and costs nothing here; they are told by the
// number of their flow, which only connections have.
func chargeOf(pkt *stack.PacketBuffer) int {
	c := pkt.MemSize()
	if pkt.Hash != 0 && pkt.TransportProtocolNumber == header.TCPProtocolNumber {
		c -= pkt.Data().Size()
	}
	return c
}

// makeRoom drops a few packets if the queue is above its bound and tells whether
// it still is. A lone packet stays whatever its size.
func (q *Queue) makeRoom() (full bool) {
	var dropped [16]*stack.PacketBuffer
	n := 0
	q.mu.Lock()
	for q.bytes > q.maxBytes && q.packets > 1 && n < len(dropped) {
		dropped[n] = q.dropFattest()
		n++
	}
	full = q.bytes > q.maxBytes && q.packets > 1
	q.mu.Unlock()
	// Outside the lock: the last reference to a UDP datagram wakes its sender.
	for _, p := range dropped[:n] {
		p.DecRef()
	}
	return full
}

// Dequeue waits until at least one packet is queued and moves up to len(pkts) of
// them into pkts, ending early when about 128 KiB are reached. The caller takes the
// one reference that each holds. After Close it returns an error that wraps
// [os.ErrClosed], and so does every later call. One goroutine may be in it.
func (q *Queue) Dequeue(pkts []*stack.PacketBuffer) (n int, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.packets == 0 {
		if q.closed {
			return 0, fmt.Errorf("linkep: queue: %w", os.ErrClosed)
		}
		q.waiting = true
		q.wake.Wait()
	}
	for bytes := 0; n < len(pkts) && q.packets > 0 && bytes < batchBytes; n++ {
		s := q.next()
		pkts[n] = s.pkt
		bytes += int(s.size)
	}
	return n, nil
}

// next removes the packet whose turn it is. The queue is not empty.
func (q *Queue) next() slot {
	for {
		list, fresh := &q.fresh, true
		if list.head == none {
			list, fresh = &q.aged, false
		}
		i := list.head
		b := &q.buckets[i]
		if b.deficit <= 0 { // its turn is over
			b.deficit += quantum
			q.unlistHead(list)
			q.list(&q.aged, i)
			continue
		}
		if b.head == none { // went empty
			q.unlistHead(list)
			if fresh && q.aged.head != none {
				// A flow that sends one packet at a time must not stay fresh for
				// ever: it waits one round before it may be again (RFC 8290 4.2).
				q.list(&q.aged, i)
			} else {
				b.listed = false
			}
			continue
		}
		s := q.removeHead(b)
		b.deficit -= int(s.size)
		return s
	}
}

// dropFattest removes the oldest packet of the bucket that holds most bytes and
// gives its reference to the caller. The queue is not empty.
func (q *Queue) dropFattest() *stack.PacketBuffer {
	fattest := 0
	for i := range q.buckets {
		if q.buckets[i].bytes > q.buckets[fattest].bytes {
			fattest = i
		}
	}
	s := q.removeHead(&q.buckets[fattest])
	q.stats.DroppedFull++
	q.stats.DroppedBytes += uint64(s.size)
	return s.pkt
}

// append puts the filled slot s at the end of bucket i.
func (q *Queue) append(i, s int32) {
	b := &q.buckets[i]
	if b.head == none {
		b.head = s
	} else {
		q.slots[b.tail].next = s
	}
	b.tail = s
	c := int(q.slots[s].charge)
	b.bytes += c
	q.bytes += c
	q.packets++
	if !b.listed {
		b.deficit = quantum
		q.list(&q.fresh, i)
	}
}

// removeHead takes the oldest packet out of b and frees its slot.
func (q *Queue) removeHead(b *bucket) slot {
	i := b.head
	s := q.slots[i]
	b.head = s.next
	b.bytes -= int(s.charge)
	q.bytes -= int(s.charge)
	q.packets--
	q.slots[i] = slot{next: q.free}
	q.free = i
	return s
}

func (q *Queue) takeSlot() int32 {
	if q.free == none {
		q.slots = append(q.slots, slot{})
		return int32(len(q.slots) - 1)
	}
	i := q.free
	q.free = q.slots[i].next
	return i
}

func (q *Queue) list(l *bucketList, i int32) {
	q.buckets[i].listed, q.buckets[i].next = true, none
	if l.head == none {
		l.head = i
	} else {
		q.buckets[l.tail].next = i
	}
	l.tail = i
}

func (q *Queue) unlistHead(l *bucketList) { l.head = q.buckets[l.head].next }

// close refuses packets from now on and, if discard, releases those queued.
func (q *Queue) close(discard bool) {
	var packets []*stack.PacketBuffer
	q.mu.Lock()
	q.closed = true
	for discard && q.packets > 0 {
		packets = append(packets, q.next().pkt)
		q.stats.Refused++
	}
	q.waiting = false
	q.mu.Unlock()
	q.wake.Broadcast()
	for _, p := range packets {
		p.DecRef()
	}
}

// Stats returns a snapshot.
func (q *Queue) Stats() QueueStats {
	q.mu.Lock()
	defer q.mu.Unlock()
	s := q.stats
	s.Depth, s.DepthBytes = q.packets, q.bytes
	return s
}
