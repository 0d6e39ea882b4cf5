package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The targets of these tests have addresses of documentation (RFC 5737, RFC 3849);
// the hook finds them on loopback, at the port that was asked. What the router does
// without a hook needs networks and is tested in router_netns_test.go.
const (
	routed4 = "203.0.113.0/24"
	routed6 = "2001:db8::/32"
)

// routedPair is a pair of nodes of which b routes for a.
func routedPair(t testing.TB, change func(a, b *Config)) (a, b *Node) {
	t.Helper()
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	ca := Config{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.1/24", "fd66::1/64")}
	cb := Config{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.2/24", "fd66::2/64")}
	cb.Peers = []Peer{{Name: "a", PublicKey: ca.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}}
	ca.Peers = []Peer{{
		Name: "b", PublicKey: cb.PrivateKey.Public(),
		AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128", "0.0.0.0/0", "::/0"),
	}}
	cb.Router = &RouterConfig{Allow: prefixes(routed4, routed6), Flow: toLoopback}
	if change != nil {
		change(&ca, &cb)
	}
	b = start(t, cb)
	ca.Peers[0].Endpoint = b.LocalAddrs()[0].String()
	a = start(t, ca)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for x, y := range map[*Node]*Node{a: b, b: a} {
		if err := x.WaitEstablished(ctx, y.PublicKey()); err != nil {
			t.Fatal(err)
		}
	}
	return a, b
}

// toLoopback is a hook that finds every target on this machine.
func toLoopback(ctx context.Context, f Flow) (net.Conn, error) {
	ip := netip.MustParseAddr("127.0.0.1")
	var d net.Dialer
	return d.DialContext(ctx, f.Network, netip.AddrPortFrom(ip, f.Dst.Port()).String())
}

// hostPort is the routed address of a service on loopback.
func hostPort(host string, service net.Addr) string {
	_, port, err := net.SplitHostPort(service.String())
	if err != nil {
		panic(err)
	}
	return net.JoinHostPort(host, port)
}

// serveTCP runs serve for every connection to a listener on loopback.
func serveTCP(t testing.TB, serve func(*net.TCPConn)) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr()
}

func echoTCP(c *net.TCPConn) { io.Copy(c, c) }

func TestRouterTCP(t *testing.T) {
	var seen []Flow
	a, b := routedPair(t, func(_, b *Config) {
		b.Router.Flow = func(ctx context.Context, f Flow) (net.Conn, error) {
			seen = append(seen, f)
			return toLoopback(ctx, f)
		}
	})
	at := serveTCP(t, func(c *net.TCPConn) {
		// The answer comes only after the client has closed its half.
		all, err := io.ReadAll(c)
		if err != nil {
			t.Error(err)
		}
		c.Write(all)
	})
	for _, host := range []string{"203.0.113.7", "2001:db8::7"} {
		c, err := a.Dial(within(t, patience), "tcp", hostPort(host, at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		sent := randomBytes(3 << 20)
		go func() {
			c.Write(sent)
			c.(*TCPConn).CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if err != nil || !slices.Equal(got, sent) {
			t.Fatalf("%s: %d bytes, %v, want the %d sent", host, len(got), err, len(sent))
		}
		f := seen[len(seen)-1]
		if f.Peer != a.PublicKey() || f.PeerName != "a" || f.Network != "tcp" || f.Dst.String() != hostPort(host, at) ||
			f.Src != c.LocalAddr().(*net.TCPAddr).AddrPort() {
			t.Errorf("the hook was asked about %+v", f)
		}
	}
	waitRouter(t, b, func(s *RouterStatus) bool {
		return s.TCP.Open == 0 && s.TCP.Completed == 2 && s.TCP.BytesToTarget == 6<<20 && s.TCP.BytesToClient == 6<<20
	})
}

// waitRouter waits until the router's status is as wanted. The last of thousands of connections
// that end at once may need more than one retransmission, seconds apart, to do so.
func waitRouter(t testing.TB, n *Node, want func(*RouterStatus) bool) *RouterStatus {
	t.Helper()
	for end := time.Now().Add(3 * patience); ; time.Sleep(5 * time.Millisecond) {
		s := n.Status().Router
		if want(s) {
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("status did not come about: %+v", *s)
		}
	}
}

// TestRouterTCPRefusals: what a client hears of a target that it cannot have.
func TestRouterTCPRefusals(t *testing.T) {
	errs := map[string]error{
		"203.0.113.1": ErrRefuse, "2001:db8::1": syscall.ECONNREFUSED,
		"203.0.113.2": syscall.ENETUNREACH, "2001:db8::2": syscall.ENETUNREACH,
		"203.0.113.3": syscall.EHOSTUNREACH, "2001:db8::3": syscall.EHOSTUNREACH,
		"203.0.113.4": syscall.EACCES, "2001:db8::4": syscall.EACCES,
		"203.0.113.5": context.DeadlineExceeded,
	}
	a, b := routedPair(t, func(_, b *Config) {
		b.Router.Flow = func(_ context.Context, f Flow) (net.Conn, error) { return nil, errs[f.Dst.Addr().String()] }
	})
	for host, cause := range errs {
		_, err := a.Dial(within(t, 3*time.Second), "tcp", net.JoinHostPort(host, "80"))
		if err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s, %v: dial says %v, want an error at once", host, cause, err)
			continue
		}
		// IPv6 has two errors that come with a reset, for stacks that know them as little
		// as gVisor does.
		reset := cause == ErrRefuse || cause == syscall.ECONNREFUSED ||
			strings.Contains(host, ":") && (cause == syscall.EHOSTUNREACH || cause == syscall.EACCES)
		if refused := errors.Is(err, syscall.ECONNREFUSED); refused != reset {
			t.Errorf("%s, %v: dial says %v", host, cause, err)
		}
	}
	for _, host := range []string{"198.51.100.1", "2002::1"} { // nothing allows them
		if _, err := a.Dial(within(t, 3*time.Second), "tcp", net.JoinHostPort(host, "80")); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: dial says %v, want an error at once", host, err)
		}
	}
	s := waitRouter(t, b, func(s *RouterStatus) bool { return s.TCP.Open == 0 })
	for reason, n := range map[refusal]uint64{
		failedRefused: 2, failedNetwork: 2, failedHost: 2, failedProhibited: 2, failedTimeout: 1, refusedByRule: 2,
	} {
		if got := s.Refused[reason.Error()]; got != n {
			t.Errorf("%q counted %d times, want %d; all: %v", reason, got, n, s.Refused)
		}
	}
}

// TestRouterBlackHole: 5,000 connections to targets that never answer, and one client
// with a target that does.
func TestRouterBlackHole(t *testing.T) {
	at := serveTCP(t, echoTCP)
	hole := netip.MustParsePrefix("203.0.113.128/25")
	a, b := routedPair(t, func(_, b *Config) {
		b.Router.Flow = func(ctx context.Context, f Flow) (net.Conn, error) {
			if hole.Contains(f.Dst.Addr()) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return toLoopback(ctx, f)
		}
	})
	ctx, stop := context.WithCancel(t.Context())
	floodDone := make(chan struct{})
	go func() {
		defer close(floodDone)
		gate := make(chan struct{}, 500)
		for i := range 5000 {
			gate <- struct{}{}
			go func() {
				defer func() { <-gate }()
				to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(128 + i%127)}), uint16(1+i/127))
				c, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
				if c, err := a.Dial(c, "tcp", to.String()); err == nil {
					c.Close()
					t.Error("a black hole answered")
				}
			}()
		}
		for range cap(gate) {
			gate <- struct{}{}
		}
	}()
	served := 0
	for running := true; running; {
		select {
		case <-floodDone:
			running = false
		default:
		}
		c, err := a.Dial(within(t, patience), "tcp", hostPort("203.0.113.1", at))
		if err != nil {
			t.Fatalf("after %d connections: %v", served, err)
		}
		c.SetDeadline(time.Now().Add(patience))
		c.Write([]byte("alive"))
		got := make([]byte, 5)
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatal(err)
		}
		c.Close()
		served++
	}
	stop()
	s := b.Status().Router
	t.Logf("%d connections served beside the flood; %+v", served, s)
	if s.TCP.HalfOpen > defaultRouterLimits.HalfOpenPerPeer || s.Refused[evictedHalfOpen.Error()] == 0 {
		t.Errorf("%+v", s)
	}
}

