package control

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/vpntest"
)

// TestStream: a connection through the control socket is one of the VPN, with both halves.
func TestStream(t *testing.T) {
	folder(t)
	a, b := vpntest.Pair(t)
	l, err := Listen(Path("x.toml"))
	if err != nil {
		t.Fatal(err)
	}
	stop := Serve(l, func() Report { return Report{} }, a)
	inside, err := b.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	to := net.JoinHostPort(b.Addresses()[0].Addr().String(), "7")
	path := Path("x.toml")

	// The far side answers only when our half has ended.
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	go func() {
		c, err := inside.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c)
		c.Write(b)
	}()
	s, err := Dial(t.Context(), path, to)
	if err != nil {
		t.Fatal(err)
	}
	go func() { s.Write(sent); s.CloseWrite() }()
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back as %d, %v", len(sent), len(got), err)
	}
	s.Close()

	if _, err := Dial(t.Context(), path, net.JoinHostPort(b.Addresses()[0].Addr().String(), "9")); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("nobody listens: %v", err)
	}
	r, err := Ping(t.Context(), path, PingRequest{Host: b.Addresses()[0].Addr().String(), Network: "ip", Size: 100, Sequence: 3, Timeout: 5 * time.Second})
	if err != nil || r.Size != 108 || r.RTT <= 0 {
		t.Errorf("ping: %+v, %v", r, err)
	}

	// A stream that is open ends with the server, which does not wait for it.
	if s, err = Dial(t.Context(), path, to); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	began := time.Now()
	stop()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stop took %v", took)
	}
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := s.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("the stream goes on: %v", err)
	}
	if _, err := Dial(t.Context(), path, to); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after stop: %v", err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}
