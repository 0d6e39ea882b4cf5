package tunwrap

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refusals is how many superpackets of a kind the kernel has to refuse, one after the other, before it is
// given no more. A single one may be odd; a kernel with a fault (such as e269d79c7d35 in
// some stable series) refuses them all.
const refusals = 8

// A tunWriter is the scratch of one Write. The TUN keeps a pool of them, because writers come and go
// with goroutines that are not its own.
type tunWriter struct {
	t         *TUN
	q         *tunQueue // where the group at is to go
	at        int
	coalescer coalescer

	head    [vnetHeaderSize + maxHeader]byte // what stands before the payload of a superpacket
	vectors [1 + maxMembers]unix.Iovec
	flush   func(fd uintptr) // writes the groups from at on that go to q
	counts  inboundCounts
}

func newTUNWriter(t *TUN) *tunWriter {
	x := &tunWriter{t: t}
	x.flush = x.flushTo
	return x
}

// Write takes the inbound packets bufs[i][offset:] in order: it reverses NAT, coalesces and gives them to
// the kernel. Only what it coalesces has been verified by then, and the kernel verifies the rest. It borrows
// bufs and may overwrite them. Bad packets, and those that the filter or the kernel refuses, are counted
// and skipped, so n is always len(bufs) until Close.
func (t *TUN) Write(bufs [][]byte, offset int) (n int, err error) {
	if t.closed.Load() {
		return 0, errTUNClosed("write")
	}
	x := t.writers.Get().(*tunWriter)
	defer t.writers.Put(x)
	x.collect(bufs, offset)
	for x.at = 0; x.at < len(x.coalescer.groups) && err == nil; {
		x.q = x.queue()
		err = x.q.raw.Control(x.flush)
	}
	x.coalescer.end()
	x.t.inbound.add(&x.counts)
	x.counts = inboundCounts{}
	if err != nil { // Close has come between
		return 0, errTUNClosed("write")
	}
	return len(bufs), nil
}

// collect finds out what becomes of each packet.
func (x *tunWriter) collect(bufs [][]byte, offset int) {
	nat := x.t.nat.Load()
	tcp := x.t.groTCP.Load()
	c := &x.coalescer
	c.udp = x.t.groUDP.Load()
	c.begin(len(bufs))
	for _, buf := range bufs {
		if offset > len(buf) {
			x.t.drops.add(DropMalformed)
			continue
		}
		b := buf[offset:]
		x.counts.segments++
		x.counts.bytes += uint64(len(b))
		l, d := locate(b, len(b))
		if d != DropNone {
			x.t.drops.add(d)
			continue
		}
		b = b[:l.total]
		// A superpacket goes to the kernel as one whose checksums need no check, so what may
		// become part of one is verified here.
		join := (l.proto == protoTCP && tcp || l.proto == protoUDP && c.udp) && !l.fragment
		if join {
			join = verifyLocated(b, &l) == DropNone
		}
		if nat != nil {
			nat.inbound(b, &l)
		}
		if join {
			c.add(b, &l)
		} else {
			c.alone(b, &l)
		}
	}
}

// takeMessage gives b to the kernel as it is.
func (t *TUN) takeMessage(b []byte) {
	x := t.writers.Get().(*tunWriter)
	defer t.writers.Put(x)
	_ = t.queues[0].raw.Control(func(fd uintptr) { x.plain(fd, b) }) // fails only after Close
	clear(x.vectors[:2])
	x.counts = inboundCounts{} // it has not come from a peer
}

// queue is where the group at goes: always the same one for a flow, because the kernel sends what it has for the
// flow out by the queue to which a packet of it was written last (tun_flow_update), and in another queue
// packets overtake those before them.
func (x *tunWriter) queue() *tunQueue {
	qs := x.t.queues
	if len(qs) == 1 {
		return qs[0]
	}
	g := &x.coalescer.groups[x.at]
	h := flowHash(x.coalescer.packets[g.first].b, &g.layout)
	return qs[uint64(h)*uint64(len(qs))>>32]
}

