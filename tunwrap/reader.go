package tunwrap

import (
	"fmt"
	"os"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A Reader is one stream of outbound packets of a [Wrapper]: the packets of one
// [Source], NATed and split. Streams are independent, so each can have its own
// goroutine; order is kept within one. A Reader is for one goroutine at a time.
type Reader struct {
	w      *Wrapper
	source Source

	// mu is held during a Read. Close uses it only to find out whether there is one.
	mu sync.Mutex

	queue   []*stack.PacketBuffer // dequeued; queue[head:tail] are still to be sent
	head    int
	tail    int
	seg     segmenter
	current []*stack.PacketBuffer // what seg is busy with: a superpacket, or several joined
	views   [][]byte              // scratch
	now     int64                 // of the drain in progress, for the filter
	counts  outboundCounts        // of the Read in progress
}

func newReader(w *Wrapper, s Source) *Reader {
	return &Reader{
		w:       w,
		source:  s,
		queue:   make([]*stack.PacketBuffer, w.batchSize),
		views:   make([][]byte, 0, 64),
		current: make([]*stack.PacketBuffer, 0, w.batchSize+1),
	}
}

// BatchSize is how many buffers Read can fill.
func (r *Reader) BatchSize() int { return r.w.BatchSize() }

// Read waits for at least one outbound packet, then writes packets until bufs are full or
// all that had been queued are out: the i-th to bufs[i][offset:], its length to sizes[i].
// It borrows bufs and sizes until it returns. A superpacket that does not fit whole is
// continued by the next Read. A packet that cannot be sent is counted and skipped; the
// only errors are those of the Source, which wrap [os.ErrClosed] after Close.
func (r *Reader) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	r.mu.Lock()
	n, err = r.read(bufs, sizes, offset)
	r.mu.Unlock()
	if r.w.closed.Load() {
		r.release() // Close may have met this Read and left it to us
	}
	return n, err
}

func (r *Reader) read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	for n == 0 {
		if r.w.closed.Load() {
			return 0, fmt.Errorf("tunwrap: read: %w", os.ErrClosed)
		}
		if !r.seg.busy && r.head == r.tail {
			if err = r.fetch(); err != nil {
				return 0, fmt.Errorf("tunwrap: read: %w", err)
			}
		}
		n = r.drain(bufs, sizes, offset)
	}
	r.w.outbound.add(&r.counts)
	r.counts = outboundCounts{}
	return n, nil
}

// fetch waits for packets and dequeues as many as there are.
func (r *Reader) fetch() error {
	n, err := r.source.Dequeue(r.queue)
	r.head, r.tail = 0, n
	return err
}

// drain writes what has been dequeued until bufs are full.
func (r *Reader) drain(bufs [][]byte, sizes []int, offset int) (n int) {
	nat, filter := r.w.nat.Load(), r.w.filter.Load()
	if filter != nil {
		r.now = filter.now()
	}
	for n < len(bufs) {
		if r.seg.busy {
			n += r.split(bufs[n:], sizes[n:], offset)
			continue
		}
		if r.head == r.tail {
			break
		}
		n += r.send(r.next(), nat, filter, bufs[n][offset:], &sizes[n])
	}
	return n
}

// next takes the oldest packet out of the queue, which is not empty.
func (r *Reader) next() *stack.PacketBuffer {
	pkt := r.queue[r.head]
	r.queue[r.head] = nil
	r.head++
	r.counts.packets++
	return pkt
}

