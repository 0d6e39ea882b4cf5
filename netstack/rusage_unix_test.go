//go:build unix

package netstack

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// processTime is the processor time, user and system, that this process has used.
func processTime(t testing.TB) time.Duration {
	t.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
