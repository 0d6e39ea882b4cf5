//go:build unix

package main

import (
	"os"
	"syscall"
)

// stopSignal is what a terminal stops a job with.
const stopSignal = syscall.SIGTSTP

// stopSelf stops this process, for the shell to see. The error is for a process that does not exist.
func stopSelf() { _ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) }
