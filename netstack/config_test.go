package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/penstock-vpn/penstock/transport"
)

// keysOf are the fields that err complains about.
func keysOf(t *testing.T, err error) (keys []string) {
	t.Helper()
	var collect func(error)
	collect = func(err error) {
		if c, ok := err.(*ConfigError); ok {
			keys = append(keys, c.Key)
			if c.Want == "" || !strings.Contains(c.Error(), c.Key) || !strings.Contains(c.Error(), c.Want) {
				t.Errorf("message %q", c)
			}
			return
		}
		switch e := err.(type) {
		case interface{ Unwrap() []error }:
			for _, err := range e.Unwrap() {
				collect(err)
			}
		case interface{ Unwrap() error }:
			collect(e.Unwrap())
		}
	}
	collect(err)
	return keys
}

func TestConfigErrors(t *testing.T) {
	peerKey, otherKey := newKey(t).Public(), newKey(t).Public()
	for _, c := range []struct {
		spoil func(*Config)
		want  []string
	}{
		{func(c *Config) {}, nil},
		{func(c *Config) { c.PrivateKey = PrivateKey{} }, []string{"PrivateKey"}},
		{func(c *Config) { c.Addresses = nil }, []string{"Addresses", "Peers[0].KnownAs[0]"}},
		{func(c *Config) { c.Addresses = prefixes("10.66.0.1/32", "10.66.0.1/24") }, []string{"Addresses[1]"}},
		{func(c *Config) {
			c.Addresses = append(c.Addresses, prefixes("224.0.0.1/32", "::/128", "127.0.0.1/8")...)
		}, []string{"Addresses[2]", "Addresses[3]", "Addresses[4]"}},
		{func(c *Config) { c.Addresses = append(c.Addresses, netip.Prefix{}) }, []string{"Addresses[2]"}},
		{func(c *Config) { c.Listen = []netip.AddrPort{{}} }, []string{"Listen[0]"}},
		{func(c *Config) { c.MTU = 1279 }, []string{"MTU"}},
		{func(c *Config) { c.MTU = 575; c.Addresses = c.Addresses[:1] }, []string{"MTU"}},
		{func(c *Config) { c.MTU = 576; c.Addresses = c.Addresses[:1] }, nil},
		{func(c *Config) { c.MTU = 1 << 14 }, []string{"MTU"}},
		{func(c *Config) { c.TCP.CongestionControl = "bbr" }, []string{"TCP.CongestionControl"}},
		{func(c *Config) { c.TCP.Send = BufferSizes{Default: 2 << 20, Max: 1 << 20} }, []string{"TCP.Send"}},
		{func(c *Config) { c.TCP.Receive = BufferSizes{Max: 1000} }, []string{"TCP.Receive"}},
		{func(c *Config) { c.TCP.Receive = BufferSizes{Max: 64 << 10} }, nil},
		{func(c *Config) { c.TCP.Send = BufferSizes{Default: 64 << 20} }, nil},
		{func(c *Config) { c.UDP = UDPOptions{Send: -1, Receive: 1} }, []string{"UDP.Send", "UDP.Receive"}},
		{func(c *Config) { c.QueueBytes = 1 }, []string{"QueueBytes"}},
		{func(c *Config) { c.CipherSuites = []CipherSuite{AES128GCM, 0x1301} }, []string{"CipherSuites[1]"}},
		{func(c *Config) { c.Peers[0].PublicKey = PublicKey{} }, []string{"Peers[0].PublicKey"}},
		{func(c *Config) { c.Peers[0].PublicKey = c.PrivateKey.Public() }, []string{"Peers[0].PublicKey"}},
		{func(c *Config) { c.Peers[1].PublicKey = peerKey }, []string{"Peers[1].PublicKey"}},
		{func(c *Config) { c.Peers[0].Endpoint = "b.example.net" }, []string{"Peers[0].Endpoint"}},
		{func(c *Config) { c.Peers[0].Endpoint = "b.example.net:0" }, []string{"Peers[0].Endpoint"}},
		{func(c *Config) { c.Peers[0].Endpoint = ":5182" }, []string{"Peers[0].Endpoint"}},
		{func(c *Config) { c.Peers[1].AllowedIPs = prefixes("10.66.9.0/24", "10.66.0.9/24") }, []string{"Peers[1].AllowedIPs[1]"}},
		{func(c *Config) { c.Peers[1].AllowedIPs = []netip.Prefix{{}} }, []string{"Peers[1].AllowedIPs[0]"}},
		{func(c *Config) { c.Peers[0].KnownAs = append(c.Peers[0].KnownAs, netip.MustParseAddr("10.1.1.2")) }, []string{"Peers[0].KnownAs[1]"}},
		{func(c *Config) { c.Peers[0].KnownAs = []netip.Addr{{}} }, []string{"Peers[0].KnownAs[0]"}},
		{func(c *Config) { c.MTU = 1; c.QueueBytes = -1 }, []string{"MTU", "QueueBytes"}}, // all at once
	} {
		cfg := Config{
			PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24", "fd66::1/64"),
			Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
			Peers: []Peer{
				{PublicKey: peerKey, AllowedIPs: prefixes("10.66.0.0/24"), Endpoint: "127.0.0.1:9", KnownAs: []netip.Addr{netip.MustParseAddr("10.1.1.1")}},
				{PublicKey: otherKey},
			},
		}
		c.spoil(&cfg)
		n, err := New(cfg)
		if err == nil {
			n.Close()
		}
		if got := keysOf(t, err); !slices.Equal(got, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("New complains of %v (%v), want %v", got, err, c.want)
		}
	}
}

