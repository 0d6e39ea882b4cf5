package transport

import (
	"context"
	"crypto/rand"

	"github.com/pion/dtls/v2"
)

const (
	// maxAppID is the longest App-ID in bytes: it travels as a session ID (RFC 5246 7.4.1.2).
	maxAppID = maxSessionID
	// pskSize is the size of a session's key in bytes: what both ends export from
	// the TLS connection (RFC 5705, label EXPORTER-openconnect-psk).
	pskSize = 32
)

// pskIdentity is what the client names itself by: always the same, as stock software has it. The session is
// found by the ClientHello's session ID.
var pskIdentity = []byte("psk")

// sharedSecret is what both ends of a session know: the name that the client's hello bears,
// and the key that each proves to hold. It never changes; a renewed session has another.
type sharedSecret struct {
	appID string
	psk   [pskSize]byte
}

// sessionClient opens an agreement with the server of a session over conn, which it takes. It waits until ctx ends.
func (h *handshaker) sessionClient(ctx context.Context, conn *handshakeConn, secret *sharedSecret) (*agreement, error) {
	conn.wholeFlights = true // ocserv sends ServerHello and ServerHelloDone apart, with a session ID of its own
	a := new(attempt)
	config := h.sessionConfig(a, secret)
	config.PSKIdentityHint = pskIdentity
	config.SessionStore = appIDStore(secret.appID)
	return sharing(secret)(h.run(ctx, conn, a, config, true))
}

// sessionServer answers the client of a session over conn, which it takes, and into which the
// ClientHello was already pushed.
func (h *handshaker) sessionServer(ctx context.Context, conn *handshakeConn, secret *sharedSecret) (*agreement, error) {
	a := new(attempt)
	return sharing(secret)(h.run(ctx, conn, a, h.sessionConfig(a, secret), false))
}

// sharing notes the secret that an agreement came from.
func sharing(secret *sharedSecret) func(*agreement, error) (*agreement, error) {
	return func(s *agreement, err error) (*agreement, error) {
		if s != nil {
			s.secret = secret
		}
		return s, err
	}
}

// sessionConfig is what pion is told for one attempt with a shared secret. Without a certificate it
// takes part in no handshake but a plain PSK one.
func (h *handshaker) sessionConfig(a *attempt, secret *sharedSecret) *dtls.Config {
	return &dtls.Config{
		CipherSuites:       []dtls.CipherSuiteID{},
		CustomCipherSuites: func() []dtls.CipherSuite { return customSuites(sessionSuites, &a.capture) },
		PSK:                func([]byte) ([]byte, error) { return secret.psk[:], nil },
		// GnuTLS clients do not offer it for DTLS 1.2 under a plain PSK with openconnect's priorities.
		ExtendedMasterSecret: dtls.RequestExtendedMasterSecret,
		FlightInterval:       h.flightInterval,
		MTU:                  handshakeMTU,
		LoggerFactory:        pionLog{h.log},
	}
}

// appIDStore makes a pion client put the App-ID into its hello: as the name of a session to
// resume, which is the only way to have one there.
type appIDStore string

var _ dtls.SessionStore = appIDStore("")

// Get gives the App-ID. pion takes the session for resumed if the server, or anybody in its place
// who has seen the hello, returns its name, and derives the keys from the Secret given here. So that is
// one that nobody knows: the Finished of such a server is then never right.
func (id appIDStore) Get([]byte) (dtls.Session, error) {
	secret := make([]byte, 48) // RFC 5246 8.1
	rand.Read(secret)
	return dtls.Session{ID: []byte(id), Secret: secret}, nil
}

// Set forgets what could be resumed: a session's keys are never used again.
func (appIDStore) Set([]byte, dtls.Session) error { return nil }

// Del does nothing.
func (appIDStore) Del([]byte) error { return nil }
