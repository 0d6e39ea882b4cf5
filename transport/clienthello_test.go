package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v2/pkg/protocol/handshake"
)

// opensslHello is the first datagram of "openssl s_client -dtls1_2" of OpenSSL
// 3.0.19, gnutlsHello that of "gnutls-cli -u" of GnuTLS 3.7.9, both on loopback.
var (
	opensslHello = unhex(`
		16feff000000000000000000c0010000b400000000000000b4fefda4704acbb27e991b2e7db498a1f5d449630fea6317
		5367ce274c397a5f1590b800000038c02cc030009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0
		140039c009c0130033009d009c003d003c0035002f00ff01000052000b000403000102000a000c000a001d0017001e00
		190018002300000016000000170000000d002a0028040305030603080708080809080a080b0804080508060401050106
		01030303010302040205020602
	`)
	gnutlsHello = unhex(`
		16feff000000000000000000ce010000c200000000000000c2fefd0958eff8d9a8bfb3e0cef72a48429547d6c94fb777
		c29227ce48c8b97f5fc63000000032c02ccca9c0adc00ac02bc0acc009c030cca8c014c02fc013009dc09d0035009cc0
		9c002f009fccaac09f0039009ec09e003301000066000500050100000000000a00160014001700180019001d001e0100
		0101010201030104000b00020100000d00220020040108090804040308070501080a0805050308080601080b08060603
		02010203001600000017000000230000ff01000100001c00024000
	`)
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}

// pionHello is the first datagram of our own client.
func pionHello(t testing.TB) []byte {
	t.Helper()
	h, _ := testHandshaker(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	var once sync.Once
	var first []byte
	conn := newHandshakeConn(netip.AddrPort{}, netip.AddrPort{}, func(d []byte) {
		once.Do(func() { first = bytes.Clone(d); cancel() })
	})
	h.client(ctx, conn, anyKey)
	return first
}

func TestPeekClientHelloOfStrangers(t *testing.T) {
	for name, datagram := range map[string][]byte{"openssl": opensslHello, "gnutls": gnutlsHello, "pion": pionHello(t)} {
		hello, ok := peekClientHello(datagram)
		if !ok {
			t.Errorf("%s: refused", name)
			continue
		}
		if hello.messageSeq != 0 || hello.recordSeq != 0 || len(hello.cookie) != 0 || !hello.offers(AES128GCM) || hello.offers(0x1234) {
			t.Errorf("%s: %+v", name, hello)
		}
		// pion's parser is the oracle for the fields.
		var theirs handshake.MessageClientHello
		if err := theirs.Unmarshal(datagram[recordHeaderSize+handshakeHeaderSize:]); err != nil {
			t.Fatal(err)
		}
		random := theirs.Random.MarshalFixed()
		if hello.random != random || !bytes.Equal(hello.sessionID, theirs.SessionID) || len(hello.suites) != 2*len(theirs.CipherSuiteIDs) {
			t.Errorf("%s: pion reads another hello", name)
		}
	}
}

// Each of these differs from a good hello in one thing.
func TestPeekClientHelloRefuses(t *testing.T) {
	good := pionHello(t)
	if _, ok := peekClientHello(good); !ok {
		t.Fatal("the good one")
	}
	const message = recordHeaderSize + handshakeHeaderSize
	extensions := message + 2 + 32 + 1 + 1 + 2 + 6 + 1 + 1
	for _, c := range []struct {
		name   string
		change func(b []byte) []byte
	}{
		{"alert", func(b []byte) []byte { b[0] = 21; return b }},
		{"epoch 1", func(b []byte) []byte { b[4] = 1; return b }},
		{"TLS record", func(b []byte) []byte { b[1], b[2] = 3, 3; return b }},
		{"another message", func(b []byte) []byte { b[recordHeaderSize] = 2; return b }},
		{"DTLS 1.0 client", func(b []byte) []byte { b[message+1] = 0xff; return b }},
		{"first fragment", func(b []byte) []byte { b[recordHeaderSize+3]++; return b }},
		{"later fragment", func(b []byte) []byte { b[recordHeaderSize+8] = 1; return b }},
		{"session ID too long", func(b []byte) []byte { b[message+34] = 33; return b }},
		{"cookie beyond the end", func(b []byte) []byte { b[message+35] = 255; return b }},
		{"odd suites", func(b []byte) []byte { b[message+37]--; return b }},
		{"no suites", func(b []byte) []byte { b[message+37] = 0; return b }},
		{"no null compression", func(b []byte) []byte { b[extensions-1] = 1; return b }},
		{"extensions too long", func(b []byte) []byte { b[extensions+1]++; return b }},
		{"extensions too short", func(b []byte) []byte { b[extensions+1]--; return b }},
		{"extension beyond the list", func(b []byte) []byte { b[extensions+4] = 1; return b }},
		{"two messages in the record", func(b []byte) []byte {
			b = append(b, b[recordHeaderSize:]...)
			binary.BigEndian.PutUint16(b[11:], uint16(len(b)-recordHeaderSize))
			return b
		}},
	} {
		if _, ok := peekClientHello(c.change(slices.Clone(good))); ok {
			t.Errorf("%s: accepted", c.name)
		}
	}
	for n := range good {
		if _, ok := peekClientHello(good[:n:n]); ok {
			t.Errorf("cut to %d bytes: accepted", n)
		}
	}
	if n := testing.AllocsPerRun(10, func() { peekClientHello(good) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzPeekClientHello: what passes, pion parses too, to the same fields.
func FuzzPeekClientHello(f *testing.F) {
	f.Add(opensslHello)
	f.Add(gnutlsHello)
	f.Add(pionHello(f))
	f.Fuzz(func(t *testing.T, datagram []byte) {
		hello, ok := peekClientHello(datagram)
		if !ok {
			return
		}
		body := datagram[recordHeaderSize : recordHeaderSize+int(binary.BigEndian.Uint16(datagram[11:]))]
		theirs := new(handshake.MessageClientHello)
		if err := theirs.Unmarshal(body[handshakeHeaderSize:]); err != nil {
			return // pion reads into the extensions
		}
		random := theirs.Random.MarshalFixed()
		if hello.random != random || !bytes.Equal(hello.cookie, theirs.Cookie) || !bytes.Equal(hello.sessionID, theirs.SessionID) || len(hello.suites) != 2*len(theirs.CipherSuiteIDs) {
			t.Fatalf("pion reads %+v, we %+v", theirs, hello)
		}
	})
}

var verifierRemote = netip.MustParseAddrPort("198.51.100.7:4500")

// answer makes the second hello of a client from its first and the challenge.
func answer(t *testing.T, first, challenge []byte) helloInfo {
	t.Helper()
	var verify handshake.MessageHelloVerifyRequest
	if err := verify.Unmarshal(challenge[recordHeaderSize+handshakeHeaderSize:]); err != nil {
		t.Fatalf("pion cannot read the challenge: %v", err)
	}
	hello, ok := peekClientHello(first)
	if !ok {
		t.Fatal("no hello")
	}
	hello.messageSeq, hello.cookie = 1, verify.Cookie
	return hello
}

func TestHelloVerifier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v helloVerifier
		first, _ := peekClientHello(opensslHello)
		first.recordSeq = 7
		challenge := v.challenge(verifierRemote, &first)
		hdr, ok := parseRecordHeader(challenge)
		if !ok || hdr.seq != 7 || hdr.epoch != 0 || len(challenge) != recordHeaderSize+hdr.length || len(challenge) > 48 {
			t.Fatalf("%+v %v, %d bytes", hdr, ok, len(challenge))
		}
		second := answer(t, opensslHello, challenge)
		if !v.verify(verifierRemote, &second) {
			t.Fatal("the answer is refused")
		}

		other := second
		other.random[0] ^= 1
		if v.verify(verifierRemote, &other) {
			t.Error("for another hello")
		}
		other = second
		other.suites = other.suites[2:]
		if v.verify(verifierRemote, &other) {
			t.Error("for other suites")
		}
		other = second
		other.cookie = slices.Clone(second.cookie)
		other.cookie[0] ^= 1
		if v.verify(verifierRemote, &other) {
			t.Error("with another cookie")
		}
		if v.verify(netip.MustParseAddrPort("198.51.100.7:4501"), &second) || v.verify(netip.MustParseAddrPort("198.51.100.8:4500"), &second) {
			t.Error("from another address")
		}
		if v.verify(verifierRemote, &first) {
			t.Error("without a cookie")
		}
		var elsewhere helloVerifier
		if elsewhere.verify(verifierRemote, &second) {
			t.Error("by another node")
		}

		time.Sleep(cookieRotation)
		if !v.verify(verifierRemote, &second) {
			t.Error("half a minute later: refused")
		}
		time.Sleep(cookieRotation)
		if v.verify(verifierRemote, &second) {
			t.Error("a minute later: accepted")
		}
	})
}

func TestAdmittedAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v helloVerifier
		if v.isAdmitted(verifierRemote) {
			t.Fatal("a stranger is admitted")
		}
		v.admit(verifierRemote)
		if !v.isAdmitted(netip.AddrPortFrom(verifierRemote.Addr(), 9)) {
			t.Error("the same address with another port is not")
		}
		time.Sleep(admittedTime)
		if v.isAdmitted(verifierRemote) {
			t.Error("still admitted after its time")
		}
		for i := range 3 * maxAdmitted {
			v.admit(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 1))
		}
		if len(v.admitted) > maxAdmitted {
			t.Errorf("%d addresses remembered", len(v.admitted))
		}
	})
}

