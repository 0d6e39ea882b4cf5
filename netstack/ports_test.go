package netstack

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"syscall"
	"testing"
	"time"
)

// These tests go from a program of the system through a forward, the VPN and a
// publish to a service of the system.

// through forwards a new local port of a to the VPN port listen of b, which b
// publishes from to. It returns the address of the local port.
func through(t *testing.T, a, b *Node, network, local, listen, to string) (forward, publish *Relay) {
	t.Helper()
	publish, err := b.Publish(network, listen, to)
	if err != nil {
		t.Fatal(err)
	}
	forward, err = a.Forward(network, local, listen)
	if err != nil {
		t.Fatal(err)
	}
	return forward, publish
}

// TestPortsHTTP: real HTTP both ways, over IPv4 and IPv6, with bodies larger than
// every buffer on the way.
func TestPortsHTTP(t *testing.T) {
	a, b := pair(t, nil)
	content := randomBytes(8<<20 + 13)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			h := sha256.New()
			io.Copy(h, r.Body)
			w.Write(h.Sum(nil))
			return
		}
		w.Write(content)
	}))
	defer server.Close()
	for _, listen := range []string{"10.66.0.2:80", "[fd66::2]:80"} {
		forward, publish := through(t, a, b, "tcp", "127.0.0.1:0", listen, server.Listener.Addr().String())
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
		url := "http://" + forward.Addr().String()
		resp, err := client.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("%s: got %d bytes of %d, %v", listen, len(got), len(content), err)
		}
		resp, err = client.Post(url, "application/octet-stream", bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		sum, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := sha256.Sum256(content); err != nil || !bytes.Equal(sum, want[:]) {
			t.Fatalf("%s: the server received something else (%v)", listen, err)
		}
		waitStatus(t, forward, func(s RelayStatus) bool { return s.Open == 0 })
		f, p := forward.Status(), publish.Status()
		if f.OutboundBytes < uint64(len(content)) || f.OutboundBytes != p.InboundBytes || f.InboundBytes != p.OutboundBytes {
			t.Errorf("the ends disagree: %+v and %+v", f, p)
		}
	}
	if n := len(a.Status().Relays); n != 2 {
		t.Errorf("the node's status has %d relays, want 2", n)
	}
}

// TestPortsTCPEnds: what ends a connection on one side ends it likewise on the
// other, through both relays.
func TestPortsTCPEnds(t *testing.T) {
	a, b := pair(t, nil)
	dial := func(serve func(c *net.TCPConn), n int) *net.TCPConn {
		listen := net.JoinHostPort("10.66.0.2", []string{"1", "2", "3"}[n])
		forward, _ := through(t, a, b, "tcp", "127.0.0.1:0", listen, testService(t, serve))
		return dialTCP(t, forward)
	}
	t.Run("half-close by the client", func(t *testing.T) {
		c := dial(func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			c.Write(bytes.ToUpper(b))
		}, 0)
		c.Write([]byte("question"))
		c.CloseWrite()
		if got, err := io.ReadAll(c); err != nil || string(got) != "QUESTION" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("half-close by the service", func(t *testing.T) {
		received := make(chan string, 1)
		c := dial(func(c *net.TCPConn) {
			c.CloseWrite()
			b, _ := io.ReadAll(c)
			received <- string(b)
		}, 1)
		if got, err := io.ReadAll(c); err != nil || len(got) != 0 {
			t.Errorf("got %q, %v, want the end", got, err)
		}
		c.Write([]byte("late"))
		c.CloseWrite()
		if got := <-received; got != "late" {
			t.Errorf("the service received %q", got)
		}
	})
	t.Run("reset by the service", func(t *testing.T) {
		c := dial(func(c *net.TCPConn) {
			c.Read(make([]byte, 1))
			c.SetLinger(0)
		}, 2)
		c.Write([]byte("x"))
		if _, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got %v, want a reset", err)
		}
	})
}

// TestPortsRefused: a client learns at once that nobody is there, whether it is the
// service behind the publish or the port inside the VPN.
func TestPortsRefused(t *testing.T) {
	a, b := pair(t, nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	behind, _ := through(t, a, b, "tcp", "127.0.0.1:0", "10.66.0.2:80", l.Addr().String())
	nobody, err := a.Forward("tcp", "127.0.0.1:0", "10.66.0.2:81")
	if err != nil {
		t.Fatal(err)
	}
	unreachable, err := a.Forward("tcp", "127.0.0.1:0", "192.0.2.1:80")
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]*Relay{"service": behind, "port": nobody, "address": unreachable} {
		began := time.Now()
		if err := outcome(r); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: got %v, want a reset", name, err)
		}
		if took := time.Since(began); took > defaultLimits.dialTimeout/2 {
			t.Errorf("%s: the reset took %v", name, took)
		}
	}
}

func TestPorts200(t *testing.T) {
	a, b := pair(t, nil)
	forward, publish := through(t, a, b, "tcp", "127.0.0.1:0", "10.66.0.2:7", testService(t, echo))
	var clients sync.WaitGroup
	for range 200 {
		clients.Go(func() {
			c, err := net.Dial("tcp", forward.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(2 * patience))
			sent := randomBytes(20 << 10)
			c.Write(sent)
			c.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("sent %d bytes, got %d, %v", len(sent), len(got), err)
			}
		})
	}
	clients.Wait()
	for _, r := range []*Relay{forward, publish} {
		waitStatus(t, r, func(s RelayStatus) bool { return s.Open == 0 && s.Total == 200 && s.Failed == 0 })
	}
}

