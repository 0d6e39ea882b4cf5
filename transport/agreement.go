package transport

import (
	"sync"
	"time"

	"github.com/pion/dtls/v2"
)

// agreement is the result of a handshake: the keys of an association and the peer
// that it is with.
type agreement struct {
	suite     CipherSuite
	remote    PublicKey     // proved by the handshake and passed by verify; zero for a session
	secret    *sharedSecret // that both have proved to hold; nil for a static peer
	initiator bool          // we were the client
	sealer    sealer
	opener    opener
	// nextSeq is the first sequence number for the sealer's owner; those below
	// belong to pion. Numbers run from here to maxSequence and are never used twice.
	nextSeq uint64

	conn *handshakeConn

	mu      sync.Mutex
	expire  *time.Timer   // nil for a client
	pion    *dtls.Conn    // nil once retire was called
	retired chan struct{} // closed when pion's goroutines have ended
}

func newAgreement(keys *keyPair, remote PublicKey, isClient bool, pion *dtls.Conn, conn *handshakeConn) *agreement {
	s := &agreement{
		suite:     keys.suite,
		remote:    remote,
		initiator: isClient,
		sealer:    keys.sealer,
		opener:    keys.opener,
		nextSeq:   conn.establish(finishedGap),
		conn:      conn,
		pion:      pion,
		retired:   make(chan struct{}),
	}
	if !isClient {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.expire = time.AfterFunc(lastFlightTime, func() { s.retire() })
	}
	return s
}

// takeEarly gives the application records that came between the end of the handshake and now,
// whole and still sealed, in order. The caller owns them. From now on none are kept.
func (s *agreement) takeEarly() [][]byte { return s.conn.takeEarly() }

// retire lets go of pion: nothing of it reaches the wire from the moment retire
// returns, not even a close_notify, and its goroutines end. It does not wait for them, as pion
// may sleep for up to one flight interval: the channel returned is closed when they have ended.
// It may be called any number of times, from any goroutine.
//
// A client's agreement is retired from the start: the server's Finished proves that the server has
// ours. A server's is to be retired when the first application record from
// the peer has been opened, which proves that the client has our Finished. It
// retires by itself after [lastFlightTime].
func (s *agreement) retire() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pion == nil {
		return s.retired
	}
	if s.expire != nil {
		s.expire.Stop()
	}
	s.conn.mute()
	pion := s.pion
	s.pion = nil
	go closePion(pion, s.retired)
	return s.retired
}

func closePion(pion *dtls.Conn, done chan<- struct{}) {
	defer close(done)
	_ = pion.Close() // its error is that of the muted connection
}
