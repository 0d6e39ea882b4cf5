package hostnet

import (
	"net/netip"
	"slices"
	"testing"
)

func servers(s ...string) (as []netip.AddrPort) {
	for _, s := range s {
		as = append(as, netip.MustParseAddrPort(s))
	}
	return as
}

func TestDNSForms(t *testing.T) {
	split := func(server string, domains ...string) SplitDNS {
		return SplitDNS{Domains: domains, Servers: servers(server)}
	}
	for _, tt := range []struct {
		name                   string
		dns                    DNS
		linkServers, linkNames []string
		linkNotes              int
		fileServers            []string
		fileNotes              int
	}{
		{"servers and search", DNS{Servers: servers("10.0.0.1:53", "[fd00::1]:53"), Search: []string{"a.example"}},
			[]string{"10.0.0.1", "fd00::1"}, []string{"a.example", "~."}, 0, []string{"10.0.0.1", "fd00::1"}, 0},
		{"another port", DNS{Servers: servers("10.0.0.1:5353", "[fd00::1]:5353")},
			[]string{"10.0.0.1:5353", "[fd00::1]:5353"}, []string{"~."}, 0, nil, 2},
		{"search alone", DNS{Search: []string{"a.example"}}, nil, []string{"a.example"}, 0, nil, 0},
		{"split alone", DNS{Split: []SplitDNS{split("10.0.0.1:53", "a.example", "b.example")}},
			[]string{"10.0.0.1"}, []string{"~a.example", "~b.example"}, 0, nil, 1},
		{"two splits", DNS{Split: []SplitDNS{split("10.0.0.1:53", "a.example"), split("10.0.0.2:53", "b.example")}},
			[]string{"10.0.0.1", "10.0.0.2"}, []string{"~a.example", "~b.example"}, 1, nil, 2},
		{"split of all names", DNS{Split: []SplitDNS{split("10.0.0.1:53", ".")}}, []string{"10.0.0.1"}, []string{"~."}, 0, []string{"10.0.0.1"}, 0},
		{"both", DNS{Servers: servers("10.0.0.1:53"), Split: []SplitDNS{split("10.0.0.1:53", "a.example"), split("10.0.0.2:53", "b.example")}},
			[]string{"10.0.0.1"}, []string{"~.", "~a.example"}, 1, []string{"10.0.0.1"}, 2},
		{"many", DNS{Servers: servers("10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53", "10.0.0.4:53")},
			[]string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"}, []string{"~."}, 0, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, 1},
	} {
		s, d, n := tt.dns.link()
		if !slices.Equal(s, tt.linkServers) || !slices.Equal(d, tt.linkNames) || len(n) != tt.linkNotes {
			t.Errorf("%s, for systemd-resolved: %v, %v, %q", tt.name, s, d, n)
		}
		s, _, n = tt.dns.file()
		if !slices.Equal(s, tt.fileServers) || len(n) != tt.fileNotes {
			t.Errorf("%s, for resolv.conf: %v, %q", tt.name, s, n)
		}
	}
}

func TestResolvConf(t *testing.T) {
	const before = "# of the host\n  nameserver\t192.0.2.53\r\nsearch lan\ndomain lan\noptions edns0\nnameserver ::1\n; x\nsortlist 10.0.0.0\nunknown"
	for _, tt := range []struct {
		servers, search []string
		want            string
	}{
		{[]string{"10.0.0.1", "fd00::1"}, []string{"a", "b"}, "#\nnameserver 10.0.0.1\nnameserver fd00::1\nsearch a b\noptions edns0\nsortlist 10.0.0.0\n"},
		{[]string{"10.0.0.1"}, nil, "#\nnameserver 10.0.0.1\nsearch lan\ndomain lan\noptions edns0\nsortlist 10.0.0.0\n"},
		{nil, []string{"a"}, "#\nsearch a\n  nameserver\t192.0.2.53\noptions edns0\nnameserver ::1\nsortlist 10.0.0.0\n"},
	} {
		if got := resolvConf(before, "#", tt.servers, tt.search); got != tt.want {
			t.Errorf("%v, %v:\n%s", tt.servers, tt.search, got)
		}
	}
	if got, want := nameservers(before), servers("192.0.2.53:53", "[::1]:53"); !slices.Equal(got, want) {
		t.Errorf("nameservers: %v, want %v", got, want)
	}
}
