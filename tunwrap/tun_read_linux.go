package tunwrap

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A TUNReader is one stream of outbound packets of a [TUN]: a queue of the interface. The kernel spreads
// flows over the queues; order is kept within one. A TUNReader is for one goroutine at a time.
type TUNReader struct {
	t *TUN
	q *tunQueue
	unpacker

	vectors [3]unix.Iovec         // vnet header, record buffer, spill
	fill    func(fd uintptr) bool // reads until the batch is full or the kernel has no more

	// Of the Read in progress.
	bufs   [][]byte
	sizes  []int
	offset int
	n      int
	errno  unix.Errno

	mu      sync.Mutex
	pending [][]byte // fragments from TooBig, ready to go out
}

func newTUNReader(t *TUN, q *tunQueue) *TUNReader {
	r := &TUNReader{t: t, q: q}
	r.vectors[0].Base = &r.header[0]
	r.vectors[0].SetLen(vnetHeaderSize)
	r.vectors[2].Base = unsafe.SliceData(r.rest())
	r.vectors[2].SetLen(len(r.rest()))
	r.fill = r.fillFrom
	return r
}

// Read waits for at least one outbound packet, then writes packets until bufs are full or
// the kernel has no more: the i-th to bufs[i][offset:], its length to sizes[i]. It borrows bufs and
// sizes until it returns. A superpacket that does not fit whole is continued by the next Read. A
// packet that cannot be sent is counted and skipped. After Close the error wraps [os.ErrClosed], and
// also after the interface has been deleted.
func (r *TUNReader) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	r.bufs, r.sizes, r.offset, r.n, r.errno = bufs, sizes, offset, 0, 0
	for r.n == 0 && err == nil {
		if r.t.closed.Load() {
			err = errTUNClosed("read")
			break
		}
		r.takePending()
		err = r.readSome()
	}
	r.bufs, r.sizes = nil, nil
	r.vectors[1].Base = nil
	if r.seg.busy && err != nil {
		r.seg.reset()
		r.t.drops.add(DropClosed)
	}
	r.t.outbound.add(&r.counts)
	r.counts = outboundCounts{}
	if r.n > 0 {
		return r.n, nil // an error will come again
	}
	return 0, err
}

// readSome waits for packets, unless there are some already, and reads.
func (r *TUNReader) readSome() error {
	err := r.q.raw.Read(r.fill)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded): // TooBig has called
		return r.q.file.SetReadDeadline(time.Time{})
	case err != nil && r.t.closed.Load():
		return errTUNClosed("read")
	case err != nil && !r.ask():
		return fmt.Errorf("tunwrap: read: %w", err)
	case r.errno == unix.EBADFD:
		r.t.log.Error("the interface has been deleted", "interface", r.t.name)
		return fmt.Errorf("tunwrap: %s has been deleted: %w", r.t.name, os.ErrClosed)
	case r.errno != 0:
		return fmt.Errorf("tunwrap: %w", os.NewSyscallError("readv", r.errno))
	}
	return nil
}

// ask reads without Go's poller, which refuses a file once its interface has been deleted, for ever and without a
// reason. It reports false if the kernel has nothing to say.
func (r *TUNReader) ask() (said bool) {
	_ = r.q.raw.Control(func(fd uintptr) { said = r.fill(fd) }) // fails only after Close
	return said
}

// fillFrom reads packets from fd until the buffers are full or there are no more. It reports false
// if there were none, to wait for some. It makes one system call a packet, which never waits, so the scheduler is
// not told of it.
func (r *TUNReader) fillFrom(fd uintptr) bool {
	if f := r.t.filter.Load(); f != nil {
		r.now = f.now()
	}
	for r.n < len(r.bufs) {
		if r.seg.busy {
			r.n += r.split(r.bufs[r.n:], r.sizes[r.n:], r.offset, r.t)
			continue
		}
		dst := r.bufs[r.n][r.offset:]
		size, errno := r.receive(fd, dst)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return r.n > 0
		default:
			r.errno = errno
			return true
		}
		if written := r.take(dst, size, r.t); written > 0 {
			r.sizes[r.n] = written
			r.n++
		}
	}
	return true
}

// receive reads one packet of size bytes: the first part to direct(dst), the others to rest.
func (r *TUNReader) receive(fd uintptr, dst []byte) (size int, errno unix.Errno) {
	dst = r.direct(dst)
	r.vectors[1].Base = unsafe.SliceData(dst)
	r.vectors[1].SetLen(len(dst))
	vectors := r.vectors[:]
	if !r.t.vnet {
		vectors = vectors[1:]
	}
	n, _, errno := unix.RawSyscall(unix.SYS_READV, fd, uintptr(unsafe.Pointer(&vectors[0])), uintptr(len(vectors)))
	if errno != 0 {
		return 0, errno
	}
	if r.t.vnet {
		n -= vnetHeaderSize
	}
	if int(n) <= 0 { // no packet is empty
		return 0, unix.EIO
	}
	return int(n), 0
}

// maxPending bounds the fragments that wait to be read. They come from a pump, which reads next.
const maxPending = 256

// requeueFragments leaves the fragments of b to the first reader, and wakes it. NAT has been done.
func (t *TUN) requeueFragments(b []byte, l *layout, mtu int) {
	r := t.readers[0]
	var list [][]byte
	ok := fragment(b, mtu, func(head, payload []byte) {
		list = append(list, append(append(make([]byte, 0, len(head)+len(payload)), head...), payload...))
	})
	r.mu.Lock()
	if !ok || len(r.pending)+len(list) > maxPending {
		r.mu.Unlock()
		t.drops.add(DropTooBig)
		return
	}
	r.pending = append(r.pending, list...)
	r.mu.Unlock()
	t.tooBig.frags.Add(uint64(len(list)))
	// The reader may be waiting for the kernel.
	_ = r.q.file.SetReadDeadline(time.Unix(1, 0)) // fails only after Close
}

// takePending writes fragments out.
func (r *TUNReader) takePending() {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := 0
	for _, b := range r.pending {
		if r.n == len(r.bufs) {
			break
		}
		taken++
		dst := r.bufs[r.n][r.offset:]
		if len(b) > len(dst) {
			r.t.drops.add(DropOversize)
			continue
		}
		r.sizes[r.n] = copy(dst, b)
		r.n++
		r.counts.segments++
		r.counts.bytes += uint64(len(b))
	}
	r.pending = append(r.pending[:0], r.pending[taken:]...)
}
