package transport

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

// KeySize is the size of a [PrivateKey] and of a [PublicKey] in bytes.
const KeySize = 32

// PrivateKey is the identity of a node: an Ed25519 seed (RFC 8032 5.1.5). Its
// text form is 44 characters of standard base64.
type PrivateKey [KeySize]byte

// PublicKey names a peer: an Ed25519 public key. Its text form is 44 characters
// of standard base64.
type PublicKey [KeySize]byte

var errKeyText = errors.New("not a key: expected 32 bytes in base64 (44 characters)")

// GenerateKey makes a PrivateKey from the system's random source.
func GenerateKey() (PrivateKey, error) {
	var k PrivateKey
	if _, err := io.ReadFull(rand.Reader, k[:]); err != nil {
		return PrivateKey{}, fmt.Errorf("generate key: %w", err)
	}
	return k, nil
}

// Public derives the public key.
func (k PrivateKey) Public() PublicKey {
	return PublicKey(k.ed25519().Public().(ed25519.PublicKey))
}

func (k PrivateKey) ed25519() ed25519.PrivateKey { return ed25519.NewKeyFromSeed(k[:]) }

// IsZero tells whether the key was never set.
func (k PrivateKey) IsZero() bool { return k == PrivateKey{} }

// IsZero tells whether the key was never set.
func (k PublicKey) IsZero() bool { return k == PublicKey{} }

// String hides the key, so that printing a configuration never leaks it. Use
// MarshalText for the real thing.
func (k PrivateKey) String() string { return "(private key)" }

// GoString hides the key from %#v too.
func (k PrivateKey) GoString() string { return k.String() }

// LogValue hides the key from slog, which would use MarshalText.
func (k PrivateKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// String is the base64 text form.
func (k PublicKey) String() string { return base64.StdEncoding.EncodeToString(k[:]) }

// MarshalText returns the base64 text form.
func (k PrivateKey) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, k[:]), nil
}

// MarshalText returns the base64 text form.
func (k PublicKey) MarshalText() ([]byte, error) {
	return base64.StdEncoding.AppendEncode(nil, k[:]), nil
}

// UnmarshalText reads the base64 text form; white space around it is ignored.
func (k *PrivateKey) UnmarshalText(text []byte) error {
	b, err := decodeKey(text)
	if err == nil {
		*k = b
	}
	return err
}

// UnmarshalText reads the base64 text form; white space around it is ignored.
func (k *PublicKey) UnmarshalText(text []byte) error {
	b, err := decodeKey(text)
	if err == nil {
		*k = b
	}
	return err
}

func decodeKey(text []byte) ([KeySize]byte, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(b) != KeySize {
		return [KeySize]byte{}, errKeyText
	}
	return [KeySize]byte(b), nil
}

// ParsePublicKey reads the base64 text form of a public key.
func ParsePublicKey(s string) (PublicKey, error) {
	var k PublicKey
	return k, k.UnmarshalText([]byte(s))
}

// ParsePrivateKey reads the base64 text form of a private key.
func ParsePrivateKey(s string) (PrivateKey, error) {
	var k PrivateKey
	return k, k.UnmarshalText([]byte(s))
}
