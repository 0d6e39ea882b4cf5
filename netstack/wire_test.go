package netstack_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/vpntest"
	"github.com/penstock-vpn/penstock/transport"
)

// badWire loses one datagram in a hundred, delivers one in twenty late and one in fifty twice,
// and has a round trip of 50 ms.
var badWire = vpntest.Wire{
	Latency: 25 * time.Millisecond, Jitter: 2 * time.Millisecond,
	Loss: 0.01, Reorder: 0.05, Duplicate: 0.02, Seed: 1,
}

// A stream is a file to be carried: random bytes from a seed, and their sum.
type stream struct {
	size int
	seed byte
}

func (s stream) reader() io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{s.seed}), int64(s.size))
}

func (s stream) sum() (sum [32]byte) {
	h := sha256.New()
	io.Copy(h, s.reader())
	return [32]byte(h.Sum(nil))
}

// sendStream writes s and ends the outbound half.
func sendStream(c net.Conn, s stream) error {
	if _, err := io.Copy(c, s.reader()); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return c.(*netstack.TCPConn).CloseWrite()
}

// receiveStream reads to the end and compares the SHA-256.
func receiveStream(c net.Conn, s stream) error {
	h := sha256.New()
	n, err := io.Copy(h, c)
	switch {
	case err != nil:
		return fmt.Errorf("receive: %w after %d of %d bytes", err, n, s.size)
	case [32]byte(h.Sum(nil)) != s.sum():
		return fmt.Errorf("%d bytes with another SHA-256 arrived, want %d", n, s.size)
	}
	return nil
}

// bothWays carries a file each way over one connection from a to b at host.
func bothWays(a, b *netstack.Node, host string, size int, limit time.Duration) error {
	l, err := b.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return err
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	there, back := stream{size, 1}, stream{size, 2}
	end := func(c net.Conn, out, in stream) error {
		defer c.Close()
		deadline, _ := ctx.Deadline()
		c.SetDeadline(deadline)
		sent := make(chan error, 1)
		go func() { sent <- sendStream(c, out) }()
		return errors.Join(receiveStream(c, in), <-sent)
	}
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		served <- end(c, back, there)
	}()
	c, err := a.Dial(ctx, "tcp", l.Addr().String())
	if err != nil {
		l.Close()
		return errors.Join(err, <-served)
	}
	return errors.Join(end(c, there, back), <-served)
}

// TCP arrives whole over a bad wire, both ways, for IPv4 and IPv6.
func TestBadWireTCP(t *testing.T) {
	a, b := vpntest.Pair(t, badWire)
	var wg sync.WaitGroup
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		wg.Go(func() {
			if err := bothWays(a, b, host, 300<<10, time.Minute); err != nil {
				t.Errorf("%s: %v", host, err)
			}
		})
	}
	wg.Wait()
	if s := a.Status().Tunnel; s.Drops[transport.DropReplay.String()] == 0 {
		t.Errorf("no duplicate was dropped; the wire is not bad: %v", s.Drops)
	}
}

// Transfers survive rekeying and roaming to a new address, over a bad wire.
func TestBadWireRekeyAndRoam(t *testing.T) {
	nw := vpntest.NewNetwork(t, badWire)
	a, b := vpntest.Pair(t, nw, vpntest.Configure(func(_ int, c *netstack.Config) {
		c.Timing = netstack.Timing{
			RekeyAfter: 500 * time.Millisecond, DPD: 200 * time.Millisecond,
			HandshakeRetry: 100 * time.Millisecond, HandshakeRetryMax: 200 * time.Millisecond,
			FlightInterval: 100 * time.Millisecond, HandshakeTimeout: time.Second,
		}
	}))
	stop := make(chan struct{})
	var roaming sync.WaitGroup
	roaming.Go(func() {
		for i := range 100 {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				nw.Rebind([]*netstack.Node{a, b}[i%2])
			}
		}
	})
	var p transport.PeerStatus
	for range 10 { // until it has seen enough: how long a transfer takes is up to chance
		for _, host := range []string{"10.66.0.2", "fd66::2"} {
			if err := bothWays(a, b, host, 150<<10, time.Minute); err != nil {
				t.Errorf("%s: %v", host, err)
			}
		}
		if p = b.Status().Tunnel.Peers[0]; p.Handshakes >= 3 && p.Roamings > 0 || t.Failed() {
			break
		}
	}
	close(stop)
	roaming.Wait()
	if p.Handshakes < 3 || p.Roamings == 0 {
		t.Errorf("%d handshakes, %d roamings: the test did not do what it says", p.Handshakes, p.Roamings)
	}
}

