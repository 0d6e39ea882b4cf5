package transport

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// unsentLimit is how much the kernel takes that it has not sent, in bytes: enough for every path to be kept busy
// between two wake-ups of ours. Without it the kernel's buffer grows to megabytes, and packets wait in it for seconds.
const unsentLimit = 256 << 10

// limitUnsent bounds the kernel's queue. Where that fails, as with a connection that is not TCP, it only is longer.
func limitUnsent(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, unsentLimit)
	})
}
