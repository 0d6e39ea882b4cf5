//go:build unix

package netstack

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// systemBlockReader is blockReader for a socket of the system. It asks the kernel
// before it takes a block, so that a connection that waits holds none; nil for
// other connections.
func systemBlockReader(c net.Conn) func() (*block, int, error) {
	raw := rawConn(c)
	if raw == nil {
		return nil
	}
	var b *block
	var n int
	var readErr error
	try := func(fd uintptr) bool {
		b = blocks.Get().(*block)
		n, readErr = ignoringEINTR(func() (int, error) { return unix.Read(int(fd), b[:]) })
		if readErr == unix.EAGAIN {
			blocks.Put(b)
			b = nil
			return false // the runtime waits until the socket is readable
		}
		return true
	}
	return func() (*block, int, error) {
		b, n, readErr = nil, 0, nil
		err := raw.Read(try)
		switch {
		case err != nil:
		case readErr != nil:
			err = os.NewSyscallError("read", readErr)
		case n == 0:
			err = io.EOF
		}
		if err != nil {
			n = 0
		}
		return b, n, err
	}
}

// rawConn is the system's side of a connection; nil when it has none.
func rawConn(c net.Conn) syscall.RawConn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return raw
}

func ignoringEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR {
			return n, err
		}
	}
}
