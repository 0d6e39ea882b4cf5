package transport

import (
	"errors"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mmsghdr is struct mmsghdr of <sys/socket.h>: a message and the number of bytes
// it carried. Go pads it as C does, to 64 bytes on 64-bit systems and 32 on others.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// socketCalls are the two that move datagrams, replaceable so that tests can
// script what a kernel rarely says. Both return how many messages were done, or
// an errno when that is none.
type socketCalls struct {
	sendmmsg, recvmmsg func(fd uintptr, msgs []mmsghdr) (int, unix.Errno)
}

// The scheduler is not told of the calls (RawSyscall6). They never wait (MSG_DONTWAIT), but a
// run of 64 KiB takes the kernel longer than the 20 us after which Go gives the processor of a goroutine
// in a system call to another, and then the pump comes back without one: with it told, eight TCP flows
// took a tenth more processor time and one flow a twenty-fifth. What it costs is that a garbage collection may have to wait
// for the end of a call, some 100 us.
var kernelCalls = socketCalls{
	sendmmsg: func(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
		return int(n), errno
	},
	recvmmsg: func(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd,
			uintptr(unsafe.Pointer(unsafe.SliceData(msgs))), uintptr(len(msgs)), unix.MSG_DONTWAIT, 0, 0)
		return int(n), errno
	},
}

// socketPlatform is the Linux half of a [UDPSocket].
type socketPlatform struct {
	raw   syscall.RawConn
	sys   socketCalls
	inet6 bool // the socket is AF_INET6, remote IPv4 addresses are mapped
	// sourced: bound to all addresses, so that Run.Local and Inbound.Local go
	// through control messages. Bound to one, there is nothing to choose.
	sourced bool

	gso                   atomic.Bool // until withdrawn
	maxSegments, maxBytes int         // of one message

	zones   zoneCache
	spare   [8]atomic.Pointer[batchSender] // senders nobody uses; more than eight at once are left to the collector
	inbound *batchReceiver                 // the scratch of ReadBatch
}

// open sets the options of a bound socket and probes it.
func (s *UDPSocket) open(opts SocketOptions) error {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	s.raw, s.sys, s.zones.raw = raw, kernelCalls, raw
	s.sourced = s.local.Addr().IsUnspecified()
	var caps Capabilities
	var optErr error
	if err := raw.Control(func(fd uintptr) {
		s.inet6, optErr = isInet6(int(fd))
		if optErr == nil {
			caps, optErr = setUp(int(fd), opts, s.inet6, &s.sourced)
		}
	}); err != nil {
		return err
	}
	if optErr != nil {
		return optErr
	}
	s.maxSegments, s.maxBytes = caps.MaxSegments, caps.MaxBytes
	s.gso.Store(caps.GSO.On)
	s.caps.update(func(c *Capabilities) { *c = caps })
	s.inbound = newBatchReceiver(s)
	return nil
}

// withdrawGSO is called when the kernel refused a segmented message with errno
// and took the same data plainly.
func (s *UDPSocket) withdrawGSO(errno unix.Errno) {
	if !s.gso.CompareAndSwap(true, false) {
		return
	}
	reason := "withdrawn: sendmmsg: " + errno.Error()
	s.caps.update(func(c *Capabilities) {
		c.GSO = abilityOff(reason)
		c.MaxSegments = 1
	})
	s.logger.Warn("UDP segmentation offload failed, sending datagrams one by one",
		"local", s.local, "error", errno)
}

// takeSender and giveSender keep the scratch of WriteBatch. The free list is
// lock-free and fixed in size; it does not lend the same sender twice.
func (s *UDPSocket) takeSender() *batchSender {
	for i := range s.spare {
		if w := s.spare[i].Load(); w != nil && s.spare[i].CompareAndSwap(w, nil) {
			return w
		}
	}
	return newBatchSender(s)
}

func (s *UDPSocket) giveSender(w *batchSender) {
	for i := range s.spare {
		if s.spare[i].Load() == nil && s.spare[i].CompareAndSwap(nil, w) {
			return
		}
	}
}

// WriteBatch implements [PacketConn]. Any number of goroutines may be in it.
func (s *UDPSocket) WriteBatch(runs []Run) (int, error) {
	w := s.takeSender()
	n, err := w.send(runs)
	s.giveSender(w)
	return n, err
}

// ReadBatch implements [PacketConn]. One goroutine may be in it.
func (s *UDPSocket) ReadBatch(batch []Inbound) (int, error) {
	return s.inbound.receive(batch)
}

// closedOr maps what the poller says after Close to the bare net.ErrClosed.
func closedOr(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return net.ErrClosed
	}
	return err
}

// sendError makes the error of a run that was given up, and counts its datagrams.
func (s *UDPSocket) sendError(errno unix.Errno, datagrams int) error {
	switch errno {
	case unix.EMSGSIZE:
		addTo(&s.stats.dropTooBig, datagrams)
		return ErrDatagramTooBig
	case unix.ENOBUFS:
		addTo(&s.stats.dropNoBuffers, datagrams)
	default:
		addTo(&s.stats.dropSendError, datagrams)
	}
	return os.NewSyscallError("sendmmsg", errno)
}
