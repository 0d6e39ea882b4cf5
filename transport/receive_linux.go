package transport

import (
	"errors"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// receiveMessages is the most elements one system call fills.
const receiveMessages = 64

// A batchReceiver is the scratch of ReadBatch, owned by the goroutine that is in it.
type batchReceiver struct {
	sock *UDPSocket

	headers  [receiveMessages]mmsghdr
	vectors  [receiveMessages]unix.Iovec
	names    [receiveMessages]sockaddr
	controls [receiveMessages][receiveControlSize / 8]uint64 // words, aligned as a cmsghdr

	asked    int    // elements offered to the kernel
	got      int    // elements filled by it
	calls    int    // system calls
	overflow uint32 // the last SO_RXQ_OVFL
	errno    unix.Errno

	wait func(fd uintptr) bool // one recvmmsg, asking the poller to wait on EAGAIN
}

var errEmptyBatch = errors.New("ReadBatch: empty batch")

func newBatchReceiver(s *UDPSocket) *batchReceiver {
	r := &batchReceiver{sock: s}
	for i := range r.headers {
		h := &r.headers[i].hdr
		h.Name = r.names[i].pointer()
		h.Iov = &r.vectors[i]
		h.SetIovlen(1)
		h.Control = (*byte)(unsafe.Pointer(&r.controls[i]))
	}
	r.wait = func(fd uintptr) bool {
		r.got, r.errno = 0, unix.EINTR
		for r.errno == unix.EINTR {
			r.calls++
			r.got, r.errno = s.sys.recvmmsg(fd, r.headers[:r.asked])
		}
		return r.errno != unix.EAGAIN
	}
	return r
}

// receive is [PacketConn.ReadBatch].
func (r *batchReceiver) receive(batch []Inbound) (int, error) {
	if len(batch) == 0 {
		return 0, errEmptyBatch
	}
	for {
		r.offer(batch)
		err := r.sock.raw.Read(r.wait)
		clear(r.vectors[:r.asked]) // the buffers were borrowed
		addTo(&r.sock.stats.receives, r.calls)
		r.calls = 0
		switch {
		case err != nil:
			return 0, closedOr(err)
		case r.errno != 0:
			return 0, os.NewSyscallError("recvmmsg", r.errno)
		}
		if n := r.collect(batch); n > 0 {
			return n, nil
		}
	}
}

// offer points the headers at the buffers of batch, and restores what the kernel
// wrote in them the last time.
func (r *batchReceiver) offer(batch []Inbound) {
	r.asked = min(len(batch), receiveMessages)
	for i := range r.headers[:r.asked] {
		h := &r.headers[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(receiveControlSize)
		h.Flags = 0
		buf := batch[i].Buf
		r.vectors[i].Base = unsafe.SliceData(buf)
		r.vectors[i].SetLen(cap(buf))
	}
}

// collect completes the elements that the kernel filled, moving those up that
// follow a receive given up, and returns how many there are.
func (r *batchReceiver) collect(batch []Inbound) int {
	var tally inboundTally
	n := 0
	for i := range r.headers[:r.got] {
		m := &r.headers[i]
		control := parseControl(unsafe.Slice(m.hdr.Control, m.hdr.Controllen))
		if control.overflew {
			r.sock.stats.dropKernel.Add(uint64(control.overflow - r.overflow))
			r.overflow = control.overflow
		}
		// Without all control messages the segment size may be missing.
		if m.hdr.Flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			tally.truncated++
			continue
		}
		if n < i {
			batch[n], batch[i] = batch[i], batch[n]
		}
		in := &batch[n]
		in.Remote = r.names[i].addrPort(&r.sock.zones)
		in.Local = r.local(&control)
		tally.fill(in, int(m.len), control.segment)
		n++
	}
	tally.count(&r.sock.stats)
	return n
}

// local is the address received at.
func (r *batchReceiver) local(c *receiveControl) netip.Addr {
	if !r.sock.local.Addr().IsUnspecified() {
		return r.sock.local.Addr()
	}
	if c.index != 0 && c.local.Is6() && c.local.IsLinkLocalUnicast() {
		return c.local.WithZone(r.sock.zones.name(c.index))
	}
	return c.local
}
