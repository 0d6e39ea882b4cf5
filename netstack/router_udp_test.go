package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// openFiles is how many descriptors the process has; -1 where that is not known.
func openFiles() int {
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(all)
}

// TestRouterUDP: sizes up to the largest datagram there is (so fragments both ways,
// IPv4 and IPv6), and answers from the address that was asked: a connected socket
// takes no other.
func TestRouterUDP(t *testing.T) {
	_, port, _ := net.SplitHostPort(udpService(t))
	a, b := routedPair(t, nil)
	for _, host := range []string{"203.0.113.7", "2001:db8::7"} {
		c, err := a.Dial(within(t, patience), "udp", net.JoinHostPort(host, port))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for _, size := range []int{0, 1, 1200, 1473, 9000, 65000} {
			exchange(t, c, randomBytes(size))
		}
	}
	// What has been sent is counted a moment later.
	s := waitRouter(t, b, func(s *RouterStatus) bool { return s.UDP.DatagramsToClient == 12 && s.UDP.DatagramsToTarget == 12 })
	if s.UDP.Open != 2 || s.UDP.Total != 2 || s.UDP.BytesToClient != s.UDP.BytesToTarget {
		t.Errorf("%+v", s.UDP)
	}
}

// TestRouterUDPPortUnreachable: nobody listens at the target, and the client hears of
// it as if it had asked the target itself.
func TestRouterUDPPortUnreachable(t *testing.T) {
	nobody, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := nobody.LocalAddr()
	nobody.Close()
	a, _ := routedPair(t, nil)
	for _, host := range []string{"203.0.113.7", "2001:db8::7"} {
		c, err := a.Dial(within(t, patience), "udp", hostPort(host, at))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		var got error
		for range 2 {
			if _, got = c.Write([]byte("anybody there?")); got == nil {
				_, got = c.Read(make([]byte, 10))
			}
			if !errors.Is(got, syscall.ECONNREFUSED) {
				t.Errorf("%s: %v, want connection refused", host, got)
			}
		}
	}
}