// TestPortsUDP: an echo over IPv4 and IPv6, with datagrams that have to be
// fragmented inside the VPN, from a port published on all addresses of a node, which
// answers from the one that was asked.
func TestPortsUDP(t *testing.T) {
	a, b := pair(t, func(_, b *Config) { b.Addresses = append(b.Addresses, prefixes("10.66.0.3/24")...) })
	if err := a.RemovePeer(b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	err := a.AddPeer(Peer{PublicKey: b.PublicKey(), Endpoint: b.LocalAddrs()[0].String(),
		AllowedIPs: prefixes("10.66.0.2/32", "10.66.0.3/32", "fd66::2/128")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Publish("udp", ":7", udpService(t)); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"10.66.0.2:7", "10.66.0.3:7", "[fd66::2]:7"} {
		forward, err := a.Forward("udp", "127.0.0.1:0", to)
		if err != nil {
			t.Fatal(err)
		}
		c := dialUDP(t, forward, "127.0.0.1")
		for _, size := range []int{1, 0, 1200, 1400, 9000, 40000} {
			exchange(t, c, randomBytes(size))
		}
	}
	if _, err := b.Publish("udp4", ":7", "127.0.0.1:1"); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("the same port again: %v", err)
	}
}

// TestPortsNames: the name of a forward is resolved inside the VPN, that of a publish
// by the system.
func TestPortsNames(t *testing.T) {
	if _, err := net.LookupHost("localhost"); err != nil {
		t.Skip("this system has no localhost: ", err)
	}
	var asked sync.Map
	a, b := pair(t, func(a, _ *Config) {
		a.Resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			asked.Store("inside", true)
			return nil, errors.New("no name server in this test")
		}}
	})
	service := testService(t, echo)
	_, port, _ := net.SplitHostPort(service)
	if _, err := b.Publish("tcp4", "10.66.0.2:7", "localhost:"+port); err != nil {
		t.Fatal(err)
	}
	forward, err := a.Forward("tcp4", "localhost:0", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	c := dialTCP(t, forward)
	c.Write([]byte("x"))
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "x" {
		t.Errorf("got %q, %v", got, err)
	}
	named, err := a.Forward("tcp", "127.0.0.1:0", "service.inside.example:7")
	if err != nil {
		t.Fatal(err)
	}
	if err := outcome(named); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a name that does not resolve: %v, want a reset", err)
	}
	if _, ok := asked.Load("inside"); !ok {
		t.Error("the node's own resolver was not asked")
	}
}

// TestPortsClose: closing nodes ends their relays, whatever those are doing, and
// leaves nothing behind: TestMain looks for that.
func TestPortsClose(t *testing.T) {
	service := testService(t, func(c *net.TCPConn) { io.Copy(c, c) })
	a, b := pair(t, nil)
	forward, _ := through(t, a, b, "tcp", "127.0.0.1:0", "10.66.0.2:7", service)
	udp, _ := through(t, a, b, "udp", "127.0.0.1:0", "10.66.0.2:7", udpService(t))
	exchange(t, dialUDP(t, udp, "127.0.0.1"), []byte("x"))
	idle, busy := dialTCP(t, forward), dialTCP(t, forward)
	var writing sync.WaitGroup
	writing.Go(func() {
		for {
			if _, err := busy.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	waitStatus(t, forward, func(s RelayStatus) bool { return s.Open == 2 && s.InboundBytes > 1<<20 })
	began := time.Now()
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > defaultLimits.closing {
		t.Errorf("Close took %v", took)
	}
	writing.Wait()
	if _, err := io.ReadAll(idle); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the idle connection ended with %v, want a reset", err)
	}
	if _, err := a.Forward("tcp", "127.0.0.1:0", "10.66.0.2:7"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Forward after Close: %v", err)
	}
	if _, err := a.Publish("tcp", "10.66.0.1:7", service); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Publish after Close: %v", err)
	}
}

// TestPortsMistakes: what cannot be listened on or dialled is refused at once.
func TestPortsMistakes(t *testing.T) {
	a, _ := pair(t, nil)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, tt := range []struct {
		what                string
		relay               func(network, listen, to string) (*Relay, error)
		network, listen, to string
		want                error
	}{
		{"network", a.Forward, "sctp", "127.0.0.1:0", "10.66.0.2:7", net.UnknownNetworkError("sctp")},
		{"port of the system taken", a.Forward, "tcp", taken.Addr().String(), "10.66.0.2:7", syscall.EADDRINUSE},
		{"address of nobody", a.Forward, "udp", "192.0.2.1:1", "10.66.0.2:7", syscall.EADDRNOTAVAIL},
		{"address of the peer", a.Publish, "tcp", "10.66.0.2:7", "127.0.0.1:7", syscall.EADDRNOTAVAIL},
		{"address of the peer", a.Publish, "udp", "10.66.0.2:7", "127.0.0.1:7", syscall.EADDRNOTAVAIL},
		{"no port", a.Publish, "udp", "10.66.0.1", "127.0.0.1:7", nil},
		{"no service", a.Publish, "tcp", "10.66.0.1:7", ":7", nil},
		{"no service port", a.Forward, "tcp", "127.0.0.1:0", "10.66.0.2:0", nil},
	} {
		r, err := tt.relay(tt.network, tt.listen, tt.to)
		if err == nil {
			r.Close()
		}
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.what, err, tt.want)
		}
	}
}
