//go:build !unix

package main

import "syscall"

// No terminal stops a job here.
const stopSignal = syscall.Signal(-1)

func stopSelf() {}
