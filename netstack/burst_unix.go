//go:build unix

package netstack

import (
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// systemBurstReader is burstReader for a socket of the system. A socket that waits
// holds no burst. nil for other connections.
func systemBurstReader(c net.Conn) func() (*burst, error) {
	raw := rawConn(c)
	if raw == nil {
		return nil
	}
	return rawBurstReader(raw)
}

// rawBurstReader is systemBurstReader for the socket itself.
func rawBurstReader(raw syscall.RawConn) func() (*burst, error) {
	var b *burst
	var readErr error
	try := func(fd uintptr) bool {
		b = newBurst()
		for room := b.room(); room != nil; room = b.room() {
			n, err := ignoringEINTR(func() (int, error) { return unix.Read(int(fd), room) })
			if err != nil {
				readErr = err
				break
			}
			b.add(n)
		}
		if b.n > 0 {
			return true // an error is told to this burst's successor, if it lasts
		}
		bursts.Put(b)
		b = nil
		return readErr != unix.EAGAIN // else the runtime waits until the socket is readable
	}
	return func() (*burst, error) {
		b, readErr = nil, nil
		if err := raw.Read(try); err != nil {
			return nil, err
		}
		if b != nil {
			return b, nil
		}
		return nil, os.NewSyscallError("read", readErr)
	}
}
