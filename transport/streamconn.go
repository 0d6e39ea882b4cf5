package transport

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	// streamRead is how much is read from the kernel in one call, in bytes.
	streamRead = 128 << 10
	// streamFlush is how much is gathered for the kernel before it is written although more is to come.
	streamFlush = 128 << 10
	// streamGather is the room for that: a record of the largest size may come on top.
	streamGather = streamFlush + maxRecordBody + 64
)

// A StreamConn is the TCP connection under the TLS connection of a session. crypto/tls makes one system call a
// record, reading and writing; over a StreamConn many records share one. Whoever dials or
// accepts puts it there before the TLS handshake:
//
//	tls.Client(transport.NewStreamConn(tcp), config)
//
// A wrapper between the two must have a method NetConn, as [tls.Conn] has, by which it is found, and leave Read and Write as
// they are. Until a [Session] takes it over it is as the connection under it.
type StreamConn struct {
	net.Conn
	raw syscall.RawConn // nil where the system cannot be asked without waiting

	taken atomic.Bool // by a session
	// Inbound; one goroutine reads.
	chunk  *[]byte // taken from a pool while it holds something
	unread []byte  // of chunk
	try    func(fd uintptr) bool
	await  func(fd uintptr) bool
	gotErr error

	mu     sync.Mutex // guards what follows, and the order of what leaves
	corked bool
	gather *[]byte

	records, sends, receives atomic.Uint64
}

// NewStreamConn makes a StreamConn of a connection, which it takes.
func NewStreamConn(conn net.Conn) *StreamConn {
	c := &StreamConn{Conn: conn, raw: pollable(conn)}
	c.try = func(fd uintptr) bool {
		c.read(fd)
		return true
	}
	c.await = func(fd uintptr) bool {
		c.read(fd)
		return c.gotErr != errWouldBlock
	}
	return c
}

// NetConn is the connection below.
func (c *StreamConn) NetConn() net.Conn { return c.Conn }

// errWouldBlock: nothing is there to be read. crypto/tls goes on with the next Read after an error that
// calls itself temporary.
var errWouldBlock error = wouldBlock{}

type wouldBlock struct{}

func (wouldBlock) Error() string   { return "nothing to read" }
func (wouldBlock) Timeout() bool   { return false }
func (wouldBlock) Temporary() bool { return true }

var (
	readChunks   = sync.Pool{New: func() any { b := make([]byte, streamRead); return &b }}
	gatherChunks = sync.Pool{New: func() any { b := make([]byte, 0, streamGather); return &b }}
)

// takeOver makes Read return errWouldBlock in place of waiting.
func (c *StreamConn) takeOver() {
	c.taken.Store(true)
	if c.raw != nil {
		limitUnsent(c.raw)
	}
}

// canWait tells whether Read returns when nothing is there.
func (c *StreamConn) canWait() bool { return c.raw != nil }

// Read copies what there is. Taken over it never waits, if it can be helped.
func (c *StreamConn) Read(p []byte) (int, error) {
	if len(c.unread) == 0 {
		if c.raw == nil || !c.taken.Load() {
			return c.Conn.Read(p)
		}
		if err := c.raw.Read(c.try); err != nil {
			return 0, err
		}
		if c.gotErr != nil {
			return 0, c.gotErr
		}
	}
	n := copy(p, c.unread)
	c.consume(n)
	return n, nil
}

func (c *StreamConn) consume(n int) {
	if c.unread = c.unread[n:]; len(c.unread) == 0 {
		readChunks.Put(c.chunk)
		c.chunk, c.unread = nil, nil
	}
}

// wait returns when there is something to read, already read then, or an error instead of it.
func (c *StreamConn) wait() error {
	if c.raw == nil || len(c.unread) > 0 {
		return nil
	}
	if err := c.raw.Read(c.await); err != nil {
		return err
	}
	return c.gotErr
}

// read makes one system call. It leaves bytes in unread, or an error in gotErr.
func (c *StreamConn) read(fd uintptr) {
	chunk := readChunks.Get().(*[]byte)
	n, err := readNow(fd, *chunk)
	c.gotErr = err
	if err != nil {
		readChunks.Put(chunk)
		return
	}
	c.receives.Add(1)
	c.chunk, c.unread = chunk, (*chunk)[:n]
}

// Write sends p, or gathers it while corked. crypto/tls calls it once a record.
func (c *StreamConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.records.Add(1)
	if !c.corked {
		c.sends.Add(1)
		return c.Conn.Write(p)
	}
	if c.gather == nil {
		c.gather = gatherChunks.Get().(*[]byte)
	}
	if len(*c.gather)+len(p) > cap(*c.gather) {
		if err := c.flushLocked(); err != nil {
			return 0, err
		}
		if len(p) > streamGather {
			c.sends.Add(1)
			return c.Conn.Write(p)
		}
	}
	*c.gather = append(*c.gather, p...)
	if len(*c.gather) >= streamFlush {
		return len(p), c.flushLocked()
	}
	return len(p), nil
}

// cork makes Write gather.
func (c *StreamConn) cork() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.corked = true
}

func (c *StreamConn) flushLocked() error {
	if c.gather == nil || len(*c.gather) == 0 {
		return nil
	}
	c.sends.Add(1)
	_, err := c.Conn.Write(*c.gather)
	*c.gather = (*c.gather)[:0]
	return err
}

// uncork sends what was gathered, and Write no longer gathers.
func (c *StreamConn) uncork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.flushLocked()
	c.corked = false
	if c.gather != nil {
		gatherChunks.Put(c.gather)
		c.gather = nil
	}
	return err
}
