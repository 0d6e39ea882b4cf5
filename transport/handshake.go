package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/gob"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/pion/dtls/v2"
)

const (
	// defaultFlightInterval is the time after which a flight is sent again. RFC 6347
	// 4.2.4.1 has 1 s, doubling; pion v2.2.12 neither doubles nor jitters, it uses
	// this interval throughout. 400 ms is above the round trip of nearly every path and
	// brings a handshake that lost one datagram up in half a second.
	defaultFlightInterval = 400 * time.Millisecond

	// handshakeMTU is the size of the fragments that pion cuts its messages into. With fragment
	// header, record header and IPv6 and UDP headers a datagram stays under the
	// 1280 bytes that every IPv6 path carries (RFC 8200 5).
	handshakeMTU = 1200

	// finishedGap is how many sequence numbers of epoch 1 stay pion's after the
	// take-over: every repetition of its last flight takes one. The Finished is 0, so ours begin
	// at 257. pion repeats at most once per FlightInterval and only when an authentic Finished of
	// the peer's arrives again, so this is some minutes of repetitions; beyond it they are
	// dropped, never sealed with a number of ours.
	finishedGap = 256

	// lastFlightTime is how long the server side can repeat its last flight: twice
	// the maximum segment lifetime of TCP (RFC 6347 4.2.4, RFC 9293 3.4.2).
	lastFlightTime = 4 * time.Minute
)

// refusedError: the peer ended the handshake with an alert of epoch 0, which is not authenticated.
type refusedError struct{ alert alert }

func (e *refusedError) Error() string { return "peer refused the handshake: " + e.alert.String() }

// retry tells whether the peer asks for another attempt at once: it was under
// load, and has our address verified now. See helloVerifier.
func (e *refusedError) retry() bool {
	return e.alert == alert{alertFatal, alertUserCanceled}
}

// handshaker makes agreements: DTLS 1.2 handshakes with our certificate, by pion. It
// is made once for a Transport and is safe for concurrent use.
type handshaker struct {
	certificate    tls.Certificate
	suites         []CipherSuite
	flightInterval time.Duration
	log            *slog.Logger
}

