package tunwrap

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// DefaultBatchSize is the largest number of packets of one Read when Options say nothing:
// what two superpackets become at MTU 1400, and two sends with UDP_SEGMENT carry.
const DefaultBatchSize = 128

// Options configure a [Wrapper]. The zero value is good.
type Options struct {
	// MTU is what MTU reports at first, in bytes; 0 means 1280, which every IPv6
	// path carries (RFC 8200 5). It limits nothing here: the length of segments
	// follows from the GSO size that the stack derives from the Link's MTU.
	MTU int
	// BatchSize is the largest number of packets of one Read; 0 means
	// DefaultBatchSize.
	BatchSize int
	// Name is what Name reports; "" means "penstock".
	Name string
	// Logger takes what an operator should know; nil means none.
	Logger *slog.Logger
}

// A Wrapper makes a wireguard [tun.Device] of a [Link]. Outbound, Read splits the stack's
// superpackets; inbound, Write verifies and coalesces. Both translate addresses. One
// goroutine may be in Read, and one in that of each further Reader; any number in
// Write and TooBig.
//
// It has no goroutines of its own.
type Wrapper struct {
	link      Link
	name      string
	batchSize int
	log       *slog.Logger

	mtu     atomic.Int64
	closed  atomic.Bool
	writers sync.Pool // of *writer

	common

	reader *Reader // of Read

	mu      sync.Mutex
	readers []*Reader
	events  chan tun.Event // closed by Close
}

var _ tun.Device = (*Wrapper)(nil)

// New makes a Wrapper of link.
func New(link Link, o Options) *Wrapper {
	if o.MTU == 0 {
		o.MTU = header.IPv6MinimumMTU
	}
	if o.BatchSize <= 0 {
		o.BatchSize = DefaultBatchSize
	}
	if o.Name == "" {
		o.Name = "penstock"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	w := &Wrapper{
		link:      link,
		name:      o.Name,
		batchSize: o.BatchSize,
		log:       o.Logger,
		events:    make(chan tun.Event, 4),
	}
	w.mtu.Store(int64(o.MTU))
	w.tooBig.limit = rate.NewLimiter(tooBigPerSecond, tooBigBurst)
	w.writers.New = func() any { return new(writer) }
	w.reader = w.NewReader(link)
	w.events <- tun.EventUp
	return w
}

// NewReader makes a further stream of outbound packets, which shares everything but its
// Source with the others. Close of the Wrapper ends it.
func (w *Wrapper) NewReader(s Source) *Reader {
	r := newReader(w, s)
	w.mu.Lock()
	w.readers = append(w.readers, r)
	w.mu.Unlock()
	return r
}

// Read is the Read of the Reader whose Source is the Link.
func (w *Wrapper) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	return w.reader.Read(bufs, sizes, offset)
}

// Write takes the inbound packets bufs[i][offset:] in order: it verifies them, reverses
// NAT, coalesces and delivers to the Link. It borrows bufs and may overwrite them.
// Bad packets are counted and skipped, so n is always len(bufs) until Close.
func (w *Wrapper) Write(bufs [][]byte, offset int) (n int, err error) {
	if w.closed.Load() {
		return 0, fmt.Errorf("tunwrap: write: %w", os.ErrClosed)
	}
	x := w.writers.Get().(*writer)
	x.write(w, bufs, offset)
	w.writers.Put(x)
	return len(bufs), nil
}

// SetMTU changes what MTU reports and tells it to whoever reads Events. The Link's MTU is
// its owner's to change.
func (w *Wrapper) SetMTU(mtu int) {
	if old := w.mtu.Swap(int64(mtu)); old == int64(mtu) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed.Load() {
		return
	}
	select {
	case w.events <- tun.EventMTUUpdate:
	default:
		// Nobody has read the last four. One of them, or EventUp, still makes the
		// reader ask for the MTU.
	}
}

// MTU is the value of the last SetMTU, in bytes.
func (w *Wrapper) MTU() (int, error) { return int(w.mtu.Load()), nil }

// Name is Options.Name.
func (w *Wrapper) Name() (string, error) { return w.name, nil }

// File is nil: there is no file behind a stack.
func (w *Wrapper) File() *os.File { return nil }

// Events tells that the device is up, once, and of changes of the MTU. Close closes it.
func (w *Wrapper) Events() <-chan tun.Event { return w.events }

// BatchSize is Options.BatchSize.
func (w *Wrapper) BatchSize() int { return w.batchSize }

// Close makes Read and Write fail with [os.ErrClosed]. It closes the Link if that
// has a Close method, which wakes a Read that waits, releases what the Readers have in hand
// and closes Events. It does not wait for a Read or Write that is in progress, and may be
// called twice.
func (w *Wrapper) Close() error {
	w.mu.Lock()
	if w.closed.Swap(true) {
		w.mu.Unlock()
		return nil
	}
	close(w.events)
	readers := w.readers
	w.mu.Unlock()

	switch l := w.link.(type) {
	case interface{ Close() }:
		l.Close()
	case interface{ Close() error }:
		if err := l.Close(); err != nil {
			w.log.Warn("closing the link", "device", w.name, "err", err)
		}
	}
	for _, r := range readers {
		r.release()
	}
	return nil
}
