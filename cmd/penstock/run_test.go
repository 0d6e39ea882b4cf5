package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/netstack"
)

func TestParsePublish(t *testing.T) {
	for text, want := range map[string]string{
		"8080":              "127.0.0.1:8080 8080",
		"8080:80":           "127.0.0.1:8080 80",
		"0.0.0.0:8080:80":   "0.0.0.0:8080 80",
		"192.0.2.1:80":      "192.0.2.1:80 80",
		"[::1]:8080:80":     "[::1]:8080 80",
		"[2001:db8::1]:443": "[2001:db8::1]:443 443",
		"":                  "", ":": "", "0": "", "65536": "", "80:0": "", "80:": "", ":80": "", "a": "", "80:80:80": "",
		"1.2.3:80:80": "", "[::1]": "", "[::1:80": "", "::1:80:80": "", "host:80:80": "", "1.2.3.4": "", "-1": "",
	} {
		got := ""
		if all, err := parsePublish([]string{text}); err == nil {
			got = fmt.Sprint(all[0].Listen, " ", all[0].Port)
		} else if !strings.Contains(err.Error(), fmt.Sprintf("%q", text)) {
			t.Errorf("%q: %v", text, err)
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// What a resolv.conf cannot say is said to the user.
func TestSandboxConfig(t *testing.T) {
	ap, p := netip.MustParseAddrPort, netip.MustParsePrefix
	c := &config.Config{Peers: []config.Peer{{AllowedIPs: []netip.Prefix{p("10.0.0.0/8")}}, {AllowedIPs: []netip.Prefix{p("fd00::/8")}}}}
	c.DNS = netstack.DNS{
		Servers: []netip.AddrPort{ap("10.0.0.1:53"), ap("10.0.0.2:5353")}, Search: []string{"a.test"},
		Split: []netstack.SplitDNS{{Domains: []string{"b.test"}, Servers: []netip.AddrPort{ap("10.0.0.3:53")}}, {Domains: []string{"c.test"}, ViaHost: true}},
	}
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	box := sandboxConfig(c, log, []string{"program", "-x"})
	if fmt.Sprintln(box.Servers, box.Routes, box.Search, box.Program, box.Args, box.MTU) != "[10.0.0.1] [10.0.0.0/8 fd00::/8] [a.test] program [-x] 1400\n" {
		t.Errorf("%+v", box)
	}
	for _, want := range []string{"10.0.0.2:5353", "b.test", "c.test"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("nothing was said about %s: %s", want, &logged)
		}
	}
	c.DNS.Split = []netstack.SplitDNS{{Domains: []string{"."}, Servers: []netip.AddrPort{ap("10.0.0.9:53")}}}
	if box := sandboxConfig(c, log, []string{"program"}); fmt.Sprint(box.Servers) != "[10.0.0.9]" {
		t.Errorf("%+v", box.Servers)
	}
}

// A server with split DNS has servers for some domains alone: the program has no others that it could ask.
func TestInsideConfigSplitDNS(t *testing.T) {
	given := netstack.OpenConnectNetwork{DNS: netstack.DNS{
		Search: []string{"corp.test"},
		Split:  []netstack.SplitDNS{{Domains: []string{"corp.test"}, Servers: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:53")}}},
	}}
	box := insideConfig(given, slog.New(slog.DiscardHandler), []string{"program"})
	if fmt.Sprint(box.Servers, box.Search) != "[10.0.0.1] [corp.test]" {
		t.Errorf("servers %v, search %v", box.Servers, box.Search)
	}
	if len(given.DNS.Servers) != 0 {
		t.Error("the node's own servers are changed")
	}
}
