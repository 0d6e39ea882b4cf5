// Package sandbox runs a program in a network namespace of its own, whose only way out is a TUN
// interface that somebody else drives:
//
//	                 this namespace │ the new one
//	                                │
//	node ── TUN (an open file) ─────┼──── interface, addresses, routes ── PROGRAM
//	Sandbox ── socket ──────────────┼── helper ── starts, signals and reaps it
//	published listeners ────────────┼──────┘ connects them to the program
//
// It needs no privileges where ordinary users may make user namespaces. The program keeps its
// user and group, its files and its terminal; of the system it has another network, another
// loopback and another resolv.conf.
//
// The helper is this very executable, started again with [HelperVerb]; main has to call [Helper]
// then. It is the program's parent and the reaper of all its descendants, and kills what is left
// of them when the program or the Sandbox's process ends, so that nothing is left behind: processes,
// namespaces and interface go together.
//
// Where the node comes from is not known here.
package sandbox

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
)

// HelperVerb is the only argument of the executable when it is to call [Helper].
const HelperVerb = "sandbox-helper"

// Interface is the name of the interface in the namespace.
const Interface = "penstock0"

// Config describes a sandbox.
type Config struct {
	Addresses []netip.Prefix // of the interface; only the address of a prefix counts
	Routes    []netip.Prefix // through the interface; nothing else leaves the namespace
	MTU       int            // bytes

	// Servers are those of resolv.conf, at most three of them; with none, the host's file
	// stays. Search are domains to complete names with.
	Servers []netip.Addr
	Search  []string

	// Publish are ports of the program that get ports of the host.
	Publish []Publish

	Program string // a path, or a name to be looked up in PATH
	Args    []string
}

// Publish gives a TCP port of the program one of the host.
type Publish struct {
	Listen netip.AddrPort // on the host
	Port   uint16         // of the program, on its loopback
}

// Exit codes, those of a shell, env(1) and docker-run(1).
const (
	ExitFailed        = 125 // the program was not started for a reason that is not its own
	ExitNotExecutable = 126
	ExitNotFound      = 127
	ExitSignal        = 128 // and the number of the signal that the program has died of
)

// An Error is why a program could not be run. Code is the exit code that says so.
type Error struct {
	Code int
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func failf(format string, args ...any) *Error {
	return &Error{Code: ExitFailed, Err: fmt.Errorf(format, args...)}
}

// ErrUnsupported is the reason on other systems than Linux.
var ErrUnsupported = errors.New("a program can be run in the VPN on Linux only")

// notRunnable says why program cannot be started, with the code that a shell gives.
func notRunnable(program string, err error) *Error {
	code := ExitNotExecutable
	if errors.Is(err, os.ErrNotExist) {
		code = ExitNotFound
	}
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	return &Error{Code: code, Err: fmt.Errorf("%s: %w", program, err)}
}
