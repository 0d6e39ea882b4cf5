package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/penstock-vpn/penstock/transport"
)

// These tests put sockets of the system on both sides of a relay. What it is like
// with the VPN on one side is in ports_test.go.

const patience = 30 * time.Second // for what should take milliseconds

func testRelay(t *testing.T, network, to string, limits relayLimits) *Relay {
	t.Helper()
	return testRelayDial(t, network, to, limits, func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, to)
	})
}

func testRelayDial(t *testing.T, network, to string, limits relayLimits, dial func(context.Context) (net.Conn, error)) *Relay {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	r := newRelay("forward", network, to, limits, slog.New(slog.DiscardHandler), dial)
	if network == "tcp" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		r.serveTCP(l)
	} else {
		s, err := transport.ListenUDP(netip.MustParseAddrPort("0.0.0.0:0"), transport.SocketOptions{MayFragment: true})
		if err != nil {
			t.Fatal(err)
		}
		r.serveUDP(newSystemFront(s))
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return r
}

// testService accepts TCP connections and gives each to serve, until the test
// ends.
func testService(t *testing.T, serve func(c *net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); serving.Wait() })
	return l.Addr().String()
}

func echo(c *net.TCPConn) {
	io.Copy(c, c)
	c.CloseWrite()
}

func dialTCP(t *testing.T, r *Relay) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", r.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// outcome is how a connection ends that sends nothing. A reset can be so prompt that
// already connect tells it.
func outcome(r *Relay) error {
	c, err := net.Dial("tcp", r.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = io.ReadAll(c)
	return err
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

func TestRelayTCP(t *testing.T) {
	r := testRelay(t, "tcp", testService(t, echo), defaultLimits)
	for _, size := range []int{0, 1, 1000, 128 << 10, 5<<20 + 7} {
		c := dialTCP(t, r)
		sent := randomBytes(size)
		go func() {
			c.Write(sent)
			c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes came back as %d others", size, len(got))
		}
	}
	s := waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 0 })
	const all = 0 + 1 + 1000 + 128<<10 + 5<<20 + 7
	if s.Total != 5 || s.OutboundBytes != all || s.InboundBytes != all || s.Failed != 0 || s.Refused != 0 {
		t.Errorf("status %+v, want 5 flows with %d bytes each way", s, all)
	}
}

func waitStatus(t *testing.T, r *Relay, ok func(RelayStatus) bool) RelayStatus {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		s := r.Status()
		if ok(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("status stays at %+v", s)
		}
	}
}

// TestRelayHalfClose: each half of a connection ends by itself, whichever is
// first.
func TestRelayHalfClose(t *testing.T) {
	t.Run("client first", func(t *testing.T) {
		r := testRelay(t, "tcp", testService(t, func(c *net.TCPConn) {
			n, _ := io.Copy(io.Discard, c) // to the end, before the answer begins
			c.Write(bytes.Repeat([]byte("y"), int(n)))
		}), defaultLimits)
		c := dialTCP(t, r)
		c.Write([]byte("question"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || len(got) != len("question") {
			t.Errorf("after the client's half had ended, %d bytes came, %v", len(got), err)
		}
	})
	t.Run("service first", func(t *testing.T) {
		received := make(chan string, 1)
		r := testRelay(t, "tcp", testService(t, func(c *net.TCPConn) {
			c.Write([]byte("greeting"))
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			received <- string(b)
		}), defaultLimits)
		c := dialTCP(t, r)
		if got, err := io.ReadAll(c); err != nil || string(got) != "greeting" {
			t.Fatalf("got %q, %v", got, err)
		}
		c.Write([]byte("a late question"))
		c.CloseWrite()
		if got := <-received; got != "a late question" {
			t.Errorf("after the service's half had ended, it received %q", got)
		}
	})
}

// TestRelayReset: a reset is no end. Whoever reads knows that something is missing.
func TestRelayReset(t *testing.T) {
	r := testRelay(t, "tcp", testService(t, func(c *net.TCPConn) {
		c.Write([]byte("half of the"))
		c.Read(make([]byte, 1)) // the client has it
		c.SetLinger(0)
	}), defaultLimits)
	c := dialTCP(t, r)
	if _, err := io.ReadFull(c, make([]byte, len("half of the"))); err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("x"))
	if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the service's reset arrived as %v", err)
	}
	waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 0 })
}

// TestRelayClientResets: the service hears of a client that gives up.
func TestRelayClientResets(t *testing.T) {
	heard := make(chan error, 1)
	r := testRelay(t, "tcp", testService(t, func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		heard <- err
	}), defaultLimits)
	c := dialTCP(t, r)
	c.Write([]byte("x"))
	waitStatus(t, r, func(s RelayStatus) bool { return s.OutboundBytes == 1 })
	c.SetLinger(0)
	c.Close()
	if err := <-heard; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's reset arrived as %v", err)
	}
}

