package transport

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"sync"
	"time"
)

const (
	// cookieSize in bytes; clients of DTLS 1.0 take up to 32 (RFC 4347 4.3.2).
	cookieSize = 20
	// cookieRotation is the time between two secrets. A cookie is good for one
	// to two of these.
	cookieRotation = 30 * time.Second
	// admittedTime is how long an address that echoed a cookie may begin a handshake.
	admittedTime = 10 * time.Second
	// maxAdmitted bounds the table of such addresses: some 100 KiB.
	maxAdmitted = 1024
)

// helloVerifier makes strangers prove that they receive at their address before they cost
// anything: the cookie exchange of RFC 6347 4.2.1 with no state, for when the
// Transport is under load. The exchange that pion itself does keeps three goroutines and their
// buffers for each stranger, 32 KB, and takes 90 µs with its X25519 key; a challenge keeps
// nothing and takes 1 µs (BenchmarkHalfOpen and BenchmarkChallenge, AMD EPYC, Go 1.26.8).
//
// pion cannot join a handshake after its cookie was checked by somebody else. It draws its cookie
// itself, from crypto/rand; and told to do without one, it expects the
// ClientHello to be message 0 and makes its ServerHello message 0, where the client has 1 for both,
// and both numbers are part of what the Finished messages and the
// CertificateVerify cover (RFC 6347 4.2.6). So an address that has proved itself
// is remembered for some seconds and its handshake ended with [helloVerifier.retryAlert]:
// our own initiators begin anew at once, and a stranger's user tries again.
//
//	under load: ClientHello           --> challenge       (nothing is kept)
//	            ClientHello + cookie  --> verify, admit, retryAlert
//	            ClientHello           --> admitted: a handshakeConn with addressVerified
//
// It is safe for concurrent use.
type helloVerifier struct {
	mu                sync.Mutex
	current, previous [32]byte
	rotated           time.Time // zero before first use
	admitted          map[netip.Addr]time.Time
}

// challenge makes the HelloVerifyRequest that answers a first hello, one datagram of 48 bytes, smaller
// than any hello. The caller owns it.
func (v *helloVerifier) challenge(remote netip.AddrPort, hello *helloInfo) []byte {
	secret, _ := v.secrets()
	cookie := helloCookie(&secret, remote, hello)
	const body = 2 + 1 + cookieSize
	// Version and record number as RFC 6347 4.2.1 wants them: DTLS 1.0 whatever will be
	// negotiated, and the number of the ClientHello.
	b := make([]byte, 0, recordHeaderSize+handshakeHeaderSize+body)
	b = appendRecordHeader(b, contentHandshake, versionDTLS10, 0, hello.recordSeq, handshakeHeaderSize+body)
	b = append(b, byte(typeHelloVerifyRequest), 0, 0, body, 0, 0, 0, 0, 0, 0, 0, body)
	b = binary.BigEndian.AppendUint16(b, versionDTLS10)
	b = append(b, cookieSize)
	return append(b, cookie[:cookieSize]...)
}

// verify tells whether the hello echoes a cookie that challenge made for the same
// hello and address within the last half minute or more.
func (v *helloVerifier) verify(remote netip.AddrPort, hello *helloInfo) bool {
	if len(hello.cookie) != cookieSize {
		return false
	}
	current, previous := v.secrets()
	now, before := helloCookie(&current, remote, hello), helloCookie(&previous, remote, hello)
	return hmac.Equal(now[:cookieSize], hello.cookie) || hmac.Equal(before[:cookieSize], hello.cookie)
}

// admit remembers that the address was verified. With a full table those that
// have run out go first, then any.
func (v *helloVerifier) admit(remote netip.AddrPort) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if v.admitted == nil {
		v.admitted = make(map[netip.Addr]time.Time)
	}
	if len(v.admitted) >= maxAdmitted {
		for addr, until := range v.admitted {
			if !now.Before(until) {
				delete(v.admitted, addr)
			}
		}
		for addr := range v.admitted {
			if len(v.admitted) < maxAdmitted {
				break
			}
			delete(v.admitted, addr)
		}
	}
	v.admitted[remote.Addr()] = now.Add(admittedTime)
}

// isAdmitted tells whether the address, whatever its port, was verified within the last ten seconds.
func (v *helloVerifier) isAdmitted(remote netip.AddrPort) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	until, ok := v.admitted[remote.Addr()]
	return ok && time.Now().Before(until)
}

// retryAlert is the datagram that ends the handshake of a client just admitted: a fatal
// alert that [refusedError.retry] knows. Send it only to an address that was verified.
func (v *helloVerifier) retryAlert(hello *helloInfo) []byte {
	return plainAlert(alert{alertFatal, alertUserCanceled}, hello.recordSeq)
}

// secrets returns the secrets of now, after changing them if it is time.
func (v *helloVerifier) secrets() (current, previous [32]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	switch age := now.Sub(v.rotated); {
	case v.rotated.IsZero(), age >= 2*cookieRotation:
		rand.Read(v.current[:])
		rand.Read(v.previous[:])
		v.rotated = now
	case age >= cookieRotation:
		v.previous = v.current
		rand.Read(v.current[:])
		v.rotated = now
	}
	return v.current, v.previous
}

// helloCookie is RFC 6347's HMAC(Secret, Client-IP, Client-Parameters); both hellos of a client
// agree in all of these.
func helloCookie(secret *[32]byte, remote netip.AddrPort, hello *helloInfo) [sha256.Size]byte {
	mac := hmac.New(sha256.New, secret[:])
	addr := remote.Addr().As16()
	mac.Write(addr[:])
	mac.Write(binary.BigEndian.AppendUint16(nil, remote.Port()))
	mac.Write(hello.random[:])
	for _, field := range [][]byte{hello.sessionID, hello.suites, hello.compression} {
		mac.Write(binary.BigEndian.AppendUint16(nil, uint16(len(field))))
		mac.Write(field)
	}
	return [sha256.Size]byte(mac.Sum(nil))
}
