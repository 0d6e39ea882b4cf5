package config

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/penstock-vpn/penstock/netstack"
)

const (
	wantServer = `the address of a server, such as "10.66.0.2" or "10.66.0.2:53"`
	wantDomain = `a domain, such as "corp.example"`
	maxSearch  = 16 // netstack's bound
)

// dns reads [dns] with its [[dns.split]] tables.
func (r *reader) dns(raw *rawDNS) (d netstack.DNS) {
	d.Servers = r.servers("dns.servers", raw.Servers)
	for _, it := range r.texts("dns.search", raw.Search, wantDomain) {
		if name, ok := r.domain(it, false); ok {
			d.Search = append(d.Search, name)
		}
	}
	if len(d.Search) > maxSearch {
		r.wrong("dns.search", fmt.Sprintf("has %d domains", len(d.Search)), fmt.Sprintf("at most %d", maxSearch))
	}
	seen := map[string]bool{}
	for i := range raw.Split {
		at := element("dns.split", i)
		s := netstack.SplitDNS{Servers: r.servers(at+".servers", raw.Split[i].Servers)}
		items := r.texts(at+".domains", raw.Split[i].Domains, wantDomain)
		if len(items) == 0 && r.empty(raw.Split[i].Domains) {
			r.wrong(at+".domains", "is missing", wantDomain)
		}
		for _, it := range items {
			name, ok := r.domain(it, true)
			if ok && seen[name] {
				r.wrong(it.path, quoted(it.text)+" is there twice", "each domain once")
			}
			seen[name] = true
			s.Domains = append(s.Domains, name)
		}
		const wantVia = `"vpn" or "host"`
		if via, ok := r.text(at+".via", raw.Split[i].Via, wantVia); ok {
			if s.ViaHost = via == "host"; !s.ViaHost && via != "vpn" {
				r.wrong(at+".via", quoted(via)+" is no way to a server", wantVia)
			}
		}
		if len(s.Servers) == 0 && !s.ViaHost && r.empty(raw.Split[i].Servers) {
			r.wrong(at+".servers", "is missing", wantServer+`, or via = "host" to leave the names to the system`)
		}
		d.Split = append(d.Split, s)
	}
	return d
}

// domain reads a domain and gives it in lower case without the dot at its end; root lets "."
// stand for all names.
func (r *reader) domain(it item, root bool) (string, bool) {
	if root && it.text == "." {
		return it.text, true
	}
	name := strings.ToLower(strings.TrimSuffix(it.text, "."))
	// What is no part of a name (RFC 1123 2.1, and underscores) would end in a resolv.conf as something else.
	bad := len(name) > 253 || strings.ContainsFunc(name, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.'
	})
	for label := range strings.SplitSeq(name, ".") {
		bad = bad || label == "" || len(label) > 63
	}
	if bad {
		r.wrong(it.path, quoted(it.text)+" is no domain", wantDomain)
	}
	return name, !bad
}

// servers reads a list of name servers.
func (r *reader) servers(path string, v any) (servers []netip.AddrPort) {
	for _, it := range r.texts(path, v, wantServer) {
		ap, err := netip.ParseAddrPort(it.text)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(it.text); err == nil {
				ap = netip.AddrPortFrom(a, 53)
			}
		}
		switch {
		case err != nil:
			r.wrong(it.path, quoted(it.text)+" is not an address", wantServer)
		case ap.Port() == 0 || unusable(ap.Addr()) != "" && !ap.Addr().IsLoopback():
			r.wrong(it.path, quoted(it.text)+" cannot be a server", wantServer)
			ap = netip.AddrPort{} // holds its place in the list, for the positions
		}
		servers = append(servers, ap)
	}
	return servers
}

// serversTogether finds servers that are to be reached through the VPN and cannot be.
func (r *reader) serversTogether(c *Config) {
	check := func(path string, servers []netip.AddrPort) {
		for i, s := range servers {
			if s.IsValid() && !c.carried(s.Addr()) && !c.own(s.Addr()) {
				r.wrong(element(path, i), "no peer carries "+s.Addr().String(), "an address within some peer's allowed_ips")
			}
		}
	}
	check("dns.servers", c.DNS.Servers)
	for i, s := range c.DNS.Split {
		if !s.ViaHost {
			check(element("dns.split", i)+".servers", s.Servers)
		}
	}
}
