//go:build unix

package transport

import (
	"io"
	"net"
	"syscall"
)

// pollable gives access to the descriptor under conn, nil where there is none.
func pollable(conn net.Conn) syscall.RawConn {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

// readNow reads what there is, at least a byte, or returns errWouldBlock or what ends the stream.
func readNow(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Read(int(fd), p)
		switch {
		case err == syscall.EINTR:
		case err == syscall.EAGAIN:
			return 0, errWouldBlock
		case err != nil:
			return 0, err
		case n <= 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}
