package netstack

import (
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// A socket is what TCPConn and UDPConn have in common: a stack endpoint, two
// directions that can wait, and a Close that wakes both.
type socket struct {
	node          *Node
	network       string
	ep            tcpip.Endpoint
	wq            *waiter.Queue
	local, remote net.Addr // as they were; the endpoint forgets them when it fails
	in, out       direction
	release       func() // of the port, if it was claimed

	closing atomic.Bool
	closed  chan struct{}
}

// A direction is inbound or outbound of a socket. One operation at a time runs in
// each, as in the net package, so one registration with the endpoint, made once, wakes it.
type direction struct {
	mu       sync.Mutex // held by the operation under way
	entry    waiter.Entry
	wake     chan struct{}
	deadline deadline
}

const alwaysEvents = waiter.EventErr | waiter.EventHUp | waiter.EventRdHUp

// init takes ep.
func (s *socket) init(n *Node, network string, ep tcpip.Endpoint, wq *waiter.Queue) {
	s.node, s.network, s.ep, s.wq = n, network, ep, wq
	s.closed = make(chan struct{})
	if a, terr := ep.GetLocalAddress(); terr == nil {
		s.local = netAddr(network, a)
	}
	if a, terr := ep.GetRemoteAddress(); terr == nil {
		s.remote = netAddr(network, a)
	}
	s.in.entry, s.in.wake = waiter.NewChannelEntry(waiter.ReadableEvents | alwaysEvents)
	s.out.entry, s.out.wake = waiter.NewChannelEntry(waiter.WritableEvents | alwaysEvents)
	s.in.deadline.init()
	s.out.deadline.init()
	wq.EventRegister(&s.in.entry)
	wq.EventRegister(&s.out.entry)
}

// close closes the endpoint once and wakes both directions.
func (s *socket) close() error {
	if s.closing.Swap(true) {
		return s.opError("close", net.ErrClosed)
	}
	close(s.closed)
	s.ep.Close()
	if s.release != nil {
		s.release()
	}
	s.wq.EventUnregister(&s.in.entry)
	s.wq.EventUnregister(&s.out.entry)
	s.in.deadline.set(time.Time{})
	s.out.deadline.set(time.Time{})
	return nil
}

// isClosed tells whether the socket, or its node, was closed here.
func (s *socket) isClosed() bool { return s.closing.Load() || s.node.isClosed() }

// ready says whether an operation may start at all.
func (d *direction) ready(s *socket) error {
	if s.isClosed() {
		return net.ErrClosed
	}
	if isClosed(d.deadline.done()) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

// wait waits until the endpoint may have become ready. d.mu is held.
func (d *direction) wait(s *socket) error {
	select {
	case <-d.wake:
		if s.isClosed() {
			return net.ErrClosed
		}
		return nil
	case <-s.closed:
		return net.ErrClosed
	case <-d.deadline.done():
		return os.ErrDeadlineExceeded
	}
}

// SetDeadline sets both deadlines; see [net.Conn].
func (s *socket) SetDeadline(t time.Time) error {
	if err := s.SetReadDeadline(t); err != nil {
		return err
	}
	return s.SetWriteDeadline(t)
}

// SetReadDeadline bounds present and future reads; zero means no deadline.
func (s *socket) SetReadDeadline(t time.Time) error { return s.setDeadline(&s.in, t) }

// SetWriteDeadline bounds present and future writes; zero means no deadline.
func (s *socket) SetWriteDeadline(t time.Time) error { return s.setDeadline(&s.out, t) }

func (s *socket) setDeadline(d *direction, t time.Time) error {
	if s.isClosed() {
		return s.opError("set", net.ErrClosed)
	}
	d.deadline.set(t)
	return nil
}

// SetReadBuffer sets how many inbound bytes may wait to be read, and ends its
// automatic tuning.
func (s *socket) SetReadBuffer(bytes int) error {
	s.ep.SocketOptions().SetReceiveBufferSize(int64(bytes), true)
	return nil
}

// SetWriteBuffer sets how many outbound bytes may wait to be sent, and ends its
// automatic tuning.
func (s *socket) SetWriteBuffer(bytes int) error {
	s.ep.SocketOptions().SetSendBufferSize(int64(bytes), true)
	return nil
}

// LocalAddr is the address inside the VPN on this side.
func (s *socket) LocalAddr() net.Addr { return s.local }

// RemoteAddr is the address inside the VPN on the other side; nil for a UDP socket
// that is not connected.
func (s *socket) RemoteAddr() net.Addr { return s.remote }

func (s *socket) opError(op string, err error) error {
	return opError(op, s.network, s.local, s.remote, err)
}
