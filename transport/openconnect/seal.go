package openconnect

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"sync"
	"time"
)

// errState: the state of a sign-in is absent, forged or too old. The sign-in starts
// again; nobody is told which it was.
var errState = errors.New("no valid state of a sign-in")

// sealer keeps the state between the steps of a sign-in with the client: encrypted and
// authenticated, with the time when it ends. AES-256-GCM under a key derived from the
// Handler's secret, with random nonces: a key would have to seal 2^32 of them for a
// collision to become likely (NIST SP 800-38D 8.3).
type sealer struct {
	once sync.Once
	aead cipher.AEAD
}

// Layout: nonce, then sealed: version, expiry in Unix seconds, what was asked, state.
const (
	stateVersion = 1
	stateHead    = 1 + 8 + 1
	maxState     = 1 << 10
)

// What a form asked, so that an answer to something else is no answer.
const (
	askedUsername = 1 << iota
	askedPassword
	askedGroup
	askedFactor
)

// init makes the key on first use.
func (s *sealer) init(secret []byte) {
	s.once.Do(func() {
		if len(secret) == 0 {
			secret = make([]byte, 32)
			rand.Read(secret) // never fails
		}
		key, err := hkdf.Key(sha256.New, secret, nil, "penstock sign-in state", 32)
		if err != nil {
			panic(err) // only for lengths beyond reason
		}
		block, err := aes.NewCipher(key)
		if err != nil {
			panic(err)
		}
		if s.aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
			panic(err)
		}
	})
}

// seal makes a cookie's value of a state.
func (s *sealer) seal(expires time.Time, asked byte, state []byte) string {
	plain := make([]byte, stateHead, stateHead+len(state))
	plain[0] = stateVersion
	binary.BigEndian.PutUint64(plain[1:], uint64(expires.Unix()))
	plain[9] = asked
	plain = append(plain, state...)
	return base64.RawURLEncoding.EncodeToString(s.aead.Seal(nil, nil, plain, nil))
}

// open reads a cookie's value.
func (s *sealer) open(now time.Time, cookie string) (asked byte, state []byte, err error) {
	sealed, err := base64.RawURLEncoding.DecodeString(cookie)
	if err != nil || len(cookie) > maxCookie {
		return 0, nil, errState
	}
	plain, err := s.aead.Open(nil, nil, sealed, nil)
	if err != nil || len(plain) < stateHead || plain[0] != stateVersion {
		return 0, nil, errState
	}
	if expires := binary.BigEndian.Uint64(plain[1:]); uint64(now.Unix()) >= expires {
		return 0, nil, errState
	}
	return plain[9], plain[stateHead:], nil
}
