package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// The conformance tests of the net package's own authors, over two nodes.
func TestConformanceTCP(t *testing.T) {
	a, b := pair(t, nil)
	for _, addr := range []string{"10.66.0.2:0", "[fd66::2]:0"} {
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			l, err := b.Listen("tcp", addr)
			if err != nil {
				return nil, nil, nil, err
			}
			defer l.Close()
			c1, err = a.Dial(context.Background(), "tcp", l.Addr().String())
			if err != nil {
				return nil, nil, nil, err
			}
			c2, err = l.Accept()
			return c1, c2, func() { c1.Close(); c2.Close() }, err
		})
	}
}

// connect gives a TCP connection from a to b.
func connect(t testing.TB, a, b *Node, addr string) (ca, cb *TCPConn) {
	t.Helper()
	l, err := b.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := l.Addr().(*net.TCPAddr)
	if to.IP.IsUnspecified() {
		to.IP = b.Addresses()[0].Addr().AsSlice()
	}
	c, err := a.Dial(within(t, patience), "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return c.(*TCPConn), s.(*TCPConn)
}

func TestHalfClose(t *testing.T) {
	a, b := pair(t, nil)
	ca, cb := connect(t, a, b, ":0")
	request, answer := make([]byte, 1<<20), make([]byte, 2<<20)
	rand.Read(request)
	rand.Read(answer)
	var got []byte
	var wg sync.WaitGroup
	wg.Go(func() {
		got, _ = io.ReadAll(cb) // ends with a's CloseWrite
		cb.Write(answer)        // the other half is open
		cb.CloseWrite()
	})
	if _, err := ca.Write(request); err != nil {
		t.Fatal(err)
	}
	if err := ca.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write after CloseWrite: %v, want EPIPE", err)
	}
	back, err := io.ReadAll(ca)
	wg.Wait()
	if err != nil || !bytes.Equal(got, request) || !bytes.Equal(back, answer) {
		t.Errorf("%v, request %d of %d bytes, answer %d of %d", err, len(got), len(request), len(back), len(answer))
	}

	ca, cb = connect(t, a, b, ":0")
	if err := cb.CloseRead(); err != nil {
		t.Errorf("CloseRead: %v", err)
	}
	if n, err := cb.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read after CloseRead: %d, %v", n, err)
	}
	if _, err := cb.Write([]byte("still open")); err != nil {
		t.Errorf("Write after CloseRead: %v", err)
	}
	if n, err := ca.Read(make([]byte, 20)); n != 10 || err != nil {
		t.Errorf("then Read: %d, %v", n, err)
	}
}

