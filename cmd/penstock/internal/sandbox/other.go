//go:build !linux

package sandbox

import (
	"os"
	"syscall"
)

// A Sandbox cannot be had here.
type Sandbox struct{}

// Start fails.
func Start(Config) (*Sandbox, error) { return nil, failf("%w", ErrUnsupported) }

// Helper fails.
func Helper() int { return ExitFailed }

// Forwarded is none.
func Forwarded() []os.Signal { return nil }

// StopFor does nothing.
func StopFor(os.Signal) {}

// The methods of a Sandbox that is never made.

// TakeTUN has nothing to give.
func (*Sandbox) TakeTUN() int { return -1 }

// Notes are none.
func (*Sandbox) Notes() []string { return nil }

// Go does nothing.
func (*Sandbox) Go() {}

// Signal does nothing.
func (*Sandbox) Signal(syscall.Signal) {}

// SetMTU does nothing.
func (*Sandbox) SetMTU(int) {}

// Wait fails.
func (*Sandbox) Wait() (code int, err error) { return ExitFailed, failf("%w", ErrUnsupported) }

// Done is never closed.
func (*Sandbox) Done() <-chan struct{} { return nil }

// Close does nothing.
func (*Sandbox) Close() error { return nil }