// TestRouterFloodOfOnePeer: a peer that asks for one target over and over pushes its own half-open connections out,
// not those of others to the same target.
func TestRouterFloodOfOnePeer(t *testing.T) {
	at := serveTCP(t, echoTCP)
	other := Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.3/24"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
	}
	a, b := routedPair(t, func(_, b *Config) {
		b.Peers = append(b.Peers, Peer{Name: "other", PublicKey: other.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.3/32")})
		b.Router.Flow = func(ctx context.Context, f Flow) (net.Conn, error) {
			select {
			case <-time.After(300 * time.Millisecond): // a target far away
				return toLoopback(ctx, f)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	})
	other.Peers = []Peer{{PublicKey: b.PublicKey(), Endpoint: b.LocalAddrs()[0].String(), AllowedIPs: prefixes(routed4)}}
	c := start(t, other)
	if err := c.WaitEstablished(within(t, patience), b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	target := hostPort("203.0.113.1", at)
	ctx, stop := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	for range 300 {
		flood.Go(func() {
			for ctx.Err() == nil {
				ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
				if c, err := a.Dial(ctx, "tcp", target); err == nil {
					c.Close()
				}
				cancel()
			}
		})
	}
	defer flood.Wait()
	defer stop()
	waitRouter(t, b, func(s *RouterStatus) bool { return s.Refused[evictedHalfOpen.Error()] > 100 })
	for i := range 3 {
		conn, err := c.Dial(within(t, 5*time.Second), "tcp", target)
		if err != nil {
			t.Fatalf("connection %d: %v; %+v", i, err, b.Status().Router)
		}
		conn.Close()
	}
}

// TestRouterSamePort: a client whose system gives it the same port again need not wait until the router's stack
// has forgotten the last connection, which the target had closed first.
func TestRouterSamePort(t *testing.T) {
	at := serveTCP(t, func(c *net.TCPConn) { io.WriteString(c, "hello") })
	a, b := routedPair(t, nil)
	if terr := a.stack.SetPortRange(50000, 50000); terr != nil {
		t.Fatal(terr)
	}
	for _, host := range []string{"203.0.113.1", "2001:db8::1"} {
		for i := range 3 {
			c, err := a.Dial(within(t, 5*time.Second), "tcp", hostPort(host, at))
			if err != nil {
				t.Fatalf("%s, connection %d: %v", host, i, err)
			}
			if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
				t.Fatalf("%s, connection %d: %q, %v", host, i, got, err)
			}
			c.Close()
			waitRouter(t, b, func(s *RouterStatus) bool { return s.TCP.Open == 0 })
			for end := time.Now().Add(patience); len(a.stack.RegisteredEndpoints()) > 0 && time.Now().Before(end); {
				time.Sleep(time.Millisecond) // the client has its port until the router has acknowledged its FIN
			}
		}
	}
}