// TestRouterUDPIdle: a silent flow is forgotten, with its socket, and begins anew.
func TestRouterUDPIdle(t *testing.T) {
	_, port, _ := net.SplitHostPort(udpService(t))
	a, b := routedPair(t, func(_, b *Config) { b.Router.Timeouts.UDPIdle = 200 * time.Millisecond })
	c, err := a.Dial(within(t, patience), "udp", net.JoinHostPort("203.0.113.7", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	exchange(t, c, []byte("once"))
	before := openFiles()
	waitRouter(t, b, func(s *RouterStatus) bool { return s.UDP.Open == 0 })
	exchange(t, c, []byte("again"))
	if s := b.Status().Router; s.UDP.Total != 2 || openFiles() > before {
		t.Errorf("%+v and %d descriptors, %d before", s.UDP, openFiles(), before)
	}
}

// TestRouterUDPShortFlows: many more flows than there may be at once, of one question and one
// answer each, as a resolver makes them: none is refused, and the sockets stay within the limit. With
// PENSTOCK_LONG=1, as make check sets it, there are 100,000.
func TestRouterUDPShortFlows(t *testing.T) {
	flows := 20_000
	switch {
	case testing.Short() || raceEnabled:
		flows = 5000
	case os.Getenv("PENSTOCK_LONG") == "1":
		flows = 100_000
	}
	_, port, _ := net.SplitHostPort(udpService(t))
	const perPeer = 1000
	a, b := routedPair(t, func(_, b *Config) { b.Router.Limits.UDPPerPeer = perPeer })
	before := openFiles()
	to := net.JoinHostPort("203.0.113.7", port)
	var answered, lost atomic.Int64
	var most atomic.Int64
	var wg sync.WaitGroup
	const workers = 16
	for w := range workers {
		wg.Go(func() {
			for i := range flows / workers {
				c, err := a.Dial(t.Context(), "udp", to)
				if err != nil {
					t.Error(err)
					return
				}
				ok := false
				for range 3 { // it is UDP: ask again
					c.SetDeadline(time.Now().Add(patience / 3))
					if _, err := c.Write([]byte("?")); err != nil {
						break
					}
					if _, err := c.Read(make([]byte, 10)); err == nil {
						ok = true
						break
					}
				}
				c.Close()
				if ok {
					answered.Add(1)
				} else {
					lost.Add(1)
				}
				if w == 0 && i%500 == 0 {
					most.Store(max(most.Load(), int64(openFiles())))
				}
			}
		})
	}
	wg.Wait()
	s := b.Status().Router
	t.Logf("%d answered, %d lost, at most %d descriptors, %d before; %+v", answered.Load(), lost.Load(), most.Load(), before, s)
	if lost.Load() != 0 {
		t.Errorf("%d flows had no answer", lost.Load())
	}
	if before >= 0 && most.Load() > int64(before+perPeer+100) {
		t.Errorf("%d descriptors, for a limit of %d flows", most.Load(), perPeer)
	}
	// The client's system uses a port again now and then.
	if s.UDP.Open > perPeer || s.UDP.Total < uint64(flows*9/10) {
		t.Errorf("%+v", s.UDP)
	}
}

// TestRouterUDPHook: a hook's connection need not be a socket of the system.
func TestRouterUDPHook(t *testing.T) {
	a, _ := routedPair(t, func(_, b *Config) {
		b.Router.Flow = func(context.Context, Flow) (net.Conn, error) {
			near, far := net.Pipe() // keeps the boundaries of writes
			go func() {
				defer far.Close()
				buf := make([]byte, 2000)
				for {
					n, err := far.Read(buf)
					if err != nil {
						return
					}
					slices.Reverse(buf[:n])
					if _, err := far.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
			return near, nil
		}
	})
	c, err := a.Dial(within(t, patience), "udp", "203.0.113.9:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	c.Write([]byte("stressed"))
	got := make([]byte, 100)
	if n, err := c.Read(got); err != nil || string(got[:n]) != "desserts" {
		t.Errorf("%q, %v", got[:n], err)
	}
}

// TestRouterRemovePeer: what a peer has open goes with it.
func TestRouterRemovePeer(t *testing.T) {
	at := serveTCP(t, echoTCP)
	_, port, _ := net.SplitHostPort(udpService(t))
	a, b := routedPair(t, nil)
	tcp, err := a.Dial(within(t, patience), "tcp", hostPort("203.0.113.7", at))
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := a.Dial(within(t, patience), "udp", net.JoinHostPort("203.0.113.7", port))
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	exchange(t, udp, []byte("hello"))
	exchange(t, tcp, []byte("hello"))
	if err := b.RemovePeer(a.PublicKey()); err != nil {
		t.Fatal(err)
	}
	waitRouter(t, b, func(s *RouterStatus) bool { return s.TCP.Open == 0 && s.UDP.Open == 0 })
}

// TestRouterUDPBegunTwice: two pumps bring the first datagrams of a flow at once, as those of a session's stream and
// of its datagrams may. There is one flow, which goes when it is silent.
func TestRouterUDPBegunTwice(t *testing.T) {
	_, port, _ := net.SplitHostPort(udpService(t))
	target := netip.MustParseAddrPort(net.JoinHostPort("203.0.113.7", port))
	_, b := routedPair(t, func(_, b *Config) { b.Router.Timeouts.UDPIdle = 200 * time.Millisecond })
	u := &b.router.udp
	begin := func() *datagramFlow { // as forwardUDP.begin does when find has found nothing
		id := stack.TransportEndpointID{
			LocalAddress: stackAddr(target.Addr()), LocalPort: target.Port(), RemoteAddress: stackAddr(client4), RemotePort: 4000,
		}
		return u.admit(&datagramFlow{kind: u, id: id, peer: b.router.peerOf(id.RemoteAddress), idle: b.router.cfg.Timeouts.UDPIdle})
	}
	if first, second := begin(), begin(); first == nil || first != second {
		t.Errorf("two flows: %p, %p", first, second)
	}
	waitRouter(t, b, func(s *RouterStatus) bool { return s.UDP.Open == 0 })
	held := func() int {
		b.router.mu.Lock()
		defer b.router.mu.Unlock()
		return len(b.router.flows)
	}
	for end := time.Now().Add(2 * time.Second); held() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d flows are held that nobody will forget", held())
		}
	}
}
