package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v2"
)

func silentConn() *handshakeConn {
	return newHandshakeConn(netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("127.0.0.1:2"), func([]byte) {})
}

// handshakeDatagram is a datagram with one handshake record of epoch 0 with n bytes of body.
func handshakeDatagram(seq uint64, n int) []byte {
	return append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 0, seq, n), bytes.Repeat([]byte{byte(seq)}, n)...)
}

// One Read gives everything that is queued, in order, as far as whole datagrams fit.
func TestReadMergesDatagrams(t *testing.T) {
	c := silentConn()
	a, b, big := handshakeDatagram(1, 100), handshakeDatagram(2, 200), handshakeDatagram(3, 7000)
	last := handshakeDatagram(4, 1100)
	for _, d := range [][]byte{a, b, big, last} {
		if !c.push(d) {
			t.Fatal("refused")
		}
	}
	buf := make([]byte, maxHandshakeDatagram)
	n, err := c.Read(buf)
	if err != nil || !bytes.Equal(buf[:n], bytes.Join([][]byte{a, b, big}, nil)) {
		t.Fatalf("first read: %d bytes, %v", n, err)
	}
	n, err = c.Read(buf)
	if err != nil || !bytes.Equal(buf[:n], last) {
		t.Fatalf("second read: %d bytes, %v", n, err)
	}
}

// What was pushed is a copy, and what is not a record never reaches pion.
func TestPushCopiesAndFilters(t *testing.T) {
	c := silentConn()
	good := handshakeDatagram(1, 30)
	datagram := append(bytes.Clone(good), "trailing garbage"...)
	if !c.push(datagram) {
		t.Fatal("refused")
	}
	clear(datagram)
	buf := make([]byte, 100)
	if n, err := c.Read(buf); err != nil || !bytes.Equal(buf[:n], good) {
		t.Fatalf("%x, %v", buf[:n], err)
	}
	if c.push([]byte("garbage")) {
		t.Error("garbage was taken")
	}
}

// Crumbs are dear: pion takes a time that grows with the cube of their number.
func TestFragmentsAreBounded(t *testing.T) {
	fragment := func(length, inHere int) []byte {
		f := []byte{16, 0, byte(length >> 8), byte(length), 0, 1, 0, 0, 0, 0, byte(inHere >> 8), byte(inHere)}
		return append(f, make([]byte, inHere)...)
	}
	for name, body := range map[string][]byte{
		"a byte of a message":            fragment(5000, 1),
		"many messages without anything": bytes.Repeat(fragment(0, 0), 40),
		"a header cut short":             {16, 0, 0},
	} {
		c := silentConn()
		buf := make([]byte, maxHandshakeDatagram)
		fragments := 0
		for seq := uint64(0); ; seq++ {
			d := append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 0, seq, len(body)), body...)
			if !c.push(d) {
				break
			}
			fragments += max(len(body)/len(fragment(0, 0)), 1)
			if _, err := c.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
		if fragments == 0 || fragments > maxHandshakeBytes/fragmentCharge {
			t.Errorf("%s: %d fragments in one handshake", name, fragments)
		}
	}
}

// The queue is bounded in datagrams and in bytes, and the handshake in bytes over its life.
func TestPushIsBounded(t *testing.T) {
	buf := make([]byte, maxHandshakeDatagram)
	c := silentConn()
	n := 0
	for c.push(handshakeDatagram(uint64(n), 10)) {
		n++
	}
	if n != maxQueuedDatagrams {
		t.Errorf("%d small datagrams queued", n)
	}
	c = silentConn()
	n = 0
	for c.push(handshakeDatagram(uint64(n), 3000)) {
		n++
	}
	if n != maxQueuedBytes/3013 {
		t.Errorf("%d datagrams of 3 KB queued", n)
	}
	c = silentConn()
	if c.push(handshakeDatagram(1, maxHandshakeDatagram)) {
		t.Error("a datagram that pion cannot read was taken")
	}
	total := 0
	for range 1000 {
		if d := handshakeDatagram(1, 500); c.push(d) {
			total += len(d)
			if _, err := c.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	if total == 0 || total > maxHandshakeBytes {
		t.Errorf("%d bytes went through one handshake", total)
	}
}

func TestReadDeadlineAndClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := silentConn()
		buf := make([]byte, 100)
		read := func() error { _, err := c.Read(buf); return err }

		c.SetReadDeadline(time.Now().Add(time.Second))
		start := time.Now()
		if err := read(); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Second {
			t.Fatalf("deadline ahead: %v after %v", err, time.Since(start))
		}
		c.SetDeadline(time.Unix(0, 1)) // as pion's cancellation does
		if err := read(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("deadline behind: %v", err)
		}
		c.SetReadDeadline(time.Time{})
		c.push(handshakeDatagram(1, 10))
		if err := read(); err != nil {
			t.Fatalf("no deadline: %v", err)
		}

		result := make(chan error, 1)
		go func() { result <- read() }()
		synctest.Wait()
		c.SetReadDeadline(time.Unix(0, 1))
		if err := <-result; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("deadline set during a read: %v", err)
		}
		c.SetReadDeadline(time.Now().Add(time.Hour))
		go func() { result <- read() }()
		synctest.Wait()
		c.Close()
		c.Close()
		if err := <-result; !errors.Is(err, net.ErrClosed) {
			t.Fatalf("closed during a read: %v", err)
		}
		if _, err := c.Write([]byte{1}); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("write: %v", err)
		}
		if c.push(handshakeDatagram(1, 10)) {
			t.Fatal("push after Close")
		}
	})
}

