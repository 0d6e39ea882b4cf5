package main

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// moreEndings are those that other systems lack. The real-time signals begin at 35: libc keeps
// the ones before.
func moreEndings() []os.Signal {
	signals := []os.Signal{unix.SIGPWR, unix.SIGSTKFLT}
	for s := syscall.Signal(35); s <= 64; s++ {
		signals = append(signals, s)
	}
	return signals
}
