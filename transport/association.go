package transport

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// An association is one set of traffic keys with a peer, from a completed
// handshake until a newer one has replaced it (RFC 6347 calls it that).
type association struct {
	peer      *peer
	suite     CipherSuite
	sealer    *sealer
	opener    *opener
	initiator bool
	born      time.Time
	agreement *agreement // for retire; the keys are above

	// servedAt is where the handshake that we served came from, under which it is
	// in the half-open table. It stays there while lingering: until the first record of
	// the peer shows that it has our last flight, pion may have to repeat it.
	servedAt  netip.AddrPort
	lingering atomic.Bool

	// nextSeq is the sequence number of the next record outbound. Whoever seals
	// reserves a block of them with Add.
	nextSeq atomic.Uint64
	// path is where records go. Only a newer authenticated record moves it.
	path atomic.Pointer[path]

	// inMu guards replay. The inbound pump holds it for a whole receive.
	inMu   sync.Mutex
	replay replayWindow

	lastInbound atomic.Int64 // clock reading of the last record opened; decides when an old association ends
}

// path is a way to a peer: a socket of ours and the address on the far side.
type path struct {
	conn   PacketConn
	remote netip.AddrPort
	local  netip.Addr // the address of ours that the peer uses; may be invalid
}

// maxRecords ends an association for good: a rekey is due at Timing.RekeyAfterRecords,
// and if none came through by this many, sealing stops rather than weaken the keys. It is eight times
// the RFC 8446 5.5 figure for AES-GCM at the default, still far below the 2^48 of the record header.
const maxRecords = 1 << 31

// reserve takes n sequence numbers and returns the first. ok is false when the
// association has none left to give.
func (a *association) reserve(n int) (first uint64, ok bool) {
	first = a.nextSeq.Add(uint64(n)) - uint64(n)
	return first, first < maxRecords
}

// slots are the associations of a peer that are alive. The value is immutable;
// peer.slots swaps it, so the pumps read it without a lock.
type slots struct {
	current  *association // seals outbound; nil until the first one is confirmed
	next     *association // complete on our side, not yet confirmed by a record from the peer
	previous *association // replaced; still opens what was under way
}

// each yields the associations, the likeliest first.
func (s *slots) each(yield func(*association) bool) {
	for _, a := range [...]*association{s.current, s.next, s.previous} {
		if a != nil && !yield(a) {
			return
		}
	}
}

func (s *slots) newest() *association {
	if s.next != nil && s.current == nil {
		return s.next
	}
	return s.current
}

// single returns the association if there is exactly one: then a record can be
// opened in place without a copy for a second try.
func (s *slots) single() *association {
	if s.next == nil && s.previous == nil {
		return s.current
	}
	if s.current == nil && s.previous == nil {
		return s.next
	}
	return nil
}

// headSlack is the room before a packet in every buffer outbound: the record
// header, the longest explicit nonce and the frame type.
const headSlack = maxHeadroom + frameHeaderSize

// recordSize is the datagram that carries an inner packet of n bytes.
func (a *association) recordSize(n int) int {
	return a.sealer.headroom() + frameHeaderSize + n + tagSize
}

// sealFrame seals the frame body that lies at buf[headSlack:headSlack+n] in
// place and returns the record, which aliases buf. buf must reach tagSize bytes
// beyond the body.
func (a *association) sealFrame(buf []byte, n int, typ frameType, seq uint64, s *cryptoScratch) []byte {
	start := headSlack - frameHeaderSize - a.sealer.headroom()
	buf[headSlack-frameHeaderSize] = byte(typ)
	return a.sealer.seal(buf[start:headSlack+n+tagSize], contentApplicationData, seq, s)
}

// clock gives the pumps a cheap monotonic reading, once per batch.
type clock struct{ epoch time.Time }

func newClock() clock { return clock{time.Now()} }

// now is the time since the clock was made, in nanoseconds, never 0.
func (c clock) now() int64 { return int64(time.Since(c.epoch)) | 1 }

func (c clock) wall(at int64) time.Time { return c.epoch.Add(time.Duration(at)) }
