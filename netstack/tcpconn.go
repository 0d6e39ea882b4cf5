package netstack

import (
	"bytes"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

// TCPConn is a TCP connection inside the VPN. It has the methods of a
// [net.TCPConn] that make sense there. Any of them may be called from any goroutine.
type TCPConn struct {
	socket
	reader  tcpip.SliceWriter // of the Read under way; under in.mu
	payload bytes.Reader      // of the Write under way; under out.mu
	sent    bulkMeter         // under out.mu
}

var (
	_ net.Conn      = (*TCPConn)(nil)
	_ io.WriterTo   = (*TCPConn)(nil)
	_ io.ReaderFrom = (*TCPConn)(nil)
)

// newTCPConn takes ep, which is connected.
func newTCPConn(n *Node, ep tcpip.Endpoint, wq *waiter.Queue) *TCPConn {
	c := &TCPConn{}
	c.socket.init(n, "tcp", ep, wq)
	c.SetKeepAlive(true)
	c.SetKeepAlivePeriod(keepAlivePeriod)
	return c
}

// keepAlivePeriod is what the net package sets on its connections (net.ListenConfig).
const keepAlivePeriod = 15 * time.Second

// Read implements [net.Conn].
func (c *TCPConn) Read(b []byte) (int, error) {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	if len(b) == 0 {
		if c.isClosed() {
			return 0, c.opError("read", net.ErrClosed)
		}
		return 0, nil
	}
	c.reader = b
	n, err := c.readLocked(&c.reader)
	c.reader = nil
	return n, err
}

// readLocked reads what is there, or waits for something, into w.
func (c *TCPConn) readLocked(w io.Writer) (int, error) {
	if err := c.in.ready(&c.socket); err != nil {
		return 0, c.opError("read", err)
	}
	for {
		res, terr := c.ep.Read(w, tcpip.ReadOptions{})
		switch terr.(type) {
		case nil:
			// Tells the stack how fast the program reads, which opens the window.
			c.ep.ModerateRecvBuf(res.Count)
			return res.Count, nil
		case *tcpip.ErrWouldBlock:
			if err := c.in.wait(&c.socket); err != nil {
				return 0, c.opError("read", err)
			}
		case *tcpip.ErrClosedForReceive:
			if c.isClosed() {
				return 0, c.opError("read", net.ErrClosed)
			}
			return 0, io.EOF
		default:
			return 0, c.opError("read", c.failure(terr))
		}
	}
}

// Write implements [net.Conn].
func (c *TCPConn) Write(b []byte) (int, error) {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	defer c.payload.Reset(nil)
	if err := c.out.ready(&c.socket); err != nil {
		return 0, c.opError("write", err)
	}
	for n := 0; ; {
		// The stack may take a part and say nothing: always start from what is left.
		c.payload.Reset(b[n:])
		m, terr := c.ep.Write(&c.payload, tcpip.WriteOptions{})
		n += int(m)
		if size := c.node.budget.add(&c.sent, int(m), time.Now()); size > 0 {
			c.ep.SocketOptions().SetSendBufferSize(int64(size), true)
		}
		switch terr.(type) {
		case nil:
			if n == len(b) {
				return n, nil
			}
		case *tcpip.ErrWouldBlock:
			if err := c.out.wait(&c.socket); err != nil {
				return n, c.opError("write", err)
			}
		default:
			return n, c.opError("write", c.failure(terr))
		}
	}
}

// copySize is the piece by which WriteTo and ReadFrom move data: two superpackets.
// io.Copy's own 32 KiB would cut every superpacket in two.
const copySize = 128 << 10

var copyBuffers = sync.Pool{New: func() any { return new([copySize]byte) }}

// WriteTo implements [io.WriterTo]: io.Copy from the connection moves whole
// superpackets.
func (c *TCPConn) WriteTo(w io.Writer) (int64, error) {
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	return copyChunks(w, c.Read, buf[:])
}

// ReadFrom implements [io.ReaderFrom]: io.Copy to the connection moves whole
// superpackets.
func (c *TCPConn) ReadFrom(r io.Reader) (int64, error) {
	buf := copyBuffers.Get().(*[copySize]byte)
	defer copyBuffers.Put(buf)
	return copyChunks(writerFunc(c.Write), r.Read, buf[:])
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

// copyChunks moves data until EOF through buf, which it borrows.
func copyChunks(w io.Writer, read func([]byte) (int, error), buf []byte) (total int64, err error) {
	for {
		n, rerr := read(buf)
		if n > 0 {
			m, werr := w.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
			if m < n {
				return total, io.ErrShortWrite
			}
		}
		if rerr == io.EOF {
			return total, nil
		}
		if rerr != nil {
			return total, rerr
		}
	}
}

// CloseRead shuts down the inbound half: Read gives what has arrived, then EOF.
func (c *TCPConn) CloseRead() error { return c.shutdown(tcpip.ShutdownRead) }

// CloseWrite shuts down the outbound half: the peer reads EOF after what has been
// written, and can still send.
func (c *TCPConn) CloseWrite() error { return c.shutdown(tcpip.ShutdownWrite) }

func (c *TCPConn) shutdown(how tcpip.ShutdownFlags) error {
	if c.isClosed() {
		return c.opError("close", net.ErrClosed)
	}
	if terr := c.ep.Shutdown(how); terr != nil {
		return c.opError("close", c.failure(terr))
	}
	return nil
}

// Close implements [net.Conn]. Data written before it is still delivered, for as long
// as the node lives; see [Node.Close].
func (c *TCPConn) Close() error { return c.socket.close() }

// SetNoDelay(false) lets small writes wait for the acknowledgement of earlier ones
// (Nagle's algorithm). As everywhere in Go, they do not wait by default.
func (c *TCPConn) SetNoDelay(noDelay bool) error {
	c.ep.SocketOptions().SetDelayOption(!noDelay)
	return nil
}

// SetKeepAlive turns probes on an idle connection on, the default, or off.
func (c *TCPConn) SetKeepAlive(on bool) error {
	c.ep.SocketOptions().SetKeepAlive(on)
	return nil
}

// SetKeepAlivePeriod sets the idle time before a probe and between probes.
func (c *TCPConn) SetKeepAlivePeriod(d time.Duration) error {
	idle, interval := tcpip.KeepaliveIdleOption(d), tcpip.KeepaliveIntervalOption(d)
	if terr := c.ep.SetSockOpt(&idle); terr != nil {
		return c.opError("set", errnoOf(terr))
	}
	if terr := c.ep.SetSockOpt(&interval); terr != nil {
		return c.opError("set", errnoOf(terr))
	}
	return nil
}

// SetLinger says what Close does with data not yet sent: sec < 0, the default,
// delivers it in the background; sec == 0 discards it and resets the connection; sec > 0 is like
// sec < 0 here.
func (c *TCPConn) SetLinger(sec int) error {
	c.ep.SocketOptions().SetLinger(tcpip.LingerOption{Enabled: sec >= 0, Timeout: time.Duration(max(sec, 0)) * time.Second})
	return nil
}

// failure converts what the stack says of the connection.
func (c *TCPConn) failure(terr tcpip.Error) error {
	err := errnoOf(terr)
	if c.isClosed() && (err == syscall.EPIPE || err == syscall.ECONNABORTED || err == syscall.ENOTCONN) {
		return net.ErrClosed
	}
	return err
}
