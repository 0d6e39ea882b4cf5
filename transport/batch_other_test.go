//go:build !linux

package transport

import "testing"

func skipKernel(t testing.TB, _ *UDPSocket) { t.Skip("there is no batch system call here") }
