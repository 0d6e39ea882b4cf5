package transport

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"

	"github.com/pion/dtls/v2/pkg/crypto/prf"
	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/cpu"
)

// suiteParams is what a cipher suite needs once the master secret is known.
type suiteParams struct {
	id     CipherSuite
	name   string // as IANA writes it
	keyLen int    // bytes of write key
	ivLen  int    // bytes of fixed IV: 4 with GCM (RFC 5288 3), 12 with ChaCha20 (RFC 7905 2)
	hash   func() hash.Hash
	aead   func(key []byte) (cipher.AEAD, error)
	psk    bool // plain pre-shared key (RFC 5487) in place of ECDHE and certificates
}

// suites are the cipher suites of this package, in the order that suits a
// CPU with AES instructions.
var suites = []suiteParams{
	{AES128GCM, "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", 16, 4, sha256.New, newAESGCM, false},
	{AES256GCM, "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", 32, 4, sha512.New384, newAESGCM, false},
	{ChaCha20Poly1305, "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256", 32, 12, sha256.New, chacha20poly1305.New, false},
	{PSKAES256GCM, "TLS_PSK_WITH_AES_256_GCM_SHA384", 32, 4, sha512.New384, newAESGCM, true},
	{PSKAES128GCM, "TLS_PSK_WITH_AES_128_GCM_SHA256", 16, 4, sha256.New, newAESGCM, true},
}

func newAESGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// suiteByID returns the parameters of a suite, nil when this package does not have it.
func suiteByID(id CipherSuite) *suiteParams {
	for i := range suites {
		if suites[i].id == id {
			return &suites[i]
		}
	}
	return nil
}

// String is the IANA name.
func (c CipherSuite) String() string {
	if p := suiteByID(c); p != nil {
		return p.name
	}
	return fmt.Sprintf("0x%04X", uint16(c))
}

// defaultSuites is the order of preference: ChaCha20-Poly1305 last where the CPU
// has instructions for both halves of AES-GCM, else first: without them AES is several times
// slower and leaks through the cache.
func defaultSuites() []CipherSuite {
	if hasAESGCM() {
		return []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305}
	}
	return []CipherSuite{ChaCha20Poly1305, AES128GCM, AES256GCM}
}

// sessionSuites are those of sessions, in order of preference. GnuTLS and ocserv have both. The
// second is for those who lack the first; with ECDHE_PSK pion v2 is open to CVE-2026-54908, so there is none of it.
var sessionSuites = []CipherSuite{PSKAES256GCM, PSKAES128GCM}

// hasAESGCM tells whether the CPU has AES and carry-less multiplication, in the
// combinations for which crypto/aes has assembly.
func hasAESGCM() bool {
	return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE41 ||
		cpu.ARM64.HasAES && cpu.ARM64.HasPMULL ||
		cpu.S390X.HasAES && cpu.S390X.HasAESCTR && cpu.S390X.HasGHASH ||
		cpu.PPC64.IsPOWER8
}

// keys derives the two directions of an association (RFC 5246 6.3) in epoch
// [dataEpoch]. It borrows its arguments and clears the key block it made; the key
// schedules stay in the AEADs.
func (p *suiteParams) keys(masterSecret, clientRandom, serverRandom []byte, isClient bool) (sealer, opener, error) {
	block, err := prf.GenerateEncryptionKeys(masterSecret, clientRandom, serverRandom, 0, p.keyLen, p.ivLen, p.hash)
	if err != nil {
		return sealer{}, opener{}, fmt.Errorf("derive keys: %w", err)
	}
	defer func() {
		clear(block.ClientWriteKey)
		clear(block.ServerWriteKey)
		clear(block.ClientWriteIV)
		clear(block.ServerWriteIV)
	}()
	client, err := p.direction(block.ClientWriteKey, block.ClientWriteIV)
	if err != nil {
		return sealer{}, opener{}, err
	}
	server, err := p.direction(block.ServerWriteKey, block.ServerWriteIV)
	if err != nil {
		return sealer{}, opener{}, err
	}
	if isClient {
		return sealer{client}, opener{server}, nil
	}
	return sealer{server}, opener{client}, nil
}

func (p *suiteParams) direction(key, iv []byte) (recordKey, error) {
	aead, err := p.aead(key)
	if err != nil {
		return recordKey{}, fmt.Errorf("derive keys: %w", err)
	}
	k := recordKey{aead: aead, epoch: dataEpoch, explicit: p.ivLen < aead.NonceSize()}
	copy(k.iv[:], iv)
	return k, nil
}
