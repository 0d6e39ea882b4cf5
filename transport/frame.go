package transport

// frameType is the first byte of a record's plaintext. The values are those of
// the AnyConnect protocol (draft-mavrogiannopoulos-openconnect 2.4), so that
// static peers and OpenConnect tunnels share one codec.
type frameType byte

const (
	frameData       frameType = 0 // an IP packet
	frameDPDRequest frameType = 3 // dead peer detection; the body is echoed whole
	frameDPDReply   frameType = 4 // the echo
	frameDisconnect frameType = 5 // goodbye: a reason byte and text
	frameKeepalive  frameType = 7 // keeps a NAT open, no answer
	frameTerminate  frameType = 9 // goodbye from a server
)

// frameHeaderSize is the type byte before the body.
const frameHeaderSize = 1

// disconnectBody is the goodbye of Close: reason 0xb0 is what stock clients send
// for "the user wants it".
var disconnectBody = append([]byte{0xb0}, "closed"...)
