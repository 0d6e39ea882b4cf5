package transport

import (
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// sendMessages per system call. A pump's batch is a few runs; without GSO a
	// run of 64 segments is just one call.
	sendMessages = 64
	// sendVectors per system call are UIO_MAXIOV, what Linux takes for one message
	// (include/uapi/linux/uio.h), so the segments of any one run fit.
	sendVectors = 1024
	// maxSegments is UDP_MAX_SEGMENTS since Linux 6.9.
	maxSegments = 128
)

// segmentAt is a segment of a run within the batch being sent.
type segmentAt struct{ run, segment int }

// sentMessage is what a batchSender remembers of the mmsghdr with the same index.
type sentMessage struct {
	start    segmentAt
	segments int
	bytes    int
	sourced  bool // it carries Run.Local
}

// A batchSender is the scratch of one WriteBatch. It is made once, never grows, and
// is used by one goroutine at a time.
type batchSender struct {
	sock *UDPSocket

	headers  [sendMessages]mmsghdr
	messages [sendMessages]sentMessage
	names    [sendMessages]sockaddr
	controls [sendMessages]sendControl
	vectors  [sendVectors]unix.Iovec

	filled   int       // messages ready in headers
	vectored int       // vectors they use
	end      segmentAt // first segment not in them

	// The run being tried without something the kernel may have refused; -1: none.
	plainRun   int // one segment a message, because of refusal
	refusal    unix.Errno
	unboundRun int  // without Run.Local
	retrying   bool // one of them has not passed yet

	sent, calls int        // messages the last system call took, and system calls in all
	errno       unix.Errno // why it took none

	try  func(fd uintptr)      // one sendmmsg
	wait func(fd uintptr) bool // the same, asking the poller to wait on EAGAIN

	messagesSent, datagrams, bytes int // tallies of the batch
}

func newBatchSender(s *UDPSocket) *batchSender {
	w := &batchSender{sock: s}
	w.try = func(fd uintptr) {
		w.sent, w.errno = 0, unix.EINTR
		for w.errno == unix.EINTR {
			w.calls++
			w.sent, w.errno = s.sys.sendmmsg(fd, w.headers[:w.filled])
		}
	}
	w.wait = func(fd uintptr) bool {
		w.try(fd)
		return w.errno != unix.EAGAIN
	}
	return w
}

// send sends the runs in order until one has to be given up; see
// [PacketConn.WriteBatch]. It borrows runs.
func (w *batchSender) send(runs []Run) (int, error) {
	w.plainRun, w.unboundRun, w.retrying = -1, -1, false
	n, err := w.sendFrom(runs)
	c := &w.sock.stats
	addTo(&c.sends, w.calls)
	addTo(&c.messages, w.messagesSent)
	addTo(&c.runs, n)
	addTo(&c.datagramsOut, w.datagrams)
	addTo(&c.bytesOut, w.bytes)
	w.calls, w.messagesSent, w.datagrams, w.bytes = 0, 0, 0, 0
	return n, err
}

func (w *batchSender) sendFrom(runs []Run) (int, error) {
	at := segmentAt{}
	for {
		err := w.fill(runs, at)
		if w.filled == 0 {
			if err != nil {
				addTo(&w.sock.stats.dropSendError, len(runs[w.end.run].Segments))
			}
			return w.end.run, err
		}
		at = w.messages[0].start // behind any empty runs
		if err := w.flush(); err != nil {
			return at.run, err
		}
		if w.sent > 0 {
			w.account()
			w.learn(at)
			at = w.end
			if w.sent < w.filled {
				at = w.messages[w.sent].start
			}
			continue
		}
		if !w.retryWithout(at) {
			if runs[at.run].Remote.Addr().Zone() != "" {
				w.sock.zones.forget() // the interface may have come back under another index
			}
			return at.run, w.sock.sendError(w.errno, len(runs[at.run].Segments)-at.segment)
		}
	}
}

// account adds up the messages of the last system call.
func (w *batchSender) account() {
	for i := range w.messages[:w.sent] {
		w.datagrams += w.messages[i].segments
		w.bytes += w.messages[i].bytes
	}
	w.messagesSent += w.sent
}

// retryWithout decides, after an errno for the first message, whether to send
// it again without something the kernel may have refused.
//
// EINVAL says little: the source address is gone; GSO is refused; or before
// Linux 6.15 or so a segment of a segmented message exceeds the MTU
// (udp_send_skb). Hence GSO is withdrawn only when the same data then pass
// plainly, and an EMSGSIZE there is just that.
func (w *batchSender) retryWithout(at segmentAt) bool {
	first := &w.messages[0]
	switch {
	case sourceRefused(w.errno) && first.sourced:
		w.unboundRun = at.run
	case gsoRefused(w.errno) && first.segments > 1:
		w.plainRun, w.refusal = at.run, w.errno
		w.unboundRun = -1
	default:
		return false
	}
	w.retrying = true
	return true
}

// learn is called when messages from at on were sent: was it the retry that passed?
func (w *batchSender) learn(at segmentAt) {
	if !w.retrying {
		return
	}
	w.retrying = false
	if w.plainRun == at.run {
		addTo(&w.sock.stats.gsoResent, 1)
		w.sock.withdrawGSO(w.refusal)
	}
	if w.unboundRun == at.run {
		addTo(&w.sock.stats.sourceLost, 1)
	}
}

