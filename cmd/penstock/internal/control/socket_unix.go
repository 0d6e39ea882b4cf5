//go:build unix

package control

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// lock keeps other nodes from looking at the sockets in dir until unlock is called.
// The kernel gives it up when the process ends; no file is left behind.
func lock(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return func() { f.Close() }, nil
}

// restrict sets the mode of a socket that is not bound yet.
func restrict(fd uintptr) {
	// Where the system does not use it, Chmod after the fact is what is left.
	_ = unix.Fchmod(int(fd), 0o600)
}

// ours tells whether a folder belongs to this user and nobody else can enter it.
func ours(st fs.FileInfo) bool {
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && int(sys.Uid) == os.Geteuid() && st.Mode().Perm()&0o077 == 0
}
