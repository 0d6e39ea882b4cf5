//go:build !linux && !darwin && !freebsd && !windows

package transport

import (
	"net/netip"
	"runtime"
	"syscall"
)

const (
	errMessageTooBig = syscall.EMSGSIZE
	messageTruncated = 0
)

func setDontFragment(uintptr, netip.Addr) Ability { return abilityOff("not on " + runtime.GOOS) }

func bufferSizes(uintptr) (receive, send int) { return 0, 0 }
