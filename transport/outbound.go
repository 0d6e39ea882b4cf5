package transport

import (
	"errors"
	"net/netip"
	"os"
	"time"

	"github.com/gaissmai/bart"
)

// outboundPump carries packets from r to the peers until r is
// closed. It owns everything it touches but the peers' atomics.
func (t *Transport) outboundPump(r Reader) {
	o := newOutbound(t, r.BatchSize())
	for {
		n, err := r.Read(o.bufs, o.sizes, headSlack)
		if n > 0 {
			o.batch(n)
		}
		if err != nil {
			if errors.Is(err, os.ErrClosed) {
				return
			}
			t.drops.add(DropDeviceRead, 1)
			if n == 0 {
				time.Sleep(time.Millisecond) // an error that stays must not burn a core
			}
		}
	}
}

// maxRecordOverhead is what the largest record adds to an inner packet, in bytes: that of AES-GCM.
const maxRecordOverhead = headSlack + tagSize

// RunPackets is how many inner packets of full size, innerMTU bytes, one run carries. Whoever
// makes superpackets does well to let none become more than that.
func RunPackets(innerMTU int) int {
	return max(min(MaxRunSegments, MaxRunBytes/(innerMTU+maxRecordOverhead)), 1)
}

// outbound is the pump's batch: one arena of equal buffers, cut so that full
// packets sealed with AES-GCM lie end to end and a run of them is one piece of memory.
type outbound struct {
	t       *Transport
	bufs    [][]byte
	sizes   []int
	records [][]byte // sealed, in order; Run.Segments are slices of it
	runs    []outboundRun
	wire    []Run
	scratch cryptoScratch

	lastDst  netip.Addr // the destination last looked up, and what was found
	lastPeer *peer
	lastFrom *bart.Table[*peer] // the route table it was found in
}

// outboundRun is the bookkeeping beside a Run.
type outboundRun struct {
	a     *association
	first int // index in records
	count int
	bytes int // of records
	size  int // of the first record: all but the last have it
	inner int // bytes of packets
}

func newOutbound(t *Transport, n int) *outbound {
	stride := t.cfg.InnerMTU + maxRecordOverhead
	arena := make([]byte, n*stride)
	o := &outbound{
		t:       t,
		bufs:    make([][]byte, n),
		sizes:   make([]int, n),
		records: make([][]byte, 0, n),
		runs:    make([]outboundRun, 0, n),
		wire:    make([]Run, 0, n),
	}
	for i := range o.bufs {
		// Without the room for the tag: a packet never reaches into it.
		o.bufs[i] = arena[i*stride : i*stride+headSlack+t.cfg.InnerMTU : (i+1)*stride]
	}
	return o
}

// batch seals the n packets that Device.Read has left in bufs and sends them.
func (o *outbound) batch(n int) {
	o.records, o.runs = o.records[:0], o.runs[:0]
	for i := 0; i < n; {
		i += o.sealNext(i, n)
	}
	o.send()
}

// sealNext seals the packets from i on that go to one association, and returns
// how many packets it has dealt with.
func (o *outbound) sealNext(i, n int) int {
	p, why := o.lookup(o.packet(i))
	if p == nil {
		o.t.drops.add(why, 1)
		return 1
	}
	k := 1
	for i+k < n {
		if q, _ := o.lookup(o.packet(i + k)); q != p {
			break
		}
		k++
	}
	if st := p.detour.Load(); st != nil {
		o.divert(p, st, i, k)
		return k
	}
	if p.resting.Load() {
		p.resting.Store(false)
		p.wake()
	}
	a := p.slots.Load().current
	if a == nil {
		if a = o.stage(p, i, k); a == nil {
			return k
		}
	}
	seq, ok := a.reserve(k)
	if !ok {
		o.t.drops.add(DropExhausted, k)
		return k
	}
	mtu := int(p.innerMTU.Load())
	for j := i; j < i+k; j++ {
		size := o.sizes[j]
		if size > mtu {
			o.t.drops.add(DropTooBig, 1)
			o.t.cfg.TooBig(o.packet(j), mtu)
			continue
		}
		o.append(a, a.sealFrame(o.bufs[j][:cap(o.bufs[j])], size, frameData, seq+uint64(j-i), &o.scratch), size)
	}
	if due := p.timing.RekeyAfterRecords; a.nextSeq.Load() >= due && seq < due {
		p.wake()
	}
	return k
}

// divert queues the k packets from i on for the stream of p's session.
func (o *outbound) divert(p *peer, st *stream, i, k int) {
	packets, bytes := st.sendPackets(o, i, k)
	p.out.add(packets, bytes)
	p.session.byStream.out.add(packets, bytes)
}

// stage leaves the k packets from i on in p's waiting room, or returns the
// association that has come to be in the meantime.
func (o *outbound) stage(p *peer, i, k int) *association {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.slots.Load().current; a != nil {
		return a // what has waited was taken by now; the next to take it would come an hour later
	}
	if st := p.detour.Load(); st != nil { // likewise
		o.divert(p, st, i, k)
		return nil
	}
	for j := i; j < i+k; j++ {
		if !p.stageLocked(o.packet(j)) {
			o.t.drops.add(DropNoAssociation, 1)
		}
	}
	return nil
}

func (o *outbound) packet(i int) []byte { return o.bufs[i][headSlack : headSlack+o.sizes[i]] }