// UDP over a bad wire: nothing arrives twice or changed, and about as much is lost as the wire
// loses.
func TestBadWireUDP(t *testing.T) {
	w := badWire
	w.Latency = 5 * time.Millisecond
	a, b := vpntest.Pair(t, w)
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		s, err := b.ListenPacket("udp", net.JoinHostPort(host, "0"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := a.Dial(t.Context(), "udp", s.LocalAddr().String())
		if err != nil {
			t.Fatal(err)
		}
		const count = 2000
		datagram := func(i int) []byte {
			d := bytes.Repeat([]byte{byte(i)}, 4+i%1300)
			binary.BigEndian.PutUint32(d, uint32(i))
			return d
		}
		for i := range count {
			if _, err := c.Write(datagram(i)); err != nil {
				t.Fatal(err)
			}
		}
		seen := map[uint32]bool{}
		buf := make([]byte, 2000)
		for {
			s.SetReadDeadline(time.Now().Add(time.Second)) // of silence
			n, _, err := s.ReadFrom(buf)
			if err != nil {
				break
			}
			i := binary.BigEndian.Uint32(buf)
			if !bytes.Equal(buf[:n], datagram(int(i))) {
				t.Fatalf("datagram %d changed on the way", i)
			}
			if seen[i] {
				t.Errorf("datagram %d arrived twice", i)
			}
			seen[i] = true
		}
		if lost := count - len(seen); lost == 0 || lost > count/20 {
			t.Errorf("%s: %d of %d lost at 1 %%", host, lost, count)
		}
		c.Close()
		s.Close()
	}
}

// A node that is started anew, with the same key and another UDP address, is reached again; its
// old connections are reset.
func TestRestart(t *testing.T) {
	nw := vpntest.NewNetwork(t, vpntest.Wire{Latency: time.Millisecond})
	var config netstack.Config // of a
	a, b := vpntest.Pair(t, nw, vpntest.Configure(func(i int, c *netstack.Config) {
		c.Timing = netstack.Timing{HandshakeRetry: 50 * time.Millisecond, FlightInterval: 50 * time.Millisecond}
		if i == 0 {
			config = *c
		}
	}))
	l, err := b.Listen("tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	old, err := a.Dial(t.Context(), "tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer served.Close()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	config.Conns = []transport.PacketConn{nw.Listen()}
	a, err = netstack.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		if err := bothWays(a, b, host, 100<<10, time.Minute); err != nil {
			t.Errorf("after the restart: %v", err)
		}
	}
	served.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := served.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the old connection reads %v, want a reset", err)
	}
}

func TestManyConnections(t *testing.T) {
	a, b := vpntest.Pair(t, vpntest.Wire{Latency: time.Millisecond})
	l, err := b.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	const count = 300
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			host := []string{"10.66.0.2", "fd66::2"}[i%2]
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			c, err := a.Dial(ctx, "tcp", net.JoinHostPort(host, "7"))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			s := stream{1000 + 100*i, byte(i)}
			go sendStream(c, s)
			if err := receiveStream(c, s); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := a.Status().TCP.ActiveOpens; n != count {
		t.Errorf("%d connections opened, want %d", n, count)
	}
}

// The stack follows the path: packets get smaller when the path carries less, for new and for open
// connections.
func TestPathMTU(t *testing.T) {
	nw := vpntest.NewNetwork(t, vpntest.Wire{Latency: time.Millisecond, MTU: 1500})
	a, b := vpntest.Pair(t, nw, vpntest.Configure(func(_ int, c *netstack.Config) {
		c.Timing.DPD = 200 * time.Millisecond // silence that long makes a node look at the path
	}))
	full := a.Status().MTU
	if full != transport.DefaultInnerMTU {
		t.Errorf("MTU %d on a path of 1500", full)
	}
	if err := bothWays(a, b, "10.66.0.2", 1<<20, time.Minute); err != nil {
		t.Error(err)
	}
	w := nw.Wire()
	w.MTU = 1360
	nw.SetWire(w)
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		if err := bothWays(a, b, host, 1<<20, time.Minute); err != nil {
			t.Errorf("%s on a path of 1360: %v", host, err)
		}
	}
	if mtu := a.Status().MTU; mtu >= 1360-28 || mtu < 1280 {
		t.Errorf("MTU %d on a path of 1360", mtu)
	}
}