// Under load, the whole way: challenge, verify, retry, and the next handshake needs no other cookie.
func TestAdmittedHandshake(t *testing.T) {
	noLeaks(t)
	var v helloVerifier
	c, clientKey := testHandshaker(t)
	s, serverKey := testHandshaker(t)

	var conn *handshakeConn
	conn = newHandshakeConn(netip.AddrPort{}, verifierRemote, func(d []byte) {
		hello, ok := peekClientHello(d)
		switch {
		case !ok:
			t.Errorf("not a hello: %x", d)
		case len(hello.cookie) == 0:
			conn.push(v.challenge(verifierRemote, &hello))
		case v.verify(verifierRemote, &hello):
			v.admit(verifierRemote)
			conn.push(v.retryAlert(&hello))
		}
	})
	_, err := c.client(t.Context(), conn, only(serverKey))
	refused, ok := err.(*refusedError)
	if !ok || !refused.retry() || !v.isAdmitted(verifierRemote) {
		t.Fatalf("%v", err)
	}

	var datagrams atomic.Int64
	w := newWire(func(_ bool, d []byte) [][]byte { datagrams.Add(1); return [][]byte{d} })
	w.server.addressVerified = true
	client, server, err1, err2 := shake(t, w, c, s, only(serverKey), only(clientKey))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	exchange(t, client, server)
	if n := datagrams.Load(); n != 4 {
		t.Errorf("%d datagrams, want 4: no second cookie exchange", n)
	}
}

func BenchmarkChallenge(b *testing.B) {
	var v helloVerifier
	hello, _ := peekClientHello(opensslHello)
	b.ReportAllocs()
	for b.Loop() {
		v.challenge(verifierRemote, &hello)
	}
}
