package vpntest

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

const (
	// maxUDP is the largest UDP payload over IPv4.
	maxUDP = 65507
	// receiveBuffer bounds what waits at one socket and is under way to it, in bytes: a
	// socket's 8 MiB and as much again for the wire's length. What comes on top is lost.
	receiveBuffer = 16 << 20
)

// A conn is a socket on a [Network]. It receives as UDP_GRO does: neighbours of equal
// size from one sender share a buffer.
type conn struct {
	net   *Network
	batch sync.Mutex // one ReadBatch at a time
	timer *time.Timer

	// Guarded by net.mu: the wire as the sender sees it.
	addr netip.AddrPort
	up   uplink

	mu     sync.Mutex
	queue  arrivals
	queued int           // bytes
	wake   chan struct{} // capacity 1: the first arrival has changed, or closed
	closed bool
}

var _ transport.PacketConn = (*conn)(nil)

// A datagram is under way to a conn, or waits there.
type datagram struct {
	at   time.Time
	from netip.AddrPort
	to   netip.Addr
	b    []byte
	buf  *[bufSize]byte // what b lies in, for the pool; nil for large ones
}

const bufSize = 2048

var bufs = sync.Pool{New: func() any { return new([bufSize]byte) }}

// newDatagram copies b.
func newDatagram(b []byte) datagram {
	if len(b) > bufSize {
		return datagram{b: append([]byte(nil), b...)}
	}
	buf := bufs.Get().(*[bufSize]byte)
	return datagram{b: buf[:copy(buf[:], b)], buf: buf}
}

func (d *datagram) release() {
	if d.buf != nil {
		bufs.Put(d.buf)
	}
	*d = datagram{}
}

// arrivals are datagrams by time of arrival, those of one time in the order they were
// sent. Most come in order, so a sorted slice that is searched from its end does.
type arrivals struct {
	ds   []datagram
	head int // ds[:head] are gone
}

func (a *arrivals) len() int         { return len(a.ds) - a.head }
func (a *arrivals) first() *datagram { return &a.ds[a.head] }

func (a *arrivals) push(d datagram) {
	if len(a.ds) == cap(a.ds) && a.head > len(a.ds)/2 {
		n := copy(a.ds, a.ds[a.head:])
		clear(a.ds[n:])
		a.ds, a.head = a.ds[:n], 0
	}
	i := len(a.ds)
	for i > a.head && a.ds[i-1].at.After(d.at) {
		i--
	}
	a.ds = slices.Insert(a.ds, i, d)
}

func (a *arrivals) pop() {
	a.ds[a.head].release()
	if a.head++; a.head == len(a.ds) {
		a.ds, a.head = a.ds[:0], 0
	}
}

// WriteBatch implements [transport.PacketConn]. It copies the segments and never waits.
func (c *conn) WriteBatch(runs []transport.Run) (int, error) {
	for i, r := range runs {
		for _, s := range r.Segments {
			if len(s) > maxUDP {
				return i, transport.ErrDatagramTooBig
			}
		}
		if err := c.net.send(c, r); err != nil {
			return i, err
		}
	}
	return len(runs), nil
}

// deliver takes ds, which are under way to c.
func (c *conn) deliver(ds []datagram) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range ds {
		d := &ds[i]
		if c.closed || c.queued+len(d.b) > receiveBuffer {
			d.release()
			continue
		}
		c.queued += len(d.b)
		c.queue.push(*d)
	}
	c.rouse()
}

func (c *conn) rouse() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// ReadBatch implements [transport.PacketConn].
func (c *conn) ReadBatch(batch []transport.Inbound) (int, error) {
	c.batch.Lock()
	defer c.batch.Unlock()
	for {
		n, next, err := c.receive(batch)
		if n > 0 || err != nil {
			return n, err
		}
		c.timer.Reset(next)
		select {
		case <-c.wake:
		case <-c.timer.C:
		}
		c.timer.Stop()
	}
}

// receive fills batch with what has arrived. If that is nothing, next is how long it
// takes until something may.
func (c *conn) receive(batch []transport.Inbound) (n int, next time.Duration, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, 0, net.ErrClosed
	}
	now := time.Now()
	segments := 0 // in batch[n-1]
	for c.queue.len() > 0 && !c.queue.first().at.After(now) {
		d := c.queue.first()
		if n > 0 && joins(&batch[n-1], segments, d) {
			in := &batch[n-1]
			in.N += copy(in.Buf[in.N:], d.b)
			segments++
		} else if n < len(batch) {
			in := &batch[n]
			in.N = copy(in.Buf, d.b)
			in.SegmentSize, in.Remote, in.Local = in.N, d.from, d.to
			segments = 1
			n++
		} else {
			break
		}
		c.queued -= len(d.b)
		c.queue.pop()
	}
	if n == 0 && c.queue.len() > 0 {
		return 0, c.queue.first().at.Sub(now), nil
	}
	return n, time.Hour, nil
}

// joins tells whether d may follow in in's buffer: the same sender and destination, none but
// the last shorter, and the kernel's limit on segments (UDP_GRO_CNT_MAX, net/ipv4/udp_offload.c).
func joins(in *transport.Inbound, segments int, d *datagram) bool {
	return in.Remote == d.from && in.Local == d.to && len(d.b) > 0 &&
		in.N == segments*in.SegmentSize && len(d.b) <= in.SegmentSize &&
		segments < transport.MaxRunSegments &&
		in.N+len(d.b) <= min(len(in.Buf), transport.MaxRunBytes)
}

// LocalAddr implements [transport.PacketConn]. It changes with [Network.Rebind].
func (c *conn) LocalAddr() netip.AddrPort {
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	return c.addr
}

// Close implements [transport.PacketConn].
func (c *conn) Close() error {
	c.net.remove(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for c.queue.len() > 0 {
		c.queue.pop()
	}
	c.queued = 0
	c.rouse()
	return nil
}
