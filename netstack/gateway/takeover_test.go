package gateway

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A client that comes back with another MTU (another network, IPv6 in place of IPv4) is reached as before.
func TestOtherMTU(t *testing.T) {
	cfg := testConfig(t)
	cfg.Node.Router = &netstack.RouterConfig{
		Allow: []netip.Prefix{netip.MustParsePrefix("10.44.0.0/16")},
		Flow: func(context.Context, netstack.Flow) (net.Conn, error) {
			a, b := net.Pipe()
			go func() { b.Write([]byte("hello")); b.Close() }()
			return a, nil
		},
	}
	s := startServer(t, cfg)
	reach := func(n *netstack.Node) error {
		c, err := n.Dial(within(t, 3*time.Second), "tcp", "10.44.0.1:80")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.ReadAll(c)
		return err
	}
	login := signInAs(t, s, "alice", "secret")
	n, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{Login: *login, KeepSession: true}})
	if err != nil {
		t.Fatal(err)
	}
	before := n.Addresses()
	if err := reach(n); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Node().Ping(within(t, 5*time.Second), before[0].Addr(), netstack.PingOptions{}); err != nil {
		t.Fatal(err)
	}
	tunnelOf := func() *tunnel {
		one := s.sessions.all()[0]
		one.mu.Lock()
		defer one.mu.Unlock()
		return one.tunnel
	}
	first := tunnelOf()
	n.Close()
	n, err = netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{Login: *login, Connect: openconnect.ConnectOptions{BaseMTU: 1400}}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if after := n.Addresses(); after[0] != before[0] {
		t.Fatalf("%v, then %v", before, after)
	}
	if mtu := sessionsOf(t, s, "alice")[0].MTU; tunnelOf() != first || mtu != 1334 || n.Status().MTU != 1334 {
		t.Errorf("its flows are lost with the tunnel %p, now %p; MTU %d and %d", first, tunnelOf(), mtu, n.Status().MTU)
	}
	time.Sleep(time.Second)
	if err := reach(n); err != nil {
		t.Errorf("the client through the router: %v", err)
	}
	if _, err := s.Node().Ping(within(t, 3*time.Second), before[0].Addr(), netstack.PingOptions{}); err != nil {
		t.Errorf("the server to the client: %v", err)
	}
	if _, err := n.Ping(within(t, 3*time.Second), netip.MustParseAddr("10.9.0.1"), netstack.PingOptions{}); err != nil {
		t.Errorf("the client to the server: %v", err)
	}
}

// A static address that goes from one session of a user to the next is reached there.
func TestStaticTakenOver(t *testing.T) {
	s := startServer(t, testConfig(t, UserEntry{Name: "stan", Hash: cheap(t, "x"), Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.77")}}))
	lost := 0
	for range 10 {
		n := mustConnect(t, signInAs(t, s, "stan", "x"), false)
		time.Sleep(100 * time.Millisecond)
		if _, err := s.Node().Ping(within(t, 3*time.Second), netip.MustParseAddr("10.9.0.77"), netstack.PingOptions{}); err != nil {
			t.Log(err, n.Addresses())
			lost++
		}
	}
	if lost > 0 {
		t.Errorf("%d of 10 clients are not reached", lost)
	}
}
