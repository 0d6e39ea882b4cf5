//go:build linux

package stock

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/vpntest/hosts"
)

// two makes two hosts, 10.99.0.1 and 10.99.0.2, and returns what runs a function on one of them.
func two(t *testing.T) (on [2]func(do func())) {
	t.Helper()
	h := hosts.New(t, 2)
	h.Join(
		hosts.Port{Host: 0, Name: "veth", Addrs: []string{"10.99.0.1/24"}},
		hosts.Port{Host: 1, Name: "veth", Addrs: []string{"10.99.0.2/24"}},
	)
	for i := range on {
		on[i] = func(do func()) { h.On(i, do) }
	}
	return on
}

// The two stock programs carry data between them, over DTLS and without, so a test that pairs
// one of them with Penstock fails for Penstock's sake.
func TestStockPair(t *testing.T) {
	on := two(t)
	var s *Server
	on[1](func() {
		s = StartServer(t, ServerOptions{
			Listen: netip.MustParseAddrPort("10.99.0.2:443"), Users: map[string]string{"alice": "correct horse"},
		})
	})
	for _, tt := range []struct {
		name   string
		noDTLS bool
	}{{"DTLS", false}, {"CSTP", true}} {
		var c *Client
		on[0](func() {
			c = StartClient(t, ClientOptions{URL: s.URL, Pin: s.Pin, User: "alice", Password: "correct horse", NoDTLS: tt.noDTLS})
		})
		tunnel := c.Connected(20 * time.Second)
		if tunnel.DTLS == tt.noDTLS || !tunnel.Addr4.Is4() || !tunnel.Addr6.Is6() || tunnel.MTU < 1300 || tunnel.Interface == "" {
			t.Errorf("%s: %+v\n%s", tt.name, tunnel, c.Log())
		}
		if !tt.noDTLS && !strings.Contains(tunnel.DTLSSuite, "(PSK)-(AES-256-GCM)") {
			t.Errorf("DTLS has %q", tunnel.DTLSSuite)
		}
		for _, server := range []string{"10.97.0.1", "fd97::1"} {
			carries(t, on, server)
		}
		c.Stop(syscall.SIGINT)
		if code := c.Wait(time.Second); code != 0 {
			t.Errorf("%s: openconnect ends with code %d", tt.name, code)
		}
	}
	on[0](func() {
		c := StartClient(t, ClientOptions{URL: s.URL, Pin: s.Pin, User: "alice", Password: "wrong"})
		if code := c.Wait(20 * time.Second); code == 0 || !strings.Contains(c.Log(), "Login failed") {
			t.Errorf("with a wrong password openconnect ends with code %d:\n%s", code, c.Log())
		}
	})
}

// carries sends 4 MB to the server's side and takes them back.
func carries(t *testing.T, on [2]func(func()), server string) {
	t.Helper()
	data := make([]byte, 4<<20)
	rand.Read(data)
	var l net.Listener
	var err error
	on[1](func() { l, err = net.Listen("tcp", net.JoinHostPort(server, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if got, err := io.ReadAll(io.LimitReader(c, int64(len(data)))); err == nil {
			c.Write(got)
		}
	}()
	var c net.Conn
	on[0](func() { c, err = net.DialTimeout("tcp", l.Addr().String(), 10*time.Second) })
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := c.Write(data); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, len(data))
	if _, err := io.ReadFull(c, back); err != nil || !bytes.Equal(back, data) {
		t.Errorf("through %s: %v, intact: %v", server, err, bytes.Equal(back, data))
	}
}
