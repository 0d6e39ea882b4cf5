package speed

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"
)

// A meter counts what all flows of a test move, in one direction.
type meter struct {
	bytes, datagrams atomic.Int64
	started          time.Time
	last             atomic.Int64 // ns from started to the last byte
}

func (m *meter) add(n int) {
	m.bytes.Add(int64(n))
	m.datagrams.Add(1)
}

// stamp notes that something moved just now.
func (m *meter) stamp() { m.last.Store(int64(time.Since(m.started))) }

func (m *meter) count() *count {
	return &count{Bytes: m.bytes.Load(), Datagrams: m.datagrams.Load(), Elapsed: time.Duration(m.last.Load())}
}

// sendTCP sends until end and ends its half of the connection.
func sendTCP(c net.Conn, m *meter, end time.Time) error {
	b := make([]byte, 128<<10) // two superpackets
	c.SetWriteDeadline(end)
	for {
		n, err := c.Write(b)
		m.add(n)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			m.stamp()
			break
		}
		if err != nil {
			return err
		}
	}
	c.SetWriteDeadline(time.Now().Add(setupTimeout))
	return c.(interface{ CloseWrite() error }).CloseWrite()
}

// receiveTCP receives to the end.
func receiveTCP(c net.Conn, m *meter, most time.Duration) error {
	b := make([]byte, 128<<10)
	c.SetReadDeadline(time.Now().Add(most + setupTimeout))
	for {
		n, err := c.Read(b)
		if n > 0 {
			m.add(n)
			m.stamp()
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// sendUDP sends datagrams until end. A rate that is not 0 is kept by sleeping, in
// steps of a millisecond or so, never catching up on more than ten.
func sendUDP(write func([]byte) error, t *Test, token uint64, flow int, m *meter, end time.Time) error {
	b := make([]byte, t.Datagram)
	var gap time.Duration // between datagrams
	if t.Rate > 0 {
		gap = time.Duration(float64(t.Datagram*8*t.Flows) / float64(t.Rate) * float64(time.Second))
	}
	next := time.Now()
	for number := uint64(1); ; number++ {
		now := time.Now()
		if !now.Before(end) {
			m.stamp()
			return nil
		}
		if gap > 0 {
			if wait := next.Sub(now); wait > time.Millisecond {
				time.Sleep(min(wait, end.Sub(now)))
			} else if wait < -10*time.Millisecond {
				next = now.Add(-10 * time.Millisecond)
			}
			next = next.Add(gap)
		}
		putHeader(b, token, flow, number)
		if err := write(b); err != nil {
			return err
		}
		m.add(len(b))
	}
}