// A closeCounter is a socket that is never used.
type closeCounter struct {
	transport.PacketConn
	closed int
}

func (c *closeCounter) Close() error { c.closed++; return nil }

// New takes the sockets it is given, also when it fails.
func TestNewClosesConns(t *testing.T) {
	c := &closeCounter{}
	if _, err := New(Config{Conns: []transport.PacketConn{c}}); err == nil || c.closed != 1 {
		t.Errorf("%v, closed %d times", err, c.closed)
	}
	c = &closeCounter{}
	_, err := New(Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/32"), Conns: []transport.PacketConn{c},
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
	})
	if got := keysOf(t, err); !slices.Equal(got, []string{"Conns"}) || c.closed != 1 {
		t.Errorf("%v, closed %d times", err, c.closed)
	}
}

// A configuration that is printed or logged shows no private key.
func TestConfigHidesKey(t *testing.T) {
	c := Config{PrivateKey: newKey(t)}
	text, err := c.PrivateKey.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	slog.New(slog.NewTextHandler(&logged, nil)).Info("config", "c", c, "key", c.PrivateKey)
	bytes := strings.Trim(fmt.Sprint([transport.KeySize]byte(c.PrivateKey)), "[]")
	for _, printed := range []string{fmt.Sprintf("%v %+v %s", c, c, c.PrivateKey), fmt.Sprintf("%#v", c), logged.String()} {
		if strings.Contains(printed, string(text)) || strings.Contains(printed, bytes) {
			t.Errorf("the key is in %q", printed)
		}
	}
}

func TestPeers(t *testing.T) {
	a, b := pair(t, nil)
	third := newKey(t).Public()
	if err := a.AddPeer(Peer{PublicKey: third, AllowedIPs: prefixes("10.66.0.2/32")}); err == nil {
		t.Error("a prefix of another peer was accepted")
	}
	if err := a.AddPeer(Peer{PublicKey: b.PublicKey()}); err == nil {
		t.Error("a known peer was accepted")
	}
	if got := keysOf(t, a.AddPeer(Peer{PublicKey: a.PublicKey()})); !slices.Equal(got, []string{"Peer.PublicKey"}) {
		t.Errorf("its own key: %v", got)
	}
	if err := a.AddPeer(Peer{PublicKey: third, AllowedIPs: prefixes("10.70.0.0/16")}); err != nil {
		t.Fatal(err)
	}
	if err := a.reachable(netip.MustParseAddr("10.70.1.1")); err != nil {
		t.Errorf("an address of a new peer: %v", err)
	}
	if err := a.RemovePeer(third); err != nil {
		t.Error(err)
	}
	if err := a.RemovePeer(third); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("removed twice: %v", err)
	}
	if err := a.WaitEstablished(t.Context(), third); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("WaitEstablished: %v", err)
	}
	if err := a.reachable(netip.MustParseAddr("10.70.1.1")); err == nil {
		t.Error("an address of a removed peer is reachable")
	}
	if n := len(a.Status().Tunnel.Peers); n != 1 {
		t.Errorf("%d peers, want 1", n)
	}
}

// A peer that knows the node by another address is reached from that address, both families, both
// ways.
func TestKnownAs(t *testing.T) {
	a, b := pair(t, func(ca, cb *Config) {
		cb.Peers[0].AllowedIPs = prefixes("192.168.7.1/32", "fd77::1/128")
	})
	if err := a.RemovePeer(b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	err := a.AddPeer(Peer{
		PublicKey: b.PublicKey(), Endpoint: b.LocalAddrs()[0].String(),
		AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128"),
		KnownAs:    []netip.Addr{netip.MustParseAddr("192.168.7.1"), netip.MustParseAddr("fd77::1")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for inside, known := range map[string]string{"10.66.0.2": "192.168.7.1", "fd66::2": "fd77::1"} {
		ca, cb := connect(t, a, b, net.JoinHostPort(inside, "0"))
		if host, _, _ := net.SplitHostPort(cb.RemoteAddr().String()); host != known {
			t.Errorf("b sees %s, want %s", host, known)
		}
		if err := pingPong(ca, cb); err != nil {
			t.Error(err)
		}
		l, err := a.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		c, err := b.Dial(t.Context(), "tcp", net.JoinHostPort(known, port))
		if err != nil {
			t.Fatalf("b to %s: %v", known, err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if err := pingPong(c, s); err != nil {
			t.Error(err)
		}
		c.Close()
		s.Close()
		l.Close()
	}
}

// pingPong sends a few bytes each way.
func pingPong(a, b net.Conn) error {
	buf := make([]byte, 4)
	for _, ends := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := ends[0].Write([]byte("ping")); err != nil {
			return err
		}
		if _, err := ends[1].Read(buf); err != nil {
			return err
		}
		if string(buf) != "ping" {
			return errors.New("other bytes came")
		}
	}
	return nil
}
