//go:build !linux

package transport

import "syscall"

// limitUnsent is for Linux.
func limitUnsent(syscall.RawConn) {}
