package config

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/penstock-vpn/penstock/netstack"
)

const (
	wantPeerKey  = "44 characters of base64, as penstock pubkey prints them"
	wantEndpoint = `a host and a UDP port, such as "b.example.net:5182" or "[2001:db8::2]:5182"`
	wantAllowed  = `an address or a prefix behind the peer, such as "10.66.0.2/32" or "fd66::/64"`
	wantKnownAs  = `an address, such as "192.0.2.7", at most one of each family`
)

// maxName keeps the tables of penstock status readable.
const maxName = 64

func (r *reader) peer(at string, raw *rawPeer) (p Peer) {
	if s, ok := r.text(at+".name", raw.Name, "a short name"); ok {
		if p.Name = s; len(s) > maxName || strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f || c == '\uFFFD' }) {
			r.wrong(at+".name", quoted(s)+" is not fit to print", fmt.Sprintf("a short name of at most %d bytes", maxName))
		}
	}
	if s, ok := r.text(at+".public_key", raw.PublicKey, wantPeerKey); ok {
		k, err := netstack.ParsePublicKey(s)
		if p.PublicKey = k; err != nil || k.IsZero() {
			r.wrong(at+".public_key", quoted(s)+" is not a key", wantPeerKey)
		}
	} else if raw.PublicKey == nil {
		r.wrong(at+".public_key", "is missing", wantPeerKey)
	}
	if s, ok := r.text(at+".endpoint", raw.Endpoint, wantEndpoint); ok {
		if problem := checkHostPort(s, false, false); problem != "" {
			r.wrong(at+".endpoint", quoted(s)+" "+problem, wantEndpoint)
		}
		p.Endpoint = s
	}
	allowed := r.texts(at+".allowed_ips", raw.AllowedIPs, wantAllowed)
	if len(allowed) == 0 && r.empty(raw.AllowedIPs) {
		r.wrong(at+".allowed_ips", "is missing", wantAllowed)
	}
	for _, it := range allowed {
		a, problem := parsePrefix(it.text)
		switch {
		case problem != "":
			r.wrong(it.path, quoted(it.text)+" "+problem, wantAllowed)
			a = netip.Prefix{} // holds its place in the list, for the positions
		case a != a.Masked():
			r.wrong(it.path, quoted(it.text)+" has bits set after its prefix",
				fmt.Sprintf("%v for the network or %v for the one address", a.Masked(), netip.PrefixFrom(a.Addr(), a.Addr().BitLen())))
		case a.Addr().IsMulticast():
			r.wrong(it.path, quoted(it.text)+" is multicast, which no peer is sent", wantAllowed)
		}
		p.AllowedIPs = append(p.AllowedIPs, a)
	}
	for _, it := range r.texts(at+".known_as", raw.KnownAs, wantKnownAs) {
		a, err := netip.ParseAddr(it.text)
		if err != nil {
			r.wrong(it.path, quoted(it.text)+" is not an address", wantKnownAs)
			continue
		}
		if u := unusable(a); u != "" {
			r.wrong(it.path, quoted(it.text)+" is "+u, wantKnownAs)
		}
		for _, before := range p.KnownAs {
			if before.Is4() == a.Is4() {
				r.wrong(it.path, quoted(it.text)+" is of the same family as "+before.String(), wantKnownAs)
			}
		}
		p.KnownAs = append(p.KnownAs, a)
	}
	return p
}

// checkHostPort says what is wrong with "host:port". The host may be empty, and
// the port 0, only where that is allowed.
func checkHostPort(s string, emptyHost, zeroPort bool) (problem string) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		if a, err := netip.ParseAddr(s); err == nil && a.Is6() {
			return "needs brackets around the IPv6 address, and a port"
		}
		if !strings.Contains(s, ":") {
			return "has no port"
		}
		return "is not a host and a port"
	}
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case port == "":
		return "has no port"
	case err != nil:
		return "has no port from 1 to 65535"
	case n == 0 && !zeroPort:
		return "has port 0"
	case host == "":
		if !emptyHost {
			return "has no host"
		}
	default:
		if a, err := netip.ParseAddr(host); err == nil {
			if a.Is4In6() {
				return "has an IPv4 address written as IPv6"
			}
		} else if !isHostName(host) {
			return "has a host that is neither an address nor a name"
		}
	}
	return ""
}

// isHostName tells whether s may be looked up: labels of letters, digits, hyphens
// and underscores (RFC 1123 2.1, and what is seen in practice), not all digits at
// the end, which would be an address gone wrong.
func isHostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return false
		}
		for _, c := range []byte(l) {
			if lower(c) < 'a' || lower(c) > 'z' {
				if (c < '0' || c > '9') && c != '-' && c != '_' {
					return false
				}
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}
