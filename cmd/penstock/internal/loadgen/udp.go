//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// A load is a stream of datagrams. Each begins with its number, 8 bytes, little-endian.
type load struct {
	size     int // of a payload, in bytes
	segments int // datagrams in one send; above 1, and with a window, by UDP_SEGMENT
	window   int // bytes under way at most; 0: no window, as fast as the socket takes them
}

// headLen is what a datagram of a load needs at least.
const headLen = 8

// A report is the receiver's acknowledgement: the number after the highest seen.
// With it the sender knows what is no longer under way; what is lost counts as gone too, as it
// does for QUIC.
const reportLen = 8

const socketBuffer = 8 << 20

func control(c *net.UDPConn, do func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// buffers asks for large socket buffers, past the system's limit where that is allowed.
func buffers(c *net.UDPConn) error {
	return control(c, func(fd int) error {
		for force, plain := range map[int]int{unix.SO_RCVBUFFORCE: unix.SO_RCVBUF, unix.SO_SNDBUFFORCE: unix.SO_SNDBUF} {
			if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, socketBuffer) != nil {
				if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, socketBuffer); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func sendUDP(addr string, d time.Duration, l load) error {
	if l.size < headLen || l.segments < 1 || l.size*l.segments > 65000 {
		return fmt.Errorf("%d datagrams of %d bytes", l.segments, l.size)
	}
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	c, err := net.DialUDP("udp", nil, to)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := buffers(c); err != nil {
		return err
	}
	if l.window > 0 {
		return sendWindow(c, d, l)
	}
	return sendBatches(c, d, l)
}

// sendBatches sends small datagrams one by one, many in a system call.
func sendBatches(c *net.UDPConn, d time.Duration, l load) error {
	batch := make([]ipv4.Message, l.segments)
	for i := range batch {
		batch[i].Buffers = [][]byte{make([]byte, l.size)}
	}
	p := ipv4.NewPacketConn(c) // sendmmsg, of either family
	var next uint64
	for end := time.Now().Add(d); time.Now().Before(end); {
		for i := range batch {
			binary.LittleEndian.PutUint64(batch[i].Buffers[0], next+uint64(i))
		}
		n, err := p.WriteBatch(batch, 0)
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		next += uint64(max(n, 0))
	}
	return nil
}

// sendWindow sends runs by UDP_SEGMENT and keeps window bytes under way at most.
func sendWindow(c *net.UDPConn, d time.Duration, l load) error {
	err := control(c, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, l.size)
	})
	if err != nil {
		return err
	}
	var next, reported uint64 // datagrams
	report := make([]byte, reportLen)
	run := make([]byte, l.size*l.segments)
	for end := time.Now().Add(d); time.Now().Before(end); {
		for int(next-reported)*l.size >= l.window {
			c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			n, err := c.Read(report)
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				reported = next // all that was under way is lost, or its reports are
			case err != nil:
				return err
			case n == reportLen:
				reported = max(reported, binary.LittleEndian.Uint64(report))
			}
		}
		for i := range l.segments {
			binary.LittleEndian.PutUint64(run[i*l.size:], next+uint64(i))
		}
		if _, err := c.Write(run); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
		next += uint64(l.segments)
	}
	return nil
}

// receiveUDP counts what one sender sends, with UDP_GRO, and reports to it after every receive.
func receiveUDP(addr string) error {
	on, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	c, err := net.ListenUDP("udp", on)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := buffers(c); err != nil {
		return err
	}
	if err := control(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1) }); err != nil {
		return err
	}
	batch := make([]ipv4.Message, 32)
	for i := range batch {
		batch[i].Buffers = [][]byte{make([]byte, 65536)}
		batch[i].OOB = make([]byte, unix.CmsgSpace(4))
	}
	p := ipv4.NewPacketConn(c)
	var bytes, datagrams int64
	var next uint64
	var first, last time.Time
	report := make([]byte, reportLen)
	for {
		patience := time.Second
		if first.IsZero() {
			patience = 30 * time.Second
		}
		c.SetReadDeadline(time.Now().Add(patience))
		n, err := p.ReadBatch(batch, 0)
		if errors.Is(err, os.ErrDeadlineExceeded) && !first.IsZero() {
			break
		}
		if err != nil {
			return err
		}
		last = time.Now()
		if first.IsZero() {
			first = last
		}
		for _, m := range batch[:n] {
			size := segmentSize(m.OOB[:m.NN], m.N)
			for at := 0; at+headLen <= m.N; at += size {
				datagrams++
				next = max(next, binary.LittleEndian.Uint64(m.Buffers[0][at:])+1)
			}
			bytes += int64(m.N)
		}
		binary.LittleEndian.PutUint64(report, next)
		c.WriteTo(report, batch[0].Addr) // a lost report is made good by the next
	}
	result(bytes, last.Sub(first), datagrams, int64(next)-datagrams)
	return nil
}

// segmentSize is the size of the datagrams in a receive of n bytes, as UDP_GRO tells it.
func segmentSize(oob []byte, n int) int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return n
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_UDP && m.Header.Type == unix.UDP_GRO && len(m.Data) >= 4 {
			if size := int(binary.NativeEndian.Uint32(m.Data)); size > 0 {
				return size
			}
		}
	}
	return n
}