// newHandshaker makes a handshaker from a node's key; a zero key makes one for sessions alone. suites in order of preference, nil for
// the default; flightInterval 0 for the default; log nil for none.
func newHandshaker(key PrivateKey, suites []CipherSuite, flightInterval time.Duration, log *slog.Logger) (*handshaker, error) {
	if len(suites) == 0 {
		suites = defaultSuites()
	}
	for _, id := range suites {
		if p := suiteByID(id); p == nil || p.psk {
			return nil, fmt.Errorf("cipher suite %v is not supported", id)
		}
	}
	if flightInterval <= 0 {
		flightInterval = defaultFlightInterval
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &handshaker{suites: slices.Clone(suites), flightInterval: flightInterval, log: log}
	if key.IsZero() {
		return h, nil
	}
	var err error
	h.certificate, err = selfSigned(key)
	return h, err
}

// hasKey tells whether there is a certificate to show.
func (h *handshaker) hasKey() bool { return len(h.certificate.Certificate) > 0 }

// client opens an agreement over conn, which it takes. verify is called with the key that
// the server has proved to hold, before our own proof leaves; it may be called more than
// once, from another goroutine, and what it returns ends the handshake with an alert to
// the peer and is wrapped in the error returned. It waits until ctx ends.
func (h *handshaker) client(ctx context.Context, conn *handshakeConn, verify func(PublicKey) error) (*agreement, error) {
	a := &attempt{verify: verify}
	return h.run(ctx, conn, a, h.config(a, h.suites), true)
}

// server answers a client over conn, which it takes, and into which the ClientHello was
// already pushed. verify is called with the key that the client
// has proved to hold, before our Finished leaves; see client.
func (h *handshaker) server(ctx context.Context, conn *handshakeConn, verify func(PublicKey) error) (*agreement, error) {
	suites := h.suites
	if hello, ok := conn.firstHello(); ok {
		suites = h.suitesFor(&hello)
	}
	a := &attempt{verify: verify}
	return h.run(ctx, conn, a, h.config(a, suites), false)
}

// suitesFor narrows our suites for a client. pion as a server goes by the client's
// order; a CPU without AES instructions on either side should decide for
// ChaCha20-Poly1305, and it shows by being first in that side's order.
func (h *handshaker) suitesFor(hello *helloInfo) []CipherSuite {
	if h.suites[0] == ChaCha20Poly1305 && hello.offers(ChaCha20Poly1305) {
		return h.suites[:1]
	}
	return h.suites
}

// attempt is what one handshake finds out by the callbacks of pion.
type attempt struct {
	capture suiteCapture
	verify  func(PublicKey) error // nil where a shared secret proves all there is to prove

	mu     sync.Mutex
	remote PublicKey
	err    error // of verify
}

func (h *handshaker) run(ctx context.Context, conn *handshakeConn, a *attempt, config *dtls.Config, isClient bool) (*agreement, error) {
	config.InsecureSkipVerifyHello = conn.addressVerified
	start := dtls.ServerWithContext
	if isClient {
		start = dtls.ClientWithContext
	}
	pion, err := start(ctx, conn, config)
	if err != nil {
		conn.Close()
		return nil, a.explain(conn, err)
	}
	s, err := takeOver(pion, conn, a, isClient)
	if err != nil {
		conn.mute()
		pion.Close()
		return nil, err
	}
	if isClient {
		<-s.retire()
	}
	return s, nil
}

// config is what pion is told for one attempt with certificates.
func (h *handshaker) config(a *attempt, suites []CipherSuite) *dtls.Config {
	return &dtls.Config{
		Certificates: []tls.Certificate{h.certificate},
		// A server may name authorities; ours is none of them, and sent all the same.
		GetClientCertificate: func(*dtls.CertificateRequestInfo) (*tls.Certificate, error) { return &h.certificate, nil },
		// None of pion's own in front, see customSuite.
		CipherSuites:       []dtls.CipherSuiteID{},
		CustomCipherSuites: func() []dtls.CipherSuite { return customSuites(suites, &a.capture) },
		SignatureSchemes:   []tls.SignatureScheme{tls.Ed25519},
		ClientAuth:         dtls.RequireAnyClientCert,
		// Not required: GnuTLS clients would be locked out. Without it the
		// transcript is still covered by both signatures and by the Finished messages.
		ExtendedMasterSecret: dtls.RequestExtendedMasterSecret,
		// Chains and names mean nothing here: the key decides, below.
		InsecureSkipVerify:    true,
		VerifyPeerCertificate: func(rawCerts [][]byte, _ [][]*x509.Certificate) error { return a.verifyKey(rawCerts) },
		FlightInterval:        h.flightInterval,
		MTU:                   handshakeMTU,
		LoggerFactory:         pionLog{h.log},
	}
}

// verifyKey judges the certificate whose key the peer has just proved to hold.
func (a *attempt) verifyKey(rawCerts [][]byte) error {
	key, err := remotePublicKey(rawCerts)
	if err == nil {
		err = a.verify(key)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.remote, a.err = key, err
	return err
}

// explain finds the reason behind pion's error: ours, the peer's, or pion's.
func (a *attempt) explain(conn *handshakeConn, err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return fmt.Errorf("handshake: %w", a.err)
	}
	if alert, ok := conn.fatalAlert(); ok {
		return &refusedError{alert}
	}
	var h *dtls.HandshakeError
	if errors.As(err, &h) {
		err = h.Err
	}
	return fmt.Errorf("handshake: %w", err)
}

// pionState is the part of a pion State that MarshalBinary makes public and that the
// keys are made of. Gob matches the fields by name (serializedState of v2.2.12).
type pionState struct {
	LocalEpoch, RemoteEpoch   uint16
	LocalRandom, RemoteRandom [32]byte
	CipherSuiteID             uint16
	MasterSecret              []byte
	SequenceNumber            uint64
	IsClient                  bool
}

// takeOver turns a finished pion handshake into an agreement.
func takeOver(pion *dtls.Conn, conn *handshakeConn, a *attempt, isClient bool) (*agreement, error) {
	state := pion.ConnectionState()
	remote, err := a.verified(&state)
	if err != nil {
		return nil, err
	}
	// A State with a custom suite cannot be marshalled: it has forgotten the suite.
	keys := a.capture.keys.Load()
	if keys == nil {
		if keys, err = exportKeys(&state, isClient); err != nil {
			return nil, err
		}
	}
	return newAgreement(keys, remote, isClient, pion, conn), nil
}

// verified returns the key that the peer has proved to hold, none where the proof was a shared secret.
func (a *attempt) verified(state *dtls.State) (PublicKey, error) {
	if a.verify == nil {
		return PublicKey{}, nil
	}
	remote, err := remotePublicKey(state.PeerCertificates)
	if err != nil {
		return PublicKey{}, fmt.Errorf("handshake: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil || a.remote != remote {
		return PublicKey{}, errors.New("handshake: the certificate is not the one that was verified")
	}
	return remote, nil
}

// exportKeys reads the keys of one of pion's own suites out of its State.
func exportKeys(state *dtls.State, isClient bool) (*keyPair, error) {
	raw, err := state.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("handshake: export keys: %w", err)
	}
	defer clear(raw)
	var s pionState
	defer func() { clear(s.MasterSecret) }()
	if err := gob.NewDecoder(bytes.NewReader(raw)).Decode(&s); err != nil {
		return nil, fmt.Errorf("handshake: export keys: %w", err)
	}
	p := suiteByID(CipherSuite(s.CipherSuiteID))
	if p == nil || s.LocalEpoch != dataEpoch || s.IsClient != isClient || len(s.MasterSecret) != 48 {
		return nil, fmt.Errorf("handshake: export keys: suite %04x in epoch %d", s.CipherSuiteID, s.LocalEpoch)
	}
	clientRandom, serverRandom := s.RemoteRandom[:], s.LocalRandom[:]
	if isClient {
		clientRandom, serverRandom = serverRandom, clientRandom
	}
	keys := &keyPair{suite: p.id}
	keys.sealer, keys.opener, err = p.keys(s.MasterSecret, clientRandom, serverRandom, isClient)
	return keys, err
}
