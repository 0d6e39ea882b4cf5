package netstack

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Close wakes everything that waits, with net.ErrClosed, and later calls give the same.
func TestNodeClose(t *testing.T) {
	a, b := pair(t, func(ca, _ *Config) {
		ca.Peers = []Peer{{PublicKey: newKey(t).Public(), AllowedIPs: prefixes("10.66.9.0/24")}}
	})
	ca, cb := connect(t, a, b, ":0")
	l, err := a.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	waiting := func(what string, f func() error) {
		wg.Go(func() {
			if err := f(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s during the node's Close: %v", what, err)
			}
		})
	}
	waiting("Read", func() error { _, err := ca.Read(make([]byte, 1)); return err })
	waiting("Accept", func() error { _, err := l.Accept(); return err })
	waiting("ReadFrom", func() error { _, _, err := p.ReadFrom(make([]byte, 1)); return err })
	waiting("Dial", func() error {
		// The address is a peer's, but nobody answers there.
		c, err := a.Dial(t.Context(), "tcp", "10.66.9.9:80")
		if err == nil {
			c.Close()
		}
		return err
	})
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	if err := a.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	wg.Wait()
	if d := time.Since(begin); d > patience/3 {
		t.Errorf("Close took %v", d)
	}
	_, err = ca.Write([]byte("x"))
	_, derr := a.Dial(t.Context(), "tcp", "10.66.0.2:80")
	_, lerr := a.Listen("tcp", ":0")
	_, perr := a.ListenPacket("udp", ":0")
	for what, err := range map[string]error{
		"Write": err, "Dial": derr, "Listen": lerr, "ListenPacket": perr,
		"AddPeer":         a.AddPeer(Peer{PublicKey: newKey(t).Public()}),
		"WaitEstablished": a.WaitEstablished(t.Context(), b.PublicKey()),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after the node's Close: %v", what, err)
		}
	}
	// The peer hears of it by a reset and does not wait.
	cb.SetReadDeadline(time.Now().Add(patience))
	if _, err := cb.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the peer's Read: %v, want a reset", err)
	} else if ne, ok := err.(net.Error); ok && ne.Timeout() {
		t.Error("the peer was not told")
	}
}

// What was written before a connection's Close arrives, although the node closes at once.
func TestNodeCloseDeliversWritten(t *testing.T) {
	a, b := pair(t, nil)
	ca, cb := connect(t, a, b, ":0")
	sent := make([]byte, 3<<20)
	rand.Read(sent)
	var got []byte
	var err error
	var wg sync.WaitGroup
	wg.Go(func() { got, err = io.ReadAll(cb) })
	if _, err := ca.Write(sent); err != nil {
		t.Fatal(err)
	}
	ca.Close()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes, %v", len(got), len(sent), err)
	}
}

func TestCloseDuringTransfer(t *testing.T) {
	for range 3 {
		a, b := pair(t, nil)
		var wg sync.WaitGroup
		for range 4 {
			ca, cb := connect(t, a, b, ":0")
			wg.Go(func() { io.Copy(io.Discard, cb) })
			wg.Go(func() {
				buf := make([]byte, 64<<10)
				for {
					if _, err := ca.Write(buf); err != nil {
						return
					}
				}
			})
		}
		time.Sleep(30 * time.Millisecond)
		wg.Go(func() { b.Close() })
		a.Close()
		wg.Wait()
	}
}

// New frees what it has made, and closes the sockets that were given, when it fails.
func TestNewFails(t *testing.T) {
	taken := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/32"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
	})
	_, err := New(Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/32"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0"), taken.LocalAddrs()[0]},
	})
	if err == nil {
		t.Error("a port in use was listened on")
	}
}