// send takes pkt. A superpacket, and a packet with others that continue it, is made ready for split and
// nothing is written; any other packet is written to dst. It returns the number of packets
// written.
func (r *Reader) send(pkt *stack.PacketBuffer, nat *natTable, filter *Filter, dst []byte, size *int) int {
	total := pkt.Size()
	g := FromStack(pkt)
	followers := r.followers(pkt)
	if g.GSOSize != 0 && (total > int(g.GSOSize) || followers > 0) {
		if d := r.seg.load(r.viewsOf(pkt), total, g); d != DropNone {
			r.w.drops.add(d)
			pkt.DecRef()
			return 0
		}
		r.current = append(r.current, pkt)
		r.join(followers)
		if filter != nil {
			h := r.seg.headers()
			if d := filter.outbound(h, &r.seg.layout, len(h)+r.seg.left, r.now); d != DropNone {
				r.w.drops.addN(d, len(r.current))
				r.seg.reset()
				r.done()
				return 0
			}
		}
		if nat != nil {
			nat.outbound(r.seg.headers(), &r.seg.layout, &r.seg.gso)
		}
		r.seg.prime()
		if r.seg.left > int(g.GSOSize) {
			r.counts.superpackets++
		}
		return 0
	}

	// Small enough to be one segment whatever its headers are. Or there is no size yet:
	// gVisor's TCP marks all its packets but SYN for offload, and the MSS is 0 until the
	// handshake is done (Endpoint.initGSO comes before newSender).
	g.Type = GSONone
	b := dst
	if total > len(dst) {
		b = make([]byte, total) // to be answered
	}
	at := 0
	for _, v := range r.viewsOf(pkt) {
		at += copy(b[at:], v)
	}
	d := finishFiltered(b[:total], &g, nat, filter, r.now)
	pkt.DecRef()
	switch {
	case d != DropNone:
		r.w.drops.add(d)
		return 0
	case total > len(dst):
		r.w.TooBig(b, len(dst))
		return 0
	}
	*size = total
	r.counts.segments++
	r.counts.bytes += uint64(total)
	return 1
}

// finish translates the whole packet b and finishes its checksum, in place.
func finish(b []byte, g *GSO, nat *natTable) Drop {
	if !g.NeedsCsum && nat == nil {
		return DropNone
	}
	l, d := locate(b, len(b))
	if d != DropNone {
		return d
	}
	return finishLocated(b, &l, g, nat)
}

// finishFiltered is finish, unless the filter says no; nil never does.
func finishFiltered(b []byte, g *GSO, nat *natTable, filter *Filter, now int64) Drop {
	if filter == nil {
		return finish(b, g, nat)
	}
	l, d := locate(b, len(b))
	if d != DropNone {
		return d
	}
	if d := filter.outbound(b, &l, len(b), now); d != DropNone {
		return d
	}
	return finishLocated(b, &l, g, nat)
}

// finishLocated is finish for a packet laid out as l.
func finishLocated(b []byte, l *layout, g *GSO, nat *natTable) Drop {
	if g.NeedsCsum && g.CsumStart == 0 {
		g.CsumStart = uint16(l.l4)
	}
	if nat != nil {
		nat.outbound(b, l, g)
	}
	if g.NeedsCsum {
		return g.finishChecksum(b)
	}
	return DropNone
}

// split writes segments of the current superpacket and releases it after the last. Some do not fit if the Link has passed on
// what a peer with a larger MTU has sent.
func (r *Reader) split(bufs [][]byte, sizes []int, offset int) (n int) {
	for r.seg.busy && n < len(bufs) {
		size := r.seg.segmentLen()
		if fits := len(bufs[n]) - offset; size > fits {
			r.seg.tooLong(fits, &r.w.drops, r.w.TooBig)
			continue
		}
		r.seg.next(bufs[n][offset:])
		sizes[n] = size
		r.counts.bytes += uint64(size)
		n++
	}
	r.counts.segments += uint64(n)
	if !r.seg.busy {
		r.done()
	}
	return n
}

// done releases what the segmenter was busy with.
func (r *Reader) done() {
	for i, pkt := range r.current {
		pkt.DecRef()
		r.current[i] = nil
	}
	r.current = r.current[:0]
}

// viewsOf lends the bytes of pkt as they lie in its views, until the next call.
func (r *Reader) viewsOf(pkt *stack.PacketBuffer) [][]byte {
	r.views = r.views[:0]
	r.appendViews(pkt, 0)
	return r.views
}

// appendViews lends the bytes of pkt from at on, after those lent already.
func (r *Reader) appendViews(pkt *stack.PacketBuffer, at int) {
	list, skip := pkt.AsViewList()
	skip += at
	for v := list.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		r.views = append(r.views, b[skip:])
		skip = 0
	}
}

// release gives up everything in hand, unless a Read is in progress, which then does it
// when it returns. It is called after Close.
func (r *Reader) release() {
	if !r.mu.TryLock() {
		return
	}
	defer r.mu.Unlock()
	for range r.current {
		r.w.drops.add(DropClosed)
	}
	r.seg.reset()
	r.done()
	for ; r.head < r.tail; r.head++ {
		r.queue[r.head].DecRef()
		r.queue[r.head] = nil
		r.w.drops.add(DropClosed)
	}
}
