package transport

import "sync/atomic"

// DropReason says why a packet, record or datagram was not carried on. A drop
// never ends a pump or an association.
type DropReason int

// The reasons, in the order a packet could meet them: outbound, then inbound.
const (
	DropDeviceRead        DropReason = iota // outbound: the Device failed to give a packet
	DropNoPeer                              // outbound: no peer has an allowed prefix for the destination
	DropNotIP                               // outbound: neither IPv4 nor IPv6, or shorter than its header
	DropNoAssociation                       // outbound: the peer is not connected and its waiting room is full
	DropTooBig                              // outbound: larger than the path to the peer carries
	DropSend                                // outbound: the socket refused the run
	DropExhausted                           // outbound: the association ran out of sequence numbers before a rekey came through
	DropMalformed                           // inbound: not a DTLS 1.2 record
	DropUnknownRemote                       // inbound: a record from an address without an association
	DropTrialLimit                          // inbound: more records from unknown addresses than are tried
	DropReplay                              // inbound: seen before, or older than the replay window
	DropAuthentication                      // inbound: no association opens the record
	DropUnknownFrame                        // inbound: a frame type that is not ours
	DropEmptyRecord                         // inbound: a record without a frame
	DropSource                              // inbound: the packet's source is not among the peer's allowed prefixes
	DropUnsolicited                         // inbound: a handshake record or alert that belongs to no handshake
	DropHandshakeQueue                      // inbound: the handshake's queue was full
	DropHalfOpen                            // inbound: too many half-open handshakes, in all or from the source
	DropHalfOpenRate                        // inbound: hellos from unknown addresses came too fast
	DropChallenged                          // inbound: a hello answered by a cookie, as strangers were many or a handshake was to end for it
	DropEarly                               // inbound: much waits in the socket's queue, so TCP is asked to send less
	DropDevice                              // inbound: the Device did not take the packet
	DropUnknownSession                      // inbound: a hello that names no session, or no peer can have sent
	DropSessionHandshakes                   // inbound: too many handshakes of one session at once
	DropStreamQueue                         // outbound: the stream of the session takes no more for now
	numDropReasons
)

var dropNames = [numDropReasons]string{
	DropDeviceRead:     "device gave an error",
	DropNoPeer:         "no peer for destination",
	DropNotIP:          "not an IP packet",
	DropNoAssociation:  "peer not connected",
	DropTooBig:         "too big for the path",
	DropSend:           "send failed",
	DropExhausted:      "sequence numbers exhausted",
	DropMalformed:      "not a DTLS record",
	DropUnknownRemote:  "unknown remote address",
	DropTrialLimit:     "too many records from unknown addresses",
	DropReplay:         "replayed or too old",
	DropAuthentication: "authentication failed",
	DropUnknownFrame:   "unknown frame type",
	DropEmptyRecord:    "empty record",
	DropSource:         "source not allowed for peer",
	DropUnsolicited:    "handshake record without a handshake",
	DropHandshakeQueue: "handshake queue full",
	DropHalfOpen:       "too many half-open handshakes",
	DropHalfOpenRate:   "hellos from unknown addresses too fast",
	DropChallenged:     "hello answered by a cookie",
	DropEarly:          "dropped early, much was waiting",
	DropDevice:         "device refused the packet",

	DropUnknownSession:    "hello of an unknown session",
	DropSessionHandshakes: "too many handshakes of a session",
	DropStreamQueue:       "stream queue full",
}

func (r DropReason) String() string {
	if r < 0 || r >= numDropReasons {
		return "unknown"
	}
	return dropNames[r]
}

// dropCounters counts by reason; any goroutine may add.
type dropCounters [numDropReasons]atomic.Uint64

func (d *dropCounters) add(r DropReason, n int) { d[r].Add(uint64(n)) }

// nonZero is the map for a Status: reason to count, only what happened.
func (d *dropCounters) nonZero() map[string]uint64 {
	m := make(map[string]uint64)
	for r := range d {
		if n := d[r].Load(); n != 0 {
			m[DropReason(r).String()] = n
		}
	}
	return m
}
