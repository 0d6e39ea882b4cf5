package transport

import "errors"

var (
	// ErrDatagramTooBig: the path or the interface does not carry a datagram of
	// this size (EMSGSIZE). The tunnel survives; the path MTU is lowered.
	ErrDatagramTooBig = errors.New("datagram too big for the path")

	// ErrClosed: the transport was closed.
	ErrClosed = errors.New("transport closed")

	// ErrStreamProtocol: the far end of a session sent what is no frame. The session is over.
	ErrStreamProtocol = errors.New("not a CSTP frame")

	errStreamEOF    = errors.New("the far end has closed the stream")
	errStreamSilent = errors.New("the far end is silent")

	errAbandoned = errors.New("abandoned")

	errAppIDTaken = errors.New("the App-ID is another session's")
)

// Reasons why a handshake ended. They reach people through PeerStatus.LastError.
var (
	errUnknownPeer = errors.New("its key is no peer's")
	errOtherKey    = errors.New("answered with another key")
	errNoAnswer    = errors.New("no answer")
	errBusy        = errors.New("a handshake with this address is under way")
	errYielded     = errors.New("yielded to the peer's own call")
	errEvicted     = errors.New("too many half-open handshakes")
	errGone        = errors.New("it has no endpoint, and left before it was called")
	errNoDatagrams = errors.New("the session has no datagram channel")
	errReplaced    = errors.New("the remote started anew")
)