func TestErrors(t *testing.T) {
	a, b := pair(t, nil)
	ctx := within(t, patience)

	wantErrno := func(what string, err error, want error) {
		t.Helper()
		var op *net.OpError
		if !errors.Is(err, want) || !errors.As(err, &op) {
			t.Errorf("%s: %v, want a net.OpError with %v", what, err, want)
		}
	}
	for _, to := range []string{"10.66.0.2:9", "[fd66::2]:9"} {
		_, err := a.Dial(ctx, "tcp", to)
		wantErrno("TCP to a closed port", err, syscall.ECONNREFUSED)

		u, err := a.Dial(ctx, "udp", to)
		if err != nil {
			t.Fatal(err)
		}
		u.Write([]byte("x"))
		u.SetReadDeadline(time.Now().Add(patience))
		_, err = u.Read(make([]byte, 10))
		wantErrno("UDP to a closed port", err, syscall.ECONNREFUSED)
		u.Close()
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, to := range []string{"10.66.0.77:80", "192.0.2.1:80", "[fd66::77]:80", "224.0.0.1:80", "127.0.0.1:80", "[::1]:80"} {
			_, err := a.Dial(ctx, network, to)
			wantErrno(network+" to "+to, err, syscall.ENETUNREACH)
		}
	}
	p, err := a.ListenPacket("udp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	_, err = p.WriteTo([]byte("x"), &net.UDPAddr{IP: net.IPv4(10, 66, 0, 77), Port: 5})
	wantErrno("WriteTo beyond the peers", err, syscall.ENETUNREACH)
	_, err = p.WriteTo(make([]byte, 65508), net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.66.0.2:5")))
	wantErrno("WriteTo of too much", err, syscall.EMSGSIZE)
	_, err = p.(*UDPConn).Write([]byte("x"))
	wantErrno("Write without a destination", err, syscall.EDESTADDRREQ)

	_, err = a.Listen("tcp", "10.66.0.2:80")
	wantErrno("Listen on another's address", err, syscall.EADDRNOTAVAIL)
	l, err := a.Listen("tcp", "10.66.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.Listen("tcp", "10.66.0.1:80")
	wantErrno("Listen twice", err, syscall.EADDRINUSE)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	wantErrno("second Close", l.Close(), net.ErrClosed)
	_, err = l.Accept()
	wantErrno("Accept after Close", err, net.ErrClosed)

	for _, network := range []string{"tcp5", "udp7", "ip", "unix", ""} {
		var unknown net.UnknownNetworkError
		if _, err := a.Dial(ctx, network, "10.66.0.2:80"); !errors.As(err, &unknown) {
			t.Errorf("Dial %q: %v", network, err)
		}
		if _, err := a.Listen(network, ":0"); !errors.As(err, &unknown) {
			t.Errorf("Listen %q: %v", network, err)
		}
		if _, err := a.ListenPacket(network, ":0"); !errors.As(err, &unknown) {
			t.Errorf("ListenPacket %q: %v", network, err)
		}
	}
	for network, to := range map[string]string{"tcp4": "[fd66::2]:80", "tcp6": "10.66.0.2:80", "udp6": "10.66.0.2:80"} {
		var addrErr *net.AddrError
		if _, err := a.Dial(ctx, network, to); !errors.As(err, &addrErr) {
			t.Errorf("Dial %s %s: %v", network, to, err)
		}
	}
	_ = b
}

func TestClosedAndDeadlines(t *testing.T) {
	a, b := pair(t, nil)
	ca, cb := connect(t, a, b, ":0")
	ua, err := a.Dial(within(t, time.Second), "udp", "10.66.0.2:99")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{ca, ua} {
		c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
		_, err := c.Read(make([]byte, 10))
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%T: %v, want a timeout", c, err)
		}
		c.SetReadDeadline(time.Time{})

		done := make(chan error)
		go func() { _, err := c.Read(make([]byte, 10)); done <- err }()
		time.Sleep(10 * time.Millisecond)
		if err := c.Close(); err != nil {
			t.Errorf("%T: Close: %v", c, err)
		}
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%T: Read during Close: %v", c, err)
		}
		_, rerr := c.Read(make([]byte, 10))
		_, werr := c.Write([]byte("x"))
		for what, err := range map[string]error{
			"Read": rerr, "Write": werr, "Close": c.Close(), "SetDeadline": c.SetDeadline(time.Now()),
		} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%T: %s after Close: %v", c, what, err)
			}
		}
		if c.LocalAddr() == nil || c.RemoteAddr() == nil {
			t.Errorf("%T: no addresses after Close", c)
		}
	}
	// The other side of a Close reads EOF; of a reset, ECONNRESET.
	if _, err := cb.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("Read after the peer's Close: %v", err)
	}
	ca, cb = connect(t, a, b, ":0")
	ca.SetLinger(0)
	ca.Close()
	if _, err := cb.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after the peer's reset: %v", err)
	}
}

func TestListenForms(t *testing.T) {
	a, b := pair(t, nil)
	for _, c := range []struct {
		network, listen string
		reach           []string
		refused         []string
	}{
		{"tcp", ":80", []string{"10.66.0.2", "fd66::2"}, nil},
		{"tcp", "0.0.0.0:80", []string{"10.66.0.2"}, []string{"fd66::2"}},
		{"tcp", "[::]:80", []string{"10.66.0.2", "fd66::2"}, nil},
		{"tcp4", ":80", []string{"10.66.0.2"}, []string{"fd66::2"}},
		{"tcp6", ":80", []string{"fd66::2"}, []string{"10.66.0.2"}},
		{"tcp", "10.66.0.2:http", []string{"10.66.0.2"}, []string{"fd66::2"}},
		{"tcp6", "[fd66::2]:80", []string{"fd66::2"}, []string{"10.66.0.2"}},
	} {
		l, err := b.Listen(c.network, c.listen)
		if err != nil {
			t.Errorf("%s %s: %v", c.network, c.listen, err)
			continue
		}
		for _, host := range c.reach {
			conn, err := a.Dial(within(t, patience), "tcp", net.JoinHostPort(host, "80"))
			if err != nil {
				t.Errorf("%s %s: %v", c.network, c.listen, err)
				continue
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			if got := s.LocalAddr().String(); got != net.JoinHostPort(host, "80") || got != conn.RemoteAddr().String() {
				t.Errorf("%s %s: accepted at %s, dialled %s", c.network, c.listen, got, conn.RemoteAddr())
			}
			if s.RemoteAddr().String() != conn.LocalAddr().String() {
				t.Errorf("remote %s, local %s", s.RemoteAddr(), conn.LocalAddr())
			}
			conn.Close()
			s.Close()
		}
		for _, host := range c.refused {
			if _, err := a.Dial(within(t, patience), "tcp", net.JoinHostPort(host, "80")); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s %s: %s: %v, want ECONNREFUSED", c.network, c.listen, host, err)
			}
		}
		l.Close()
	}
}