// lookup finds the peer for a packet. Neighbours mostly share a destination, so
// the last answer is kept. Without a peer it says why; it counts nothing, as a packet
// is looked up twice when it ends a run.
func (o *outbound) lookup(packet []byte) (*peer, DropReason) {
	dst, ok := destination(packet)
	if !ok {
		return nil, DropNotIP
	}
	routes := o.t.routes.Load()
	if dst != o.lastDst || o.lastFrom != routes {
		p, _ := routes.Lookup(dst)
		o.lastDst, o.lastPeer, o.lastFrom = dst, p, routes
	}
	return o.lastPeer, DropNoPeer
}

// append adds a record to the last run if it fits there, else starts another.
func (o *outbound) append(a *association, record []byte, inner int) {
	o.records = append(o.records, record)
	if last := len(o.runs) - 1; last >= 0 {
		r := &o.runs[last]
		open := r.bytes == r.count*r.size // no shorter record has ended it
		if r.a == a && open && len(record) <= r.size && r.count < MaxRunSegments && r.bytes+len(record) <= MaxRunBytes {
			r.count++
			r.bytes += len(record)
			r.inner += inner
			return
		}
	}
	o.runs = append(o.runs, outboundRun{
		a: a, first: len(o.records) - 1, count: 1, bytes: len(record), size: len(record), inner: inner,
	})
}

// send hands the runs to the sockets: neighbours on one socket in one call.
func (o *outbound) send() {
	if len(o.runs) == 0 {
		return
	}
	now := o.t.clock.now()
	for i := 0; i < len(o.runs); {
		conn := o.runs[i].a.path.Load().conn
		o.wire = o.wire[:0]
		j := i
		for ; j < len(o.runs); j++ {
			r := &o.runs[j]
			at := r.a.path.Load()
			if at.conn != conn {
				break
			}
			o.wire = append(o.wire, Run{Remote: at.remote, Local: at.local, Segments: o.records[r.first : r.first+r.count]})
		}
		o.write(conn, o.runs[i:j], now)
		i = j
	}
}

func (o *outbound) write(conn PacketConn, runs []outboundRun, now int64) {
	for wire := o.wire; len(wire) > 0; {
		n, err := conn.WriteBatch(wire)
		if err == nil {
			n = len(wire)
		}
		n = min(n, len(wire))
		for i := range runs[:n] {
			r := &runs[i]
			r.a.peer.out.add(r.count, r.inner)
			r.a.peer.lastOutbound.Store(now)
		}
		if n == len(wire) {
			return
		}
		r := &runs[n]
		o.t.drops.add(DropSend, r.count)
		if errors.Is(err, ErrDatagramTooBig) {
			r.a.peer.tooBig(r.size - r.a.recordSize(0))
		}
		wire, runs = wire[n+1:], runs[n+1:]
	}
}

// destination reads the destination of an IP packet.
func destination(packet []byte) (netip.Addr, bool) { return address(packet, 16, 24) }

// source reads the source of an IP packet.
func source(packet []byte) (netip.Addr, bool) { return address(packet, 12, 8) }

func address(packet []byte, at4, at6 int) (netip.Addr, bool) {
	if len(packet) < 20 {
		return netip.Addr{}, false
	}
	switch packet[0] >> 4 {
	case 4:
		return netip.AddrFrom4([4]byte(packet[at4 : at4+4])), true
	case 6:
		if len(packet) >= 40 {
			return netip.AddrFrom16([16]byte(packet[at6 : at6+16])), true
		}
	}
	return netip.Addr{}, false
}

// What follows sends single records, away from the pump: liveness, goodbyes,
// and what was waiting for the association.

// sendFrame seals a copy of body as one frame under a and sends it. A failure
// is counted and reported, nothing else: whoever asks, asks again.
func (t *Transport) sendFrame(a *association, typ frameType, body []byte) bool {
	seq, ok := a.reserve(1)
	if !ok {
		t.drops.add(DropExhausted, 1)
		return false
	}
	buf := make([]byte, headSlack+len(body)+tagSize)
	copy(buf[headSlack:], body)
	var scratch cryptoScratch
	if !t.sendDatagram(a.path.Load(), a.sealFrame(buf, len(body), typ, seq, &scratch)) {
		return false
	}
	a.peer.lastOutbound.Store(t.clock.now())
	return true
}

// sendCloseNotify sends the DTLS goodbye, for strangers who know no DISCONNECT.
func (t *Transport) sendCloseNotify(a *association) {
	if seq, ok := a.reserve(1); ok {
		t.sendDatagram(a.path.Load(), a.sealer.sealAlert(alert{alertWarning, alertCloseNotify}, seq))
	}
}

// sendWaiting sends the packets that were staged, oldest first.
func (t *Transport) sendWaiting(a *association, packets [][]byte) {
	mtu := int(a.peer.innerMTU.Load())
	for _, packet := range packets {
		if len(packet) > mtu {
			t.drops.add(DropTooBig, 1)
			t.cfg.TooBig(packet, mtu)
			continue
		}
		if t.sendFrame(a, frameData, packet) {
			a.peer.out.add(1, len(packet))
		}
	}
}

// sendDatagram sends one datagram, borrowing d.
func (t *Transport) sendDatagram(at *path, d []byte) bool {
	_, err := at.conn.WriteBatch([]Run{{Remote: at.remote, Local: at.local, Segments: [][]byte{d}}})
	if err != nil && !errors.Is(err, ErrDatagramTooBig) { // a probe that the system refuses is no loss
		t.drops.add(DropSend, 1)
	}
	return err == nil
}
