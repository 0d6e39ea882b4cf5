package netstack

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// ConfigError says which part of a [Config] is wrong. [New] may return several,
// joined.
type ConfigError struct {
	Key   string // the field as written in Go, such as Peers[1].AllowedIPs[0]
	Value string // what it holds; empty for secrets and where nothing is there to show
	Want  string // what is expected
}

// Error implements error.
func (e *ConfigError) Error() string {
	if e.Value == "" {
		return e.Key + ": expected " + e.Want
	}
	return e.Key + ": " + e.Value + ": expected " + e.Want
}

// ErrUnknownPeer: the node has no peer with this public key.
var ErrUnknownPeer = errors.New("no such peer")

// errnoOf converts the stack's errors to those of the system. It is the only
// place that does; nil for the errors that mean a state and not a failure.
func errnoOf(err tcpip.Error) error {
	switch err.(type) {
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrNetworkUnreachable, *tcpip.ErrNoNet:
		return syscall.ENETUNREACH
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrBadLocalAddress:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrPortInUse, *tcpip.ErrDuplicateAddress:
		return syscall.EADDRINUSE
	case *tcpip.ErrNoPortAvailable:
		return syscall.EAGAIN
	case *tcpip.ErrMessageTooLong:
		return syscall.EMSGSIZE
	case *tcpip.ErrNoBufferSpace:
		return syscall.ENOBUFS
	case *tcpip.ErrNotConnected:
		return syscall.ENOTCONN
	case *tcpip.ErrAlreadyConnected:
		return syscall.EISCONN
	case *tcpip.ErrDestinationRequired:
		return syscall.EDESTADDRREQ
	case *tcpip.ErrAddressFamilyNotSupported, *tcpip.ErrUnknownProtocol:
		return syscall.EAFNOSUPPORT
	case *tcpip.ErrNotPermitted, *tcpip.ErrBroadcastDisabled:
		return syscall.EACCES
	case *tcpip.ErrInvalidOptionValue, *tcpip.ErrInvalidEndpointState, *tcpip.ErrBadAddress:
		return syscall.EINVAL
	case *tcpip.ErrNotSupported, *tcpip.ErrUnknownProtocolOption:
		return syscall.EOPNOTSUPP
	}
	return errors.New(err.String())
}

// ctxErr converts the error of a context as net.Dialer does: a passed deadline is
// a timeout, a cancellation stays one.
func ctxErr(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return contextTimeout{os.ErrDeadlineExceeded}
	}
	return err
}

// contextTimeout is a timeout that is known as that of a context too, as the net package's is.
type contextTimeout struct{ error }

func (t contextTimeout) Unwrap() error      { return t.error }
func (contextTimeout) Timeout() bool        { return true }
func (contextTimeout) Is(target error) bool { return target == context.DeadlineExceeded }

// opError wraps err as the net package does.
func opError(op, network string, source, addr net.Addr, err error) error {
	return &net.OpError{Op: op, Net: network, Source: source, Addr: addr, Err: err}
}

// badNetwork tells that network is none of those that op takes.
func badNetwork(op, network string) error {
	return &net.OpError{Op: op, Net: network, Err: net.UnknownNetworkError(network)}
}

// family splits a network name such as "tcp6" into its protocol and IP version, 0
// for either. ok is false for others than TCP and UDP.
func family(network string) (proto string, version int, ok bool) {
	proto = strings.TrimRight(network, "46")
	if proto != "tcp" && proto != "udp" {
		return "", 0, false
	}
	switch network[len(proto):] {
	case "":
		return proto, 0, true
	case "4":
		return proto, 4, true
	case "6":
		return proto, 6, true
	}
	return "", 0, false
}
