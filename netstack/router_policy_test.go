package netstack

import (
	"net"
	"net/netip"
	"testing"
)

// TestRouterPolicy: first match, default deny, and targets on the router that have
// to be named.
func TestRouterPolicy(t *testing.T) {
	alice, bob := newKey(t).Public(), newKey(t).Public()
	own := prefixes("10.66.0.2/24", "fd66::2/64")
	hosts := &hostAddrs{}
	policy := func(c RouterConfig) *routerPolicy {
		p := newRouterPolicy(&c, own)
		p.hosts = hosts
		return p
	}
	_, lan, _ := net.ParseCIDR("192.168.1.0/24")
	_, lan6, _ := net.ParseCIDR("2001:db8:1::/64")
	fixHosts := func() {
		hosts.mu.Lock()
		defer hosts.mu.Unlock()
		hosts.set([]net.Addr{
			&net.IPNet{IP: net.ParseIP("192.168.1.10"), Mask: lan.Mask},
			&net.IPNet{IP: net.ParseIP("2001:db8:1::10"), Mask: lan6.Mask},
		})
	}
	broad := RouterConfig{Allow: prefixes("0.0.0.0/0", "::/0")}
	office := RouterConfig{
		Allow: prefixes("10.1.0.0/16"),
		Rules: []RouterRule{
			{Deny: true, Peer: bob, To: prefixes("10.1.9.0/24")},
			{Peer: bob, Protocol: "tcp", Ports: []PortRange{{80, 80}, {8000, 8080}}, To: prefixes("10.2.0.0/16")},
			{Deny: true, Protocol: "udp", To: prefixes("10.1.0.0/16")},
			{Protocol: "icmp", To: prefixes("2001:db8:2::/48")},
			{Deny: true, Ports: []PortRange{{25, 25}}},
			{Peer: alice},
		},
	}
	named := RouterConfig{Allow: prefixes("0.0.0.0/0", "::/0", "127.0.0.0/8", "::1/128", "169.254.0.0/16", "192.168.1.10/32", "fe80::/10", "10.66.0.2/32")}
	magic := RouterConfig{Allow: prefixes("169.254.169.254/32", "fd00:ec2::254/128")}
	for _, c := range []struct {
		config   RouterConfig
		peer     PublicKey
		protocol string
		to       string
		want     refusal
	}{
		{RouterConfig{}, alice, "tcp", "8.8.8.8:53", refusedByRule},
		{broad, alice, "tcp", "8.8.8.8:53", notRefused},
		{broad, bob, "udp", "[2001:db8::1]:53", notRefused},
		{broad, bob, "icmp", "[2001:db8::1]:0", notRefused},
		{broad, alice, "tcp", "192.168.1.11:22", notRefused},
		{broad, alice, "tcp", "192.168.1.10:22", refusedRouterItself},
		{broad, alice, "tcp", "[2001:db8:1::10]:22", refusedRouterItself},
		{broad, alice, "udp", "192.168.1.255:137", refusedAddress},
		{broad, alice, "tcp", "127.0.0.1:22", refusedRouterItself},
		{broad, alice, "tcp", "127.9.9.9:22", refusedRouterItself},
		{broad, alice, "tcp", "[::1]:22", refusedRouterItself},
		{broad, alice, "tcp", "10.66.0.2:22", refusedRouterItself},
		{broad, alice, "tcp", "169.254.1.1:80", refusedRouterItself},
		{broad, alice, "tcp", "169.254.169.254:80", refusedRouterItself},
		{broad, alice, "tcp", "[fd00:ec2::254]:80", refusedRouterItself},
		{broad, alice, "tcp", "[fe80::1]:80", refusedRouterItself},
		{broad, alice, "tcp", "0.0.0.0:80", refusedAddress},
		{broad, alice, "tcp", "0.1.2.3:80", refusedAddress},
		{broad, alice, "tcp", "[::]:80", refusedAddress},
		{broad, alice, "tcp", "[::ffff:127.0.0.1]:80", refusedAddress},
		{broad, alice, "udp", "224.0.0.1:80", refusedAddress},
		{broad, alice, "udp", "[ff02::1]:80", refusedAddress},
		{broad, alice, "udp", "255.255.255.255:80", refusedAddress},
		{broad, alice, "udp", "240.0.0.1:80", refusedAddress},

		{named, alice, "tcp", "127.0.0.1:22", notRefused},
		{named, alice, "tcp", "[::1]:22", notRefused},
		{named, alice, "tcp", "192.168.1.10:22", notRefused},
		{named, alice, "tcp", "10.66.0.2:22", notRefused},
		{named, alice, "tcp", "[2001:db8:1::10]:22", refusedRouterItself},
		{named, alice, "tcp", "169.254.1.1:80", notRefused},
		{named, alice, "tcp", "[fe80::1]:80", notRefused},
		{named, alice, "tcp", "169.254.169.254:80", refusedRouterItself},
		{named, alice, "tcp", "0.0.0.0:80", refusedAddress},
		{magic, alice, "tcp", "169.254.169.254:80", notRefused},
		{magic, alice, "tcp", "[fd00:ec2::254]:80", notRefused},

		{office, bob, "tcp", "10.1.1.1:22", notRefused},
		{office, bob, "tcp", "10.1.9.1:22", refusedByRule},
		{office, alice, "tcp", "10.1.9.1:22", notRefused},
		{office, bob, "tcp", "10.2.1.1:80", notRefused},
		{office, bob, "tcp", "10.2.1.1:8080", notRefused},
		{office, bob, "tcp", "10.2.1.1:8081", refusedByRule},
		{office, bob, "udp", "10.2.1.1:80", refusedByRule},
		{office, alice, "udp", "10.1.1.1:53", refusedByRule},
		{office, alice, "udp", "10.3.1.1:53", notRefused},
		{office, alice, "tcp", "10.3.1.1:25", refusedByRule},
		{office, bob, "icmp", "[2001:db8:2::1]:0", notRefused},
		{office, bob, "icmp", "[2001:db8:3::1]:0", refusedByRule},
		{office, bob, "icmp", "10.1.1.1:0", notRefused},
	} {
		p := policy(c.config)
		p.hosts.look(netip.Addr{}) // reads the real ones, for the next seconds
		fixHosts()
		to := netip.MustParseAddrPort(c.to)
		got := p.decide(c.peer, c.protocol, to)
		if got.refusal != c.want {
			t.Errorf("%s %s: %v, want %v", c.protocol, c.to, got.refusal, c.want)
		}
		if got.refusal == notRefused && !p.ever.Contains(to.Addr()) {
			t.Errorf("%s %s is allowed, but the first look refuses it", c.protocol, c.to)
		}
	}
}

