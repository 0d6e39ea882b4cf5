package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v2"
	"go.uber.org/goleak"
)

// noLeaks checks, after every other cleanup, that no goroutine is left.
func noLeaks(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
}

// wire joins two handshakeConns in memory. Each datagram passes by touch, which returns
// what arrives instead of it: nothing, itself, or several.
type wire struct {
	client, server *handshakeConn
}

type touchFunc func(fromClient bool, datagram []byte) [][]byte

func newWire(touch touchFunc) *wire {
	if touch == nil {
		touch = func(_ bool, d []byte) [][]byte { return [][]byte{d} }
	}
	w := new(wire)
	a, b := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("[2001:db8::2]:2000")
	w.client = newHandshakeConn(a, b, func(d []byte) {
		for _, d := range touch(true, bytes.Clone(d)) {
			w.server.push(d)
		}
	})
	w.server = newHandshakeConn(b, a, func(d []byte) {
		for _, d := range touch(false, bytes.Clone(d)) {
			w.client.push(d)
		}
	})
	return w
}

func testHandshaker(t testing.TB, suites ...CipherSuite) (*handshaker, PublicKey) {
	t.Helper()
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	h, err := newHandshaker(key, suites, 50*time.Millisecond, nil)
	if err != nil {
		t.Fatal(err)
	}
	return h, key.Public()
}

var errStranger = errors.New("nobody we know")

// only accepts one key.
func only(want PublicKey) func(PublicKey) error {
	return func(got PublicKey) error {
		if got != want {
			return errStranger
		}
		return nil
	}
}

// shake runs both ends to their end.
func shake(t testing.TB, w *wire, c, s *handshaker, verifyServer, verifyClient func(PublicKey) error) (client, server *agreement, clientErr, serverErr error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client, server, clientErr, serverErr = shakeBoth(ctx, w, c, s, verifyServer, verifyClient)
	t.Cleanup(func() {
		if client != nil {
			<-client.retire()
		}
		if server != nil {
			<-server.retire()
		}
	})
	return client, server, clientErr, serverErr
}

func shakeBoth(ctx context.Context, w *wire, c, s *handshaker, verifyServer, verifyClient func(PublicKey) error) (client, server *agreement, clientErr, serverErr error) {
	var wg sync.WaitGroup
	wg.Go(func() { server, serverErr = s.server(ctx, w.server, verifyClient) })
	wg.Go(func() { client, clientErr = c.client(ctx, w.client, verifyServer) })
	wg.Wait()
	return client, server, clientErr, serverErr
}

// exchange sends a record each way through the agreements' keys.
func exchange(t testing.TB, a, b *agreement) {
	t.Helper()
	for _, dir := range []struct{ from, to *agreement }{{a, b}, {b, a}} {
		for i := range uint64(3) {
			want := []byte{0, byte(i), 'x'}
			record := sealNew(&dir.from.sealer, contentApplicationData, dir.from.nextSeq+i, want)
			hdr, ok := parseRecordHeader(record)
			if !ok {
				t.Fatal("no record")
			}
			got, err := dir.to.opener.open(record, hdr, new(cryptoScratch))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("from initiator %v: %v", dir.from.initiator, err)
			}
		}
	}
}

func TestHandshake(t *testing.T) {
	noLeaks(t)
	for i := range suites {
		if suites[i].psk { // sessions have tests of their own
			continue
		}
		t.Run(suites[i].name, func(t *testing.T) {
			c, clientKey := testHandshaker(t, suites[i].id)
			s, serverKey := testHandshaker(t)
			client, server, err1, err2 := shake(t, newWire(nil), c, s, only(serverKey), only(clientKey))
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			if client.suite != suites[i].id || server.suite != suites[i].id {
				t.Fatalf("suites %v and %v", client.suite, server.suite)
			}
			if client.remote != serverKey || server.remote != clientKey || !client.initiator || server.initiator {
				t.Fatal("wrong peers")
			}
			if client.nextSeq != 1+finishedGap || server.nextSeq != 1+finishedGap {
				t.Fatalf("next sequence numbers %d and %d", client.nextSeq, server.nextSeq)
			}
			exchange(t, client, server)
		})
	}
}