// gsoRefused: EIO is no checksum offload on the egress device (before Linux 6.11)
// or an xfrm policy, EINVAL too many segments or a kernel without it, EOPNOTSUPP
// a sandboxed kernel.
func gsoRefused(errno unix.Errno) bool {
	return errno == unix.EIO || errno == unix.EINVAL || errno == unix.EOPNOTSUPP
}

// sourceRefused: IPv6 says EINVAL to a source address that is not the host's
// (ip6_datagram_send_ctl), IPv4 ENETUNREACH (ip_route_output_key_hash_rcu; seen on
// Linux 6.18) or EINVAL.
func sourceRefused(errno unix.Errno) bool {
	return errno == unix.EINVAL || errno == unix.ENETUNREACH
}

// flush makes one system call with the messages filled, waiting for room in the
// send buffer if there is none. The result is in sent and errno; the error is
// [net.ErrClosed] only.
//
// It goes through Control, not Write: Write holds the socket's write lock, and
// concurrent senders would queue where the kernel lets them pass side by side.
func (w *batchSender) flush() error {
	err := w.sock.raw.Control(w.try)
	if err == nil && w.errno == unix.EAGAIN {
		addTo(&w.sock.stats.sendWaits, 1)
		err = w.sock.raw.Write(w.wait)
	}
	clear(w.vectors[:w.vectored]) // the segments were borrowed
	return closedOr(err)
}

// fill makes messages of the segments from at on, as many as fit. It stops early
// before a run whose address cannot be used, and returns why when nothing was
// filled before it; end is then that run.
func (w *batchSender) fill(runs []Run, at segmentAt) error {
	w.filled, w.vectored = 0, 0
	segmented := w.sock.gso.Load()
	var name *sockaddr
	var remote netip.AddrPort
	for w.end = at; w.end.run < len(runs); w.end = (segmentAt{run: w.end.run + 1}) {
		run := &runs[w.end.run]
		if w.end.segment == len(run.Segments) {
			continue
		}
		if w.filled == sendMessages {
			return nil
		}
		if name == nil || run.Remote != remote {
			name, remote = &w.names[w.filled], run.Remote
			if err := name.set(remote, w.sock.inet6, &w.sock.zones); err != nil {
				if w.filled > 0 {
					return nil
				}
				return err
			}
		}
		limit := w.sock.maxSegments
		if !segmented || w.end.run == w.plainRun {
			limit = 1
		}
		local := run.Local
		if !w.sock.sourced || w.end.run == w.unboundRun {
			local = netip.Addr{}
		}
		if !w.fillRun(run.Segments, name, local, limit) {
			return nil
		}
	}
	return nil
}

// fillRun makes messages of what is left of a run, and tells whether all of it
// fitted.
func (w *batchSender) fillRun(segments [][]byte, name *sockaddr, local netip.Addr, limit int) bool {
	for w.end.segment < len(segments) {
		rest := segments[w.end.segment:]
		if w.filled == sendMessages || sendVectors-w.vectored < min(limit, len(rest)) {
			return false
		}
		m, h := &w.messages[w.filled], &w.headers[w.filled].hdr
		m.start = w.end
		vectors := w.vectors[w.vectored:]
		used := 0
		m.segments, m.bytes, used = gather(vectors, rest, limit, w.sock.maxBytes)

		h.Name, h.Namelen = name.pointer(), name.size
		h.Iov = &vectors[0]
		h.SetIovlen(used)
		control := &w.controls[w.filled]
		size := 0
		if m.segments > 1 {
			size = control.putSegmentSize(size, len(rest[0]))
		}
		size, m.sourced = control.putSource(size, local, name.is4, &w.sock.zones)
		h.Control = nil
		if size > 0 {
			h.Control = (*byte)(unsafe.Pointer(control))
		}
		h.SetControllen(size)

		w.filled++
		w.vectored += used
		w.end.segment += m.segments
	}
	return true
}

// gather fills vectors with the longest start of segments that one message can
// carry: equal sizes but for a shorter and not empty last one, at most limit of
// them and maxBytes together, at least one. Segments that touch in memory share a
// vector. It borrows segments until the vectors are cleared.
func gather(vectors []unix.Iovec, segments [][]byte, limit, maxBytes int) (taken, bytes, used int) {
	size := len(segments[0])
	var end uintptr // where the last vector ends
	for _, segment := range segments {
		if taken > 0 && (taken == limit || len(segment) > size || len(segment) == 0 || bytes+len(segment) > maxBytes) {
			break
		}
		base := unsafe.SliceData(segment)
		if taken > 0 && uintptr(unsafe.Pointer(base)) == end {
			vectors[used-1].SetLen(int(vectors[used-1].Len) + len(segment))
		} else {
			vectors[used].Base = base
			vectors[used].SetLen(len(segment))
			used++
		}
		end = uintptr(unsafe.Pointer(base)) + uintptr(len(segment))
		taken++
		bytes += len(segment)
		if len(segment) < size {
			break
		}
	}
	return taken, bytes, used
}
