package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// star is two nodes, at .1 and .3, which reach each other by way of a router at .2 alone.
func star(t *testing.T, change func(router *Config)) (a, router, c *Node) {
	t.Helper()
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	hub := Config{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.2/24", "fd66::2/64"), Router: &RouterConfig{}}
	spokes := []Config{
		{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.1/24", "fd66::1/64")},
		{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.3/24", "fd66::3/64")},
	}
	for i, own := range [][]netip.Prefix{prefixes("10.66.0.1/32", "fd66::1/128"), prefixes("10.66.0.3/32", "fd66::3/128")} {
		hub.Peers = append(hub.Peers, Peer{PublicKey: spokes[i].PrivateKey.Public(), AllowedIPs: own})
	}
	change(&hub)
	router = start(t, hub)
	nodes := make([]*Node, 2)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for i, s := range spokes {
		s.Peers = []Peer{{PublicKey: router.PublicKey(), Endpoint: router.LocalAddrs()[0].String(), AllowedIPs: prefixes("10.66.0.0/24", "fd66::/64")}}
		nodes[i] = start(t, s)
		if err := nodes[i].WaitEstablished(ctx, router.PublicKey()); err != nil {
			t.Fatal(err)
		}
		if err := router.WaitEstablished(ctx, nodes[i].PublicKey()); err != nil {
			t.Fatal(err)
		}
	}
	return nodes[0], router, nodes[1]
}

// TestSwitch: peers reach each other through a node with Switch, with superpackets whole, and one hop is counted.
func TestSwitch(t *testing.T) {
	a, router, c := star(t, func(c *Config) { c.Switch = true })
	sent := make([]byte, 8<<20)
	rand.Read(sent)
	for _, host := range []string{"10.66.0.3", "fd66::3"} {
		l, err := c.Listen("tcp", net.JoinHostPort(host, "80"))
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan [32]byte, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			h := sha256.New()
			io.Copy(h, conn)
			got <- [32]byte(h.Sum(nil))
		}()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		conn, err := a.Dial(ctx, "tcp", net.JoinHostPort(host, "80"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(conn, bytes.NewReader(sent)); err != nil {
			t.Error(err)
		}
		conn.Close()
		select {
		case sum := <-got:
			if sum != sha256.Sum256(sent) {
				t.Errorf("%s: what came is not what was sent", host)
			}
		case <-ctx.Done():
			t.Errorf("%s: not all has come", host)
		}
		cancel()
		l.Close()
		direct, err := a.Ping(t.Context(), netip.MustParseAddr(strings.Replace(host, "3", "2", 1)), PingOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := a.Ping(t.Context(), netip.MustParseAddr(host), PingOptions{Size: 1000}); err != nil || r.TTL != direct.TTL-1 {
			t.Errorf("ping %s: %+v, %v; %d hops were left by a direct reply", host, r, err, direct.TTL)
		}
	}
	st := router.Status()
	segments := st.Outbound.Segments
	if st.Outbound.Superpackets == 0 || st.Router.Switched == 0 || st.Router.Switched*2 > segments {
		t.Errorf("%d packets passed on as %d segments, %d of them superpackets: they were not whole", st.Router.Switched, segments, st.Outbound.Superpackets)
	}
	if n := st.Drops["bad checksum"]; n != 0 || len(c.Status().Drops) != 0 {
		t.Errorf("drops: %v, at the far end %v", st.Drops, c.Status().Drops)
	}
	if st.TCP.SegmentsReceived != 0 {
		t.Errorf("the router's own stack has seen %d segments", st.TCP.SegmentsReceived)
	}
}

// TestNoSwitch: without it the same is refused, and counted.
func TestNoSwitch(t *testing.T) {
	a, router, c := star(t, func(c *Config) { c.Router.Allow = prefixes("0.0.0.0/0", "::/0") })
	l, err := c.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, host := range []string{"10.66.0.3", "fd66::3"} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if conn, err := a.Dial(ctx, "tcp", net.JoinHostPort(host, "80")); err == nil {
			conn.Close()
			t.Errorf("%s was reached", host)
		} else if !strings.Contains(err.Error(), "refused") && !strings.Contains(err.Error(), "prohibited") && !strings.Contains(err.Error(), "no route") {
			t.Errorf("%s: %v", host, err)
		}
		cancel()
	}
	if st := router.Status().Router; st.Refused["target inside the VPN"] < 2 || st.Switched != 0 {
		t.Errorf("refused %v, passed on %d", st.Refused, st.Switched)
	}
}

// TestSwitchSmallerMTU: peers that have been told a larger MTU than the node in between learn of its own.
func TestSwitchSmallerMTU(t *testing.T) {
	a, router, c := star(t, func(c *Config) { c.Switch, c.MTU = true, 1300 })
	for _, addr := range []string{"10.66.0.3:80", "[fd66::3]:80"} {
		l, err := c.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		got := make(chan int64, 1)
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, _ := io.Copy(io.Discard, conn)
			got <- n
		}()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		conn, err := a.Dial(ctx, "tcp", addr)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
		conn.Write(make([]byte, 1<<20))
		conn.Close()
		if n := <-got; n != 1<<20 {
			t.Errorf("%s: %d bytes of %d have come; the router drops %v", addr, n, 1<<20, router.Status().Drops)
		}
		l.Close()
	}
}