// An unknown key ends the handshake while it goes on, and the far side is told why.
func TestHandshakeRefusesStrangers(t *testing.T) {
	noLeaks(t)
	t.Run("the server's key", func(t *testing.T) {
		c, _ := testHandshaker(t)
		s, _ := testHandshaker(t)
		_, wrong := testHandshaker(t)
		client, server, clientErr, serverErr := shake(t, newWire(nil), c, s, only(wrong), anyKey)
		if client != nil || server != nil || !errors.Is(clientErr, errStranger) {
			t.Fatalf("client %v, %v; server %v, %v", client, clientErr, server, serverErr)
		}
		wantAlert(t, serverErr, alertBadCertificate)
	})
	t.Run("the client's key", func(t *testing.T) {
		c, _ := testHandshaker(t)
		s, serverKey := testHandshaker(t)
		_, wrong := testHandshaker(t)
		client, server, clientErr, serverErr := shake(t, newWire(nil), c, s, only(serverKey), only(wrong))
		if client != nil || server != nil || !errors.Is(serverErr, errStranger) {
			t.Fatalf("client %v, %v; server %v, %v", client, clientErr, server, serverErr)
		}
		wantAlert(t, clientErr, alertBadCertificate)
	})
	t.Run("no suite in common", func(t *testing.T) {
		c, _ := testHandshaker(t, AES128GCM)
		s, _ := testHandshaker(t, AES256GCM, ChaCha20Poly1305)
		_, _, clientErr, serverErr := shake(t, newWire(nil), c, s, anyKey, anyKey)
		if serverErr == nil {
			t.Fatal("the server agreed")
		}
		wantAlert(t, clientErr, 71) // insufficient_security
	})
}

func anyKey(PublicKey) error { return nil }

func wantAlert(t *testing.T, err error, description uint8) {
	t.Helper()
	var refused *refusedError
	if !errors.As(err, &refused) || refused.alert.description != description {
		t.Fatalf("got %v, want alert %d", err, description)
	}
}

// With somebody else's certificate, and without the key to it, nobody gets as far as verify.
func TestHandshakeImpersonation(t *testing.T) {
	noLeaks(t)
	honest, key := testHandshaker(t)
	other, otherKey := testHandshaker(t)
	thief, _ := testHandshaker(t)
	thief.certificate.Certificate = honest.certificate.Certificate
	mustNotBeAsked := func(k PublicKey) error {
		if k == key {
			t.Errorf("the stolen certificate was taken for proof")
		}
		return nil
	}
	client, server, err1, err2 := shake(t, newWire(nil), thief, other, only(otherKey), mustNotBeAsked)
	if client != nil || server != nil || err2 == nil {
		t.Errorf("as a client: %v, %v", err1, err2)
	}
	client, server, err1, err2 = shake(t, newWire(nil), other, thief, mustNotBeAsked, anyKey)
	if client != nil || server != nil || err1 == nil {
		t.Errorf("as a server: %v, %v", err1, err2)
	}
}

// Without a certificate a client gets nowhere either.
func TestHandshakeWithoutACertificate(t *testing.T) {
	noLeaks(t)
	c, _ := testHandshaker(t)
	s, _ := testHandshaker(t)
	c.certificate = tls.Certificate{}
	asked := func(PublicKey) error { t.Error("verify was asked"); return nil }
	w := newWire(nil)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		config := c.config(&attempt{verify: anyKey}, c.suites)
		config.Certificates = nil
		config.GetClientCertificate = func(*dtls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
		if conn, err := dtls.ClientWithContext(ctx, w.client, config); err == nil {
			w.client.mute()
			conn.Close()
			t.Error("the client has a connection")
		}
	})
	if agreement, err := s.server(ctx, w.server, asked); err == nil {
		<-agreement.retire()
		t.Error("the server has an agreement")
	}
	wg.Wait()
}

func TestHandshakeErrorsWithoutPeer(t *testing.T) {
	noLeaks(t)
	c, _ := testHandshaker(t)
	conn := newHandshakeConn(netip.AddrPort{}, netip.AddrPort{}, func([]byte) {})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := c.client(ctx, conn, anyKey); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("nobody answers: %v", err)
	}
	conn = newHandshakeConn(netip.AddrPort{}, netip.AddrPort{}, func([]byte) {})
	conn.Close()
	if _, err := c.server(t.Context(), conn, anyKey); !errors.Is(err, net.ErrClosed) {
		t.Fatalf("closed under pion: %v", err)
	}
}

// Whichever one datagram of the handshake is lost, doubled or late, both sides
// come to the same keys.
func TestHandshakeOnABadWire(t *testing.T) {
	noLeaks(t)
	damages := map[string]func(d []byte, held *[]byte) [][]byte{
		"lost":    func([]byte, *[]byte) [][]byte { return nil },
		"doubled": func(d []byte, _ *[]byte) [][]byte { return [][]byte{d, d} },
		"late":    func(d []byte, held *[]byte) [][]byte { *held = d; return nil },
	}
	for name, damage := range damages {
		for victim := range 6 { // hello, verify, hello, server's flight, client's flight, Finished
			t.Run(fmt.Sprintf("%s/%d", name, victim), func(t *testing.T) {
				var mu sync.Mutex
				var held []byte
				var heldFromClient bool
				count := 0
				w := newWire(func(fromClient bool, d []byte) [][]byte {
					mu.Lock()
					defer mu.Unlock()
					count++
					if count-1 == victim {
						heldFromClient = fromClient
						return damage(d, &held)
					}
					if held != nil && heldFromClient == fromClient {
						late := held
						held = nil
						return [][]byte{d, late}
					}
					return [][]byte{d}
				})
				c, clientKey := testHandshaker(t)
				s, serverKey := testHandshaker(t)
				client, server, err1, err2 := shake(t, w, c, s, only(serverKey), only(clientKey))
				if err1 != nil || err2 != nil {
					t.Fatal(err1, err2)
				}
				exchange(t, client, server)
			})
		}
	}
}

