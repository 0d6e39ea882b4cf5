//go:build !unix

package transport

import (
	"net"
	"syscall"
)

// pollable: the system cannot be asked without waiting.
func pollable(net.Conn) syscall.RawConn { return nil }

func readNow(uintptr, []byte) (int, error) { return 0, errWouldBlock }
