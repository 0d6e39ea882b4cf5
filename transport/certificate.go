package transport

import (
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// errNoPublicKey: the peer's certificate does not hold an Ed25519 key.
var errNoPublicKey = errors.New("peer certificate holds no Ed25519 key")

// The validity of our certificate. Nobody on our side looks at it; it is as wide
// as it can be for peers that do, whatever their clocks say. 9999-12-31 is
// RFC 5280 4.1.2.5's way to say that there is no end.
var (
	certificateNotBefore = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	certificateNotAfter  = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)
)

// selfSigned makes the certificate of a key: X.509, signed by the key itself, the
// same bytes for the same key every time (Ed25519 signatures draw nothing at random), so
// that a peer that pins the whole certificate keeps working.
func selfSigned(key PrivateKey) (tls.Certificate, error) {
	private := key.ed25519()
	public := key.Public()
	serial := new(big.Int).SetBytes(public[:16])
	serial.SetBit(serial, 127, 0) // RFC 5280 4.1.2.2: positive and
	serial.SetBit(serial, 126, 1) // not zero
	template := x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "penstock"},
		NotBefore:             certificateNotBefore,
		NotAfter:              certificateNotAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(nil, &template, &template, private.Public(), private)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make certificate: %w", err)
	}
	// With the leaf at hand pion need not parse it for every handshake.
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private, Leaf: leaf}, nil
}

// remotePublicKey returns the key that the peer proved to hold: that of the first certificate of
// the chain it sent, which it borrows. Names, dates, issuer and the rest of the
// chain are not looked at: trust comes from the configured keys alone.
func remotePublicKey(rawCerts [][]byte) (PublicKey, error) {
	if len(rawCerts) == 0 {
		return PublicKey{}, errNoPublicKey
	}
	leaf, err := x509.ParseCertificate(rawCerts[0])
	if err != nil {
		return PublicKey{}, fmt.Errorf("%w: %w", errNoPublicKey, err)
	}
	key, ok := leaf.PublicKey.(ed25519.PublicKey)
	if !ok || len(key) != KeySize {
		return PublicKey{}, errNoPublicKey
	}
	return PublicKey(key), nil
}