func TestUDP(t *testing.T) {
	a, b := pair(t, nil)
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		for _, listen := range []string{net.JoinHostPort(host, "0"), ":0"} {
			s, err := b.ListenPacket("udp", listen)
			if err != nil {
				t.Fatal(err)
			}
			_, port, _ := net.SplitHostPort(s.LocalAddr().String())
			c, err := a.Dial(within(t, time.Second), "udp", net.JoinHostPort(host, port))
			if err != nil {
				t.Fatal(err)
			}
			for _, size := range []int{0, 1, 1200, 1372, 1373, 5000, 65000} { // above 1,372 in fragments
				sent := make([]byte, size)
				rand.Read(sent)
				if n, err := c.Write(sent); n != size || err != nil {
					t.Fatalf("%s: Write of %d: %d, %v", host, size, n, err)
				}
				buf := make([]byte, 65536)
				s.SetReadDeadline(time.Now().Add(patience))
				n, from, err := s.ReadFrom(buf)
				if err != nil || !bytes.Equal(buf[:n], sent) {
					t.Fatalf("%s: %d of %d bytes arrived, %v", host, n, size, err)
				}
				if from.String() != c.LocalAddr().String() {
					t.Errorf("from %s, want %s", from, c.LocalAddr())
				}
				if _, err := s.WriteTo(sent[:size/2], from); err != nil {
					t.Fatal(err)
				}
				c.SetReadDeadline(time.Now().Add(patience))
				if n, err = c.Read(buf); err != nil || !bytes.Equal(buf[:n], sent[:size/2]) {
					t.Fatalf("%s: answer %d of %d bytes, %v", host, n, size/2, err)
				}
			}
			c.Write([]byte("0123456789"))
			if n, _, err := s.ReadFrom(make([]byte, 4)); n != 4 || err != nil {
				t.Errorf("ReadFrom into 4 bytes: %d, %v", n, err)
			}
			c.Write([]byte("0123456789"))
			if n, _, err := s.ReadFrom(nil); n != 0 || err != nil {
				t.Errorf("ReadFrom into nothing: %d, %v", n, err)
			}
			c.Close()
			s.Close()
		}
	}
}

// A node reaches its own addresses without a peer.
func TestSelf(t *testing.T) {
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24", "fd66::1/64"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
	})
	for _, host := range []string{"10.66.0.1", "fd66::1", ""} {
		ca, cb := connect(t, n, n, net.JoinHostPort(host, "0"))
		sent := make([]byte, 1<<20)
		rand.Read(sent)
		go func() { ca.Write(sent); ca.CloseWrite() }()
		got, err := io.ReadAll(cb)
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%q: %d bytes, %v", host, len(got), err)
		}
	}
}

// TestDialTimeoutIsTheContexts: a program that asks whether its context has ended the dialling is told so, as by net.Dialer.
func TestDialTimeoutIsTheContexts(t *testing.T) {
	a, _ := pair(t, func(a, _ *Config) {
		a.Peers = []Peer{{PublicKey: newKey(t).Public(), AllowedIPs: prefixes("10.99.0.0/24")}} // never calls
		a.DNS.Servers = []netip.AddrPort{netip.MustParseAddrPort("10.99.0.53:53")}
	})
	for _, address := range []string{"10.99.0.1:80", "www.example:80"} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := a.Dial(ctx, "tcp", address)
		var timeout net.Error
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s: %#v", address, err)
		}
	}
}

// TestQueues: with several outbound queues flows share them, and each arrives whole.
func TestQueues(t *testing.T) {
	a, b := pair(t, func(a, _ *Config) { a.Queues = 2 })
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const flows, size = 20, 1 << 19
	var all sync.WaitGroup
	for range flows {
		all.Go(func() {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			io.Copy(c, c)
		})
		all.Go(func() {
			c, err := a.Dial(within(t, patience), "tcp", "10.66.0.2:80")
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			data := randomBytes(size)
			go func() {
				c.Write(data)
				c.(*TCPConn).CloseWrite()
			}()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	for i, q := range a.link.Stats().Queues {
		if q.Packets == 0 {
			t.Errorf("queue %d was never used", i)
		}
	}
	if s := a.Status(); s.TCP.Retransmits > 20 || len(s.Drops) > 0 {
		t.Errorf("%d segments sent again, drops %v", s.TCP.Retransmits, s.Drops)
	}
	if _, err := New(Config{PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24"), Queues: -1}); err == nil || !strings.Contains(err.Error(), "Queues") {
		t.Errorf("-1 queues: %v", err)
	}
}