// noSessions is a session store that knows none: it makes a pion client ask for
// resumption, and a pion server send session IDs.
type noSessions struct{}

func (noSessions) Set([]byte, dtls.Session) error         { return nil }
func (noSessions) Get([]byte) (s dtls.Session, err error) { return s, nil }
func (noSessions) Del([]byte) error                       { return nil }

// The hazard: a server with session IDs whose flight takes several datagrams. A pion client with
// a session store that reads them one at a time never finishes; wholeFlights
// brings it through, also when one of the datagrams is lost.
func TestWholeFlightsForAResumingClient(t *testing.T) {
	noLeaks(t)
	run := func(t *testing.T, whole bool, lose int) error {
		c, _ := testHandshaker(t)
		s, _ := testHandshaker(t)
		var mu sync.Mutex
		fromServer := 0
		var pushes sync.WaitGroup
		var w *wire
		w = newWire(func(fromClient bool, d []byte) [][]byte {
			mu.Lock()
			defer mu.Unlock()
			if fromClient {
				return [][]byte{d}
			}
			if fromServer++; fromServer == lose {
				return nil
			}
			n := fromServer
			pushes.Go(func() { // one read each, unless they are kept together
				time.Sleep(time.Duration(n) * 3 * time.Millisecond)
				w.client.push(d)
			})
			return nil
		})
		w.client.wholeFlights = whole
		patience := time.Second // without whole flights it is in vain
		if whole {
			patience = 20 * time.Second
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			config := s.config(&attempt{verify: anyKey}, s.suites)
			config.SessionStore = noSessions{}
			config.MTU = 150 // ServerHello and ServerHelloDone are datagrams apart
			config.ClientAuth = dtls.NoClientCert
			if conn, err := dtls.ServerWithContext(ctx, w.server, config); err == nil {
				<-ctx.Done()
				w.server.mute()
				conn.Close()
			}
		})
		config := c.config(&attempt{verify: anyKey}, c.suites)
		config.SessionStore = noSessions{}
		config.GetClientCertificate = nil
		config.Certificates = []tls.Certificate{}
		conn, err := dtls.ClientWithContext(ctx, w.client, config)
		if err == nil {
			w.client.mute()
			conn.Close()
			cancel()
		}
		wg.Wait()
		pushes.Wait()
		return err
	}
	if err := run(t, false, 0); err == nil {
		t.Error("pion copes with a flight in pieces by now: wholeFlights can go")
	}
	for lose := range 6 {
		if err := run(t, true, lose); err != nil {
			t.Errorf("datagram %d lost: %v", lose, err)
		}
	}
}

func TestPartOfServerFlight(t *testing.T) {
	record := func(fragments ...[]byte) []byte {
		body := bytes.Join(fragments, nil)
		return append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 0, 1, len(body)), body...)
	}
	fragment := func(typ handshakeType, seq, length, offset, n int) []byte {
		return append([]byte{byte(typ), 0, 0, byte(length), 0, byte(seq), 0, 0, byte(offset), 0, 0, byte(n)}, make([]byte, n)...)
	}
	hello, done := fragment(typeServerHello, 1, 40, 0, 40), fragment(typeServerHelloDone, 3, 0, 0, 0)
	certificate := fragment(11, 2, 50, 0, 50)
	first, second := fragment(11, 2, 50, 0, 30), fragment(11, 2, 50, 30, 20)
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, c := range []struct {
		name    string
		records []byte
		want    bool
	}{
		{"nothing", nil, false},
		{"HelloVerifyRequest", record(fragment(typeHelloVerifyRequest, 0, 23, 0, 23)), false},
		{"ServerHello alone", record(hello), true},
		{"end alone", record(done), true},
		{"whole in one record", record(hello, certificate, done), false},
		{"whole in three", join(record(hello), record(certificate), record(done)), false},
		{"out of order", join(record(done), record(certificate), record(hello)), false},
		{"middle missing", join(record(hello), record(done)), true},
		{"fragment missing", join(record(hello), record(first), record(done)), true},
		{"fragments", join(record(hello), record(first), record(second), record(done)), false},
		{"fragments overlap", join(record(hello), record(first), record(fragment(11, 2, 50, 20, 30)), record(done)), false},
		{"resumption", join(record(hello), append(appendRecordHeader(nil, contentChangeCipherSpec, versionDTLS12, 0, 2, 1), 1)), false},
		{"alert", join(record(hello), plainAlert(alert{2, 40}, 9)), false},
	} {
		if got := partOfServerFlight(c.records); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

// FuzzPush: whatever comes, the queue holds whole records only, within its bounds.
func FuzzPush(f *testing.F) {
	f.Add(handshakeDatagram(1, 30))
	f.Add(append(handshakeDatagram(1, 30), plainAlert(alert{2, 40}, 2)...))
	f.Add([]byte{20, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 3, 0, 1, 1, 0xff})
	f.Fuzz(func(t *testing.T, datagram []byte) {
		c := silentConn()
		c.wholeFlights = true
		taken := c.push(datagram)
		c.push(datagram)
		if taken != (len(c.queue) > 0) {
			t.Fatalf("taken %v, %d bytes queued", taken, len(c.queue))
		}
		if len(c.queue) > maxQueuedBytes || len(c.ends) > maxQueuedDatagrams {
			t.Fatalf("%d bytes in %d datagrams", len(c.queue), len(c.ends))
		}
		for rest := c.queue; len(rest) > 0; {
			hdr, record, next, ok := nextRecord(rest)
			if !ok || len(record) == recordHeaderSize || hdr.epoch > dataEpoch {
				t.Fatalf("queued: %x", rest)
			}
			rest = next
		}
		c.needsMore()
	})
}