// TestRelayRefused: nobody listens at the service.
func TestRelayRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	l.Close()
	r := testRelay(t, "tcp", nobody, defaultLimits)
	began := time.Now()
	if err := outcome(r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	// At once, and not when dialling would have timed out.
	if took := time.Since(began); took > defaultLimits.dialTimeout/2 {
		t.Errorf("the reset took %v", took)
	}
	if s := waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 0 }); s.Failed != 1 || s.LastError == "" {
		t.Errorf("status %+v, want one failure and its reason", s)
	}
}

// TestRelayFull: the new are refused, the old go on.
func TestRelayFull(t *testing.T) {
	limits := defaultLimits
	limits.flows = 2
	r := testRelay(t, "tcp", testService(t, echo), limits)
	old := []*net.TCPConn{dialTCP(t, r), dialTCP(t, r)}
	waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 2 })
	if err := outcome(r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one too many got %v, want a reset", err)
	}
	for _, c := range old {
		c.Write([]byte("still here"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != "still here" {
			t.Errorf("an old connection got %q, %v", got, err)
		}
	}
	waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 0 && s.Refused == 1 && s.Total == 2 })
	c := dialTCP(t, r)
	c.CloseWrite()
	if _, err := io.ReadAll(c); err != nil {
		t.Errorf("when there was room again: %v", err)
	}
}

// TestRelay200: many at once, each with its own data.
func TestRelay200(t *testing.T) {
	r := testRelay(t, "tcp", testService(t, echo), defaultLimits)
	var clients sync.WaitGroup
	for range 200 {
		clients.Go(func() {
			c, err := net.Dial("tcp", r.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			sent := randomBytes(20 << 10)
			c.Write(sent)
			c.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("sent %d bytes, got %d, %v", len(sent), len(got), err)
			}
		})
	}
	clients.Wait()
	waitStatus(t, r, func(s RelayStatus) bool { return s.Total == 200 && s.Open == 0 && s.OutboundBytes == 200*20<<10 })
}

// TestRelayClose: connections that are idle, that move data and that wait for the
// service end with the relay, by a reset. The cleanup looks for leaks.
func TestRelayClose(t *testing.T) {
	dialling := make(chan struct{}, 1)
	to := testService(t, func(c *net.TCPConn) { io.Copy(c, c) })
	n := 0
	r := testRelayDial(t, "tcp", to, defaultLimits, func(ctx context.Context) (net.Conn, error) {
		if n++; n == 3 {
			dialling <- struct{}{}
			<-ctx.Done() // a service that never answers
			return nil, ctx.Err()
		}
		return new(net.Dialer).DialContext(ctx, "tcp", to)
	})
	idle := dialTCP(t, r)
	waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 1 })
	busy := dialTCP(t, r)
	var writing sync.WaitGroup
	writing.Go(func() { // never reads: every buffer on the way is full in the end
		for {
			if _, err := busy.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	waitStatus(t, r, func(s RelayStatus) bool { return s.InboundBytes > 1<<20 })
	waiting := dialTCP(t, r)
	<-dialling
	began := time.Now()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > defaultLimits.closing/2 {
		t.Errorf("Close took %v", took)
	}
	writing.Wait()
	for name, c := range map[string]*net.TCPConn{"idle": idle, "waiting": waiting} {
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the %s connection ended with %v, want a reset", name, err)
		}
	}
	if _, err := net.Dial("tcp", r.Addr().String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Close: %v", err)
	}
	if s := r.Status(); s.Open != 0 || s.Failed != 0 {
		t.Errorf("status %+v after Close; closing is no failure of the service", s)
	}
}

// TestRelayIdleMemory: a connection that moves nothing holds no buffer, even when
// it has moved a lot before.
func TestRelayIdleMemory(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a connection holds its block there: see splice_other.go")
	}
	r := testRelay(t, "tcp", testService(t, func(c *net.TCPConn) {
		buf := make([]byte, 4<<10)
		io.CopyBuffer(struct{ io.Writer }{c}, struct{ io.Reader }{c}, buf)
	}), defaultLimits)
	before := heap()
	const flows = 100
	sent, got := make([]byte, 256<<10), make([]byte, 256<<10)
	for range flows {
		c := dialTCP(t, r)
		go c.Write(sent)
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatal(err)
		}
	}
	waitStatus(t, r, func(s RelayStatus) bool { return s.Open == flows && s.InboundBytes == flows*256<<10 })
	each := (heap() - before) / flows
	t.Logf("%d bytes of heap for each idle connection, the client's and the service's ends included", each)
	if each > 24<<10 {
		t.Errorf("an idle connection takes %d bytes of heap", each)
	}
}

// heap is what is in use after a collection that empties pools too.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
