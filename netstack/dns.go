package netstack

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// DNS says who resolves names for a [Node]: for Dial, for forwards, for proxies. The zero
// value leaves it to the system.
//
// A name goes to the rule of Split with the longest domain that it is in, else to
// Servers, else to the system. The hosts file of the machine applies only where the
// system resolves.
type DNS struct {
	// Servers are reached through the VPN. The one that answered last is asked first.
	Servers []netip.AddrPort
	// Search are domains to complete a name with: before the name as it is when it has no
	// dot, after it otherwise. A name that ends in a dot is complete.
	Search []string
	Split  []SplitDNS
}

// SplitDNS sends the names of some domains to servers of their own.
type SplitDNS struct {
	// Domains stand for themselves and everything below; "." for all names.
	Domains []string
	Servers []netip.AddrPort
	// ViaHost asks over the host's network instead of the VPN, and without Servers
	// leaves the names to the system.
	ViaHost bool
}

// maxSearch bounds what one mistyped name costs. The system's resolvers stop at 6
// (MAXDNSRCH of glibc before 2.26).
const maxSearch = 16

func (d *DNS) empty() bool { return len(d.Servers) == 0 && len(d.Split) == 0 }

func (d *DNS) validate(bad complain) {
	checkServers(bad, "DNS.Servers", d.Servers)
	if len(d.Search) > maxSearch {
		bad("DNS.Search", strconv.Itoa(len(d.Search))+" domains", fmt.Sprintf("at most %d", maxSearch))
	}
	checkDomains(bad, "DNS.Search", d.Search, false)
	seen := map[string]bool{}
	for i, s := range d.Split {
		key := index("DNS.Split", i)
		if len(s.Domains) == 0 {
			bad(key+".Domains", "", "at least one domain such as corp.example")
		}
		checkDomains(bad, key+".Domains", s.Domains, true)
		for j, name := range s.Domains {
			if seen[canonical(name)] {
				bad(index(key+".Domains", j), strconv.Quote(name), "each domain once")
			}
			seen[canonical(name)] = true
		}
		checkServers(bad, key+".Servers", s.Servers)
		if len(s.Servers) == 0 && !s.ViaHost {
			bad(key+".Servers", "", "at least one address and port such as 10.66.0.1:53, or ViaHost")
		}
	}
}

func checkServers(bad complain, key string, servers []netip.AddrPort) {
	for i, a := range servers {
		if !a.IsValid() || a.Addr().IsUnspecified() || a.Port() == 0 {
			bad(index(key, i), a.String(), "an address and port such as 10.66.0.1:53")
		}
	}
}

func checkDomains(bad complain, key string, domains []string, root bool) {
	for i, name := range domains {
		if !isName(canonical(name)) && !(root && name == ".") {
			bad(index(key, i), strconv.Quote(name), "a domain such as corp.example")
		}
	}
}

// canonical is a name in lower case without the dot at its end.
func canonical(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// isName tells whether name, without a dot at its end, fits the DNS: labels of 1 to 63
// bytes, 253 in all (RFC 1035 2.3.4). What is in the labels is for the servers to judge.
func isName(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 {
			return false
		}
	}
	return true
}

// A dnsRule says who is asked for the names of a domain.
type dnsRule struct {
	domain  string // canonical; "" for all names
	servers []netip.AddrPort
	viaHost bool
	// of is the system's server that a resolver has chosen, and which alone is asked. What it says, or that it does not
	// answer, is nothing about the next.
	of netip.AddrPort
}

// rules are those of d, the longest domain first.
func (d *DNS) rules() (rules []*dnsRule) {
	for _, s := range d.Split {
		for _, name := range s.Domains {
			rules = append(rules, &dnsRule{domain: canonical(name), servers: s.Servers, viaHost: s.ViaHost})
		}
	}
	if len(d.Servers) > 0 {
		rules = append(rules, &dnsRule{servers: d.Servers}) // after a Split of ".", which sorting keeps
	}
	slices.SortStableFunc(rules, func(a, b *dnsRule) int { return len(b.domain) - len(a.domain) })
	return rules
}

// covers tells whether a canonical name is in the rule's domain.
func (r *dnsRule) covers(name string) bool {
	rest, ok := strings.CutSuffix(name, r.domain)
	return ok && (rest == "" || r.domain == "" || strings.HasSuffix(rest, "."))
}

// system tells whether names of this rule are the system's to resolve.
func (r *dnsRule) system() bool { return r == nil || len(r.servers) == 0 }