// Records that anybody can forge, thrown in before every genuine datagram, do not
// stop a handshake.
func TestHandshakeAmongForgeries(t *testing.T) {
	noLeaks(t)
	forge := func(typ contentType, epoch uint16, body ...byte) []byte {
		return append(appendRecordHeader(nil, typ, versionDTLS12, epoch, 1<<40, len(body)), body...)
	}
	forgeries := [][]byte{
		[]byte("not a record"),
		forge(contentHandshake, 0),
		forge(contentHandshake, 0, 1, 2, 3),
		forge(contentApplicationData, 0, 1, 2, 3),
		forge(contentApplicationData, 1, bytes.Repeat([]byte{7}, 60)...),
		forge(contentChangeCipherSpec, 0, 7),
		forge(contentChangeCipherSpec, 1, 1),
		forge(contentAlert, 0, 9),
		forge(contentAlert, 0, 7, 7),
		forge(contentAlert, 1, bytes.Repeat([]byte{7}, 26)...),
		forge(99, 0, 1),
		forge(contentHandshake, 2, 1, 2, 3),
	}
	w := newWire(func(_ bool, d []byte) [][]byte { return append(slices.Clone(forgeries), d) })
	c, clientKey := testHandshaker(t)
	s, serverKey := testHandshaker(t)
	client, server, err1, err2 := shake(t, w, c, s, only(serverKey), only(clientKey))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	exchange(t, client, server)
	if early := server.takeEarly(); len(early) > 2*len(forgeries) {
		t.Fatalf("%d forged application records kept", len(early))
	}
}

// TestClientHelloOrder: what is offered is our order, though pion puts custom
// suites first. With a list of its own suites it would put ChaCha20 before AES.
func TestClientHelloOrder(t *testing.T) {
	for _, order := range [][]CipherSuite{
		{AES128GCM, AES256GCM, ChaCha20Poly1305},
		{ChaCha20Poly1305, AES256GCM},
	} {
		c, _ := testHandshaker(t, order...)
		var once sync.Once
		var first []byte
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		conn := newHandshakeConn(netip.AddrPort{}, netip.AddrPort{}, func(d []byte) {
			once.Do(func() { first = bytes.Clone(d); cancel() })
		})
		if _, err := c.client(ctx, conn, anyKey); err == nil {
			t.Fatal("an agreement with nobody")
		}
		hello, ok := peekClientHello(first)
		if !ok {
			t.Fatalf("our own hello is refused: %x", first)
		}
		var want []byte
		for _, id := range order {
			want = binary.BigEndian.AppendUint16(want, uint16(id))
		}
		if !bytes.Equal(hello.suites, want) {
			t.Errorf("offered %x, want %x", hello.suites, want)
		}
	}
}

// Either side without AES instructions decides for ChaCha20-Poly1305.
func TestSuitePreference(t *testing.T) {
	aes := []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305}
	chacha := []CipherSuite{ChaCha20Poly1305, AES128GCM, AES256GCM}
	for _, c := range []struct {
		name           string
		client, server []CipherSuite
		want           CipherSuite
	}{
		{"both AES", aes, aes, AES128GCM},
		{"client without", chacha, aes, ChaCha20Poly1305},
		{"server without", aes, chacha, ChaCha20Poly1305},
		{"server without, client has only AES", aes[:2], chacha, AES128GCM},
		{"client wants 256", []CipherSuite{AES256GCM}, aes, AES256GCM},
	} {
		t.Run(c.name, func(t *testing.T) {
			ch, _ := testHandshaker(t, c.client...)
			sh, _ := testHandshaker(t, c.server...)
			w := newWire(nil)
			// The engine pushes the first hello before it calls server; here the
			// server waits for it.
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			var client, server *agreement
			var err1, err2 error
			var wg sync.WaitGroup
			wg.Go(func() { client, err1 = ch.client(ctx, w.client, anyKey) })
			wg.Go(func() {
				for ctx.Err() == nil {
					if _, ok := w.server.firstHello(); ok {
						break
					}
					time.Sleep(time.Millisecond)
				}
				server, err2 = sh.server(ctx, w.server, anyKey)
			})
			wg.Wait()
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			<-server.retire()
			if client.suite != c.want || server.suite != c.want {
				t.Fatalf("client %v, server %v, want %v", client.suite, server.suite, c.want)
			}
		})
	}
}

func TestNewHandshakerRefusesUnknownSuites(t *testing.T) {
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newHandshaker(key, []CipherSuite{AES128GCM, 0x1301}, 0, nil); err == nil || !strings.Contains(err.Error(), "0x1301") {
		t.Fatalf("got %v", err)
	}
}
