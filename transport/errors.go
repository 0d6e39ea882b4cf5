package transport

import "errors"

var (
	// ErrDatagramTooBig: the path or the interface does not carry a datagram of
	// this size (EMSGSIZE). The tunnel survives; the path MTU is lowered.
	ErrDatagramTooBig = errors.New("datagram too big for the path")

	// ErrClosed: the transport was closed.
	ErrClosed = errors.New("transport closed")
)
