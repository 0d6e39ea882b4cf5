package netstack

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// What is behind a server, by its settings.
func TestBehindServer(t *testing.T) {
	both := prefixes("10.97.0.5/24", "fd97::5/64")
	for _, tt := range []struct {
		name            string
		settings        openconnect.Settings
		own             []netip.Prefix
		routes, exclude []netip.Prefix
		behind, beside  []string
	}{
		{
			name: "everything", settings: openconnect.Settings{Addresses: both},
			routes: prefixes("0.0.0.0/0", "::/0", "10.97.0.0/24", "fd97::/64"),
			behind: []string{"1.1.1.1", "10.97.0.9", "2001:db8::1"},
		},
		{
			name:     "one family",
			settings: openconnect.Settings{Addresses: both[:1], Include: prefixes("10.1.2.3/8", "fd00::/8"), Exclude: prefixes("fd01::/16")},
			routes:   prefixes("10.0.0.0/8", "10.97.0.0/24"), behind: []string{"10.1.1.1"}, beside: []string{"1.1.1.1", "fd00::1"},
		},
		{
			name: "without the local network, but with what is in it and the server's",
			settings: openconnect.Settings{
				Addresses: both, Include: prefixes("10.44.1.0/24"), Exclude: prefixes("10.0.0.0/8"), DNS: []netip.Addr{netip.MustParseAddr("10.55.0.1")},
			},
			routes: prefixes("10.44.1.0/24", "10.97.0.0/24", "fd97::/64", "10.55.0.1/32"), exclude: prefixes("10.0.0.0/8"),
			behind: []string{"10.44.1.1", "10.97.0.9", "10.55.0.1"}, beside: []string{"10.44.2.1", "10.55.0.2", "1.1.1.1"},
		},
		{
			name:     "the same in and out",
			settings: openconnect.Settings{Addresses: both, Include: prefixes("10.0.0.0/8", "172.16.0.0/12"), Exclude: prefixes("172.16.0.0/12", "10.97.0.0/24")},
			routes:   prefixes("10.0.0.0/8", "10.97.0.0/24", "fd97::/64"), exclude: prefixes("172.16.0.0/12"),
			behind: []string{"10.1.1.1", "10.97.0.9"}, beside: []string{"172.16.0.1"},
		},
		{
			name: "the user's word", settings: openconnect.Settings{Addresses: both, Exclude: prefixes("10.0.0.0/8")}, own: prefixes("10.1.0.0/16"),
			routes: prefixes("10.1.0.0/16"), behind: []string{"10.1.1.1"}, beside: []string{"10.97.0.9"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := &OpenConnect{AllowedIPs: tt.own}
			n := o.network(&tt.settings, DNS{})
			if !slices.Equal(n.Routes, tt.routes) || !slices.Equal(n.Exclude, tt.exclude) || !slices.Equal(n.Addresses, both[:len(tt.settings.Addresses)]) {
				t.Errorf("%+v; want routes %v, without %v", n, tt.routes, tt.exclude)
			}
			allowed, err := o.allowedIPs(&tt.settings)
			if err != nil {
				t.Fatal(err)
			}
			has := func(s string) bool {
				return slices.ContainsFunc(allowed, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(s)) })
			}
			for _, a := range tt.behind {
				if !has(a) {
					t.Errorf("%s is not behind the server: %v", a, allowed)
				}
			}
			for _, a := range tt.beside {
				if has(a) {
					t.Errorf("%s is behind the server: %v", a, allowed)
				}
			}
		})
	}
}

// Once there is a node, the server's name is Config.ResolveEndpoint's: the system's resolver may be behind the tunnel.
func TestOpenConnectResolve(t *testing.T) {
	o := &openconnectTunnel{}
	if got, err := o.resolve("vpn.example:443"); err != nil || !slices.Equal(got, []string{"vpn.example:443"}) {
		t.Errorf("before there is a node: %q, %v", got, err)
	}
	answer := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:443"), netip.MustParseAddrPort("[2001:db8::7]:443")}
	o.node = &Node{cfg: Config{ResolveEndpoint: func(endpoint string) ([]netip.AddrPort, error) {
		if endpoint != "vpn.example:443" {
			t.Errorf("asked for %q", endpoint)
		}
		return answer, nil
	}}}
	if got, err := o.resolve("vpn.example:443"); err != nil || !slices.Equal(got, []string{"192.0.2.7:443", "[2001:db8::7]:443"}) {
		t.Errorf("%q, %v", got, err)
	}
	answer = nil
	if got, err := o.resolve("vpn.example:443"); err == nil {
		t.Errorf("no address: %q", got)
	}
}
