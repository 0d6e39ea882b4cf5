package transport

import (
	"errors"
	"hash"
	"sync/atomic"

	"github.com/pion/dtls/v2"
	"github.com/pion/dtls/v2/pkg/crypto/clientcertificate"
	"github.com/pion/dtls/v2/pkg/protocol/recordlayer"
)

// keyPair is both directions of an association.
type keyPair struct {
	suite  CipherSuite
	sealer sealer
	opener opener
}

// suiteCapture receives the keys of a suite that pion does not have itself, as soon as
// pion knows the master secret. One belongs to one handshake.
type suiteCapture struct{ keys atomic.Pointer[keyPair] }

// customSuite is a row of the table of suites as pion wants to see it. It serves two ends.
//
// For an ID that pion v2 lacks it is the real thing: the Finished messages are
// sealed and opened by our own record layer, with counter nonces from the first
// record, and the keys are handed over without a copy of the master secret.
//
// For an ID that pion has it only holds the place in the ClientHello: pion offers
// custom suites before all others, so every suite must be one to be offered in
// our order, but once an ID is agreed on pion takes its own suite of that ID
// (cipherSuiteForID and findMatchingCipherSuite of v2.2.12).
type customSuite struct {
	params  *suiteParams
	capture *suiteCapture
	keys    atomic.Pointer[keyPair]
}

var _ dtls.CipherSuite = (*customSuite)(nil)

var (
	errSuiteNotReady = errors.New("cipher suite has no keys yet")
	errSuiteRecord   = errors.New("not a record")
)

// customSuites makes the suites of one handshake, in order. IDs that are unknown
// are left out.
func customSuites(order []CipherSuite, capture *suiteCapture) []dtls.CipherSuite {
	made := make([]dtls.CipherSuite, 0, len(order))
	for _, id := range order {
		if p := suiteByID(id); p != nil {
			made = append(made, &customSuite{params: p, capture: capture})
		}
	}
	return made
}

func (c *customSuite) String() string             { return c.params.name }
func (c *customSuite) ID() dtls.CipherSuiteID     { return dtls.CipherSuiteID(c.params.id) }
func (c *customSuite) HashFunc() func() hash.Hash { return c.params.hash }
func (c *customSuite) ECC() bool                  { return !c.params.psk }
func (c *customSuite) IsInitialized() bool        { return c.keys.Load() != nil }

// CertificateType: Ed25519 certificates go by the name of ECDSA (RFC 8422 5.5).
func (c *customSuite) CertificateType() clientcertificate.Type { return clientcertificate.ECDSASign }

func (c *customSuite) AuthenticationType() dtls.CipherSuiteAuthenticationType {
	if c.params.psk {
		return dtls.CipherSuiteAuthenticationTypePreSharedKey
	}
	return dtls.CipherSuiteAuthenticationTypeCertificate
}

func (c *customSuite) KeyExchangeAlgorithm() dtls.CipherSuiteKeyExchangeAlgorithm {
	if c.params.psk {
		return dtls.CipherSuiteKeyExchangeAlgorithmPsk
	}
	return dtls.CipherSuiteKeyExchangeAlgorithmEcdhe
}

// Init derives the keys. It borrows its arguments.
func (c *customSuite) Init(masterSecret, clientRandom, serverRandom []byte, isClient bool) error {
	seal, open, err := c.params.keys(masterSecret, clientRandom, serverRandom, isClient)
	if err != nil {
		return err
	}
	keys := &keyPair{c.params.id, seal, open}
	c.keys.Store(keys)
	c.capture.keys.Store(keys)
	return nil
}

// Encrypt seals a record of pion's, raw being its header and plaintext, which it borrows.
func (c *customSuite) Encrypt(pkt *recordlayer.RecordLayer, raw []byte) ([]byte, error) {
	keys := c.keys.Load()
	if keys == nil || pkt.Header.Epoch != dataEpoch {
		return nil, errSuiteNotReady
	}
	k := &keys.sealer
	plaintext := raw[recordHeaderSize:]
	buf := make([]byte, k.overhead()+len(plaintext))
	copy(buf[k.headroom():], plaintext)
	return k.seal(buf, contentType(pkt.Header.ContentType), pkt.Header.SequenceNumber, new(cryptoScratch)), nil
}

// Decrypt opens a record for pion, which wants header and plaintext back. It leaves
// in as it is, so that pion can keep it.
func (c *customSuite) Decrypt(in []byte) ([]byte, error) {
	keys := c.keys.Load()
	if keys == nil {
		return nil, errSuiteNotReady
	}
	hdr, record, rest, ok := nextRecord(append([]byte(nil), in...))
	if !ok || len(rest) > 0 {
		return nil, errSuiteRecord
	}
	plaintext, err := keys.opener.open(record, hdr, new(cryptoScratch))
	if err != nil {
		return nil, err
	}
	return append(record[:recordHeaderSize], plaintext...), nil
}