// flushTo writes the groups from at on that go to q and may pass to fd, which is q's.
func (x *tunWriter) flushTo(fd uintptr) {
	c := &x.coalescer
	filter, now := x.t.filter.Load(), int64(0)
	if filter != nil {
		now = filter.now()
	}
	for ; x.at < len(c.groups) && x.queue() == x.q; x.at++ {
		g := &c.groups[x.at]
		if filter != nil {
			if d := filter.inbound(c.packets[g.first].b, &g.layout, g.total, now); d != DropNone {
				x.t.drops.addN(d, int(g.count))
				continue
			}
		}
		if g.count > 1 {
			x.superpacket(fd, g)
		} else {
			x.plain(fd, c.packets[g.first].b)
		}
	}
	clear(x.vectors[:2])
}

var noOffload vnetHeader // never written to

// plain writes a packet as it is.
func (x *tunWriter) plain(fd uintptr, b []byte) {
	vectors := x.vectors[:0]
	if x.t.vnet {
		vectors = appendVector(vectors, noOffload[:])
	}
	if errno := x.t.writev(fd, appendVector(vectors, b)); errno != 0 {
		x.t.drops.add(DropKernel)
		return
	}
	x.counts.packets++
}

// superpacket writes the members of g as one packet: new headers, and the payloads from where they lie.
func (x *tunWriter) superpacket(fd uintptr, g *group) {
	packets := x.coalescer.packets
	head := x.head[vnetHeaderSize:]
	copy(head, packets[g.first].b[:g.hdrLen])
	gso := g.merge(head)
	(*vnetHeader)(x.head[:]).put(gso)
	vectors := appendVector(x.vectors[:0], x.head[:vnetHeaderSize+g.hdrLen])
	for i := g.first; i != none; i = packets[i].next {
		vectors = appendVector(vectors, packets[i].b[g.hdrLen:])
	}
	errno := x.t.writev(fd, vectors)
	clear(vectors)
	switch errno {
	case 0:
		x.counts.packets++
		x.counts.superpackets++
		if refused := x.t.refusalsOf(gso.Type); refused.Load() != 0 {
			refused.Store(0)
		}
	case unix.EINVAL:
		before := x.counts.packets
		for i := g.first; i != none; i = packets[i].next {
			x.plain(fd, packets[i].b)
		}
		if x.counts.packets > before {
			x.t.refusal(gso.Type, errno)
		}
	default:
		x.t.drops.addN(DropKernel, int(g.count))
	}
}

// refusal is called when the kernel has refused a superpacket and taken its members one by one.
func (t *TUN) refusal(typ GSOType, errno unix.Errno) {
	if t.refusalsOf(typ).Add(1) < refusals {
		return
	}
	gro, what := &t.groTCP, "TCP"
	if typ == GSOUDPL4 {
		gro, what = &t.groUDP, "UDP"
	}
	if !gro.CompareAndSwap(true, false) {
		return
	}
	t.mu.Lock()
	off := abilityOff("withdrawn: writev: " + errno.Error())
	if typ == GSOUDPL4 {
		t.abilities.GROUDP = off
	} else {
		t.abilities.GROTCP = off
	}
	t.mu.Unlock()
	t.log.Warn("the kernel refuses superpackets, writing packets one by one", "interface", t.name, "protocol", what, "error", errno)
}

// refusalsOf is how many superpackets of a kind have been refused in a row.
func (t *TUN) refusalsOf(typ GSOType) *atomic.Int32 {
	if typ == GSOUDPL4 {
		return &t.refused.udp
	}
	return &t.refused.tcp
}

// appendVector appends b, which is borrowed until the vectors are cleared, and not empty.
func appendVector(vectors []unix.Iovec, b []byte) []unix.Iovec {
	vectors = append(vectors, unix.Iovec{Base: unsafe.SliceData(b)})
	vectors[len(vectors)-1].SetLen(len(b))
	return vectors
}

// writev writes one packet. The kernel takes it through its whole stack before it returns, which takes
// longer than Go lets a system call keep a processor, but never waits, so the scheduler is not told; see transport's
// socketCalls for what that is worth.
func writev(fd uintptr, vectors []unix.Iovec) (errno unix.Errno) {
	for errno = unix.EINTR; errno == unix.EINTR; {
		_, _, errno = unix.RawSyscall(unix.SYS_WRITEV, fd, uintptr(unsafe.Pointer(&vectors[0])), uintptr(len(vectors)))
	}
	return errno
}