// FuzzRouterPolicy: whatever is asked, what a rule without names allows is never an
// address of this host or of nobody, and the first look refuses nothing that is
// allowed.
func FuzzRouterPolicy(f *testing.F) {
	for _, a := range []string{"127.0.0.1", "::1", "::ffff:10.0.0.1", "169.254.169.254", "8.8.8.8", "ff02::1", "fe80::1", "0.0.0.1", "255.255.255.255"} {
		f.Add(netip.MustParseAddr(a).AsSlice(), uint16(80), uint8(0))
	}
	p := newRouterPolicy(&RouterConfig{
		Rules: []RouterRule{{Deny: true, To: prefixes("8.0.0.0/6")}, {Ports: []PortRange{{1, 99}}, To: prefixes("0.0.0.0/0", "::/0")}},
	}, prefixes("10.66.0.2/24"))
	f.Fuzz(func(t *testing.T, ip []byte, port uint16, proto uint8) {
		a, ok := netip.AddrFromSlice(ip)
		if !ok {
			return
		}
		v := p.decide(PublicKey{}, []string{"tcp", "udp", "icmp"}[proto%3], netip.AddrPortFrom(a, port))
		if v.refusal != notRefused {
			return
		}
		std := net.IP(a.AsSlice())
		switch {
		case v.onRouter, std.IsLoopback(), std.IsMulticast(), std.IsUnspecified(), std.IsLinkLocalUnicast(), a.Is4In6(), proto%3 == 2, port > 99,
			!p.ever.Contains(a), a.Is4() && a.As4()[0]>>2 == 2:
			t.Fatalf("%v port %d is allowed: %+v", a, port, v)
		}
	})
}
