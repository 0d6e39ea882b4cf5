//go:build unix

package main

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// endings are the signals that close the node. With all, these are the ones that end a process
// that does not handle them, but for SIGKILL and for those of a mistake in the program itself: the host
// is not to be left in disorder because of, say, SIGUSR1.
//
// What the parent has had ignored (nohup) stays ignored.
func endings(all bool) []os.Signal {
	signals := []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP}
	if all {
		// A log that nobody reads is an error of a write then, and not the end.
		signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
		signals = append(signals, unix.SIGQUIT, unix.SIGABRT, unix.SIGALRM, unix.SIGUSR1, unix.SIGUSR2,
			unix.SIGVTALRM, unix.SIGXCPU, unix.SIGXFSZ, unix.SIGIO)
		signals = append(signals, moreEndings()...)
	}
	return slices.DeleteFunc(signals, signal.Ignored)
}

// alive tells whether there is a process.
func alive(pid int) bool {
	return pid > 0 && !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}
