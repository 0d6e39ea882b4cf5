package hostnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

const (
	maxNameservers = 3 // MAXNS of resolv.h
	dnsPort        = 53
)

// link is the configuration as systemd-resolved takes it: servers for an interface, and domains that
// are searched or, with a tilde, only led to them. notes are what it cannot do.
func (d *DNS) link() (servers, domains, notes []string) {
	of := func(as []netip.AddrPort) (s []string) {
		for _, a := range as {
			if a.Port() == dnsPort {
				s = append(s, a.Addr().String())
			} else {
				s = append(s, a.String())
			}
		}
		return s
	}
	servers = of(d.Servers)
	domains = slices.Clone(d.Search)
	if len(servers) > 0 {
		domains = append(domains, "~.")
	}
	for _, s := range d.Split {
		its := of(s.Servers)
		switch {
		case len(d.Servers) == 0:
			if len(servers) > 0 && !slices.Equal(servers, its) {
				notes = append(notes, fmt.Sprintf("systemd-resolved asks any of the interface's servers for %s, not only %s",
					strings.Join(s.Domains, ", "), strings.Join(its, ", ")))
			}
			for _, a := range its {
				if !slices.Contains(servers, a) {
					servers = append(servers, a)
				}
			}
		case !slices.Equal(servers, its):
			notes = append(notes, fmt.Sprintf("systemd-resolved asks %s for %s too: an interface has one set of servers",
				strings.Join(servers, ", "), strings.Join(s.Domains, ", ")))
			continue
		}
		for _, name := range s.Domains {
			if !slices.Contains(domains, "~"+name) {
				domains = append(domains, "~"+name)
			}
		}
	}
	return servers, domains, notes
}

// file is the configuration as resolv.conf(5) takes it.
func (d *DNS) file() (servers, search, notes []string) {
	general := d.Servers
	for _, s := range d.Split {
		if len(general) == 0 && slices.Contains(s.Domains, ".") {
			general = s.Servers
			continue
		}
		notes = append(notes, fmt.Sprintf("%s: servers for some domains need systemd-resolved", strings.Join(s.Domains, ", ")))
	}
	for _, a := range general {
		switch {
		case a.Port() != dnsPort:
			notes = append(notes, fmt.Sprintf("%v: a server on another port than 53 needs systemd-resolved", a))
		case len(servers) == maxNameservers:
			notes = append(notes, fmt.Sprintf("%v: resolv.conf has %d servers at most", a, maxNameservers))
		default:
			servers = append(servers, a.Addr().String())
		}
	}
	return servers, d.Search, notes
}

// resolvConf is the content of a resolv.conf with those servers and search domains. What they leave
// open is as in before. The first line is for whoever finds the file after a crash.
func resolvConf(before, firstLine string, servers, search []string) string {
	var b strings.Builder
	b.WriteString(firstLine + "\n")
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(search) > 0 {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	for line := range strings.Lines(before) {
		line = strings.TrimRight(line, "\r\n")
		word, _, _ := strings.Cut(strings.TrimSpace(strings.ReplaceAll(line, "\t", " ")), " ")
		switch word {
		case "nameserver":
			if len(servers) > 0 {
				continue
			}
		case "search", "domain":
			if len(search) > 0 {
				continue
			}
		case "options", "sortlist":
		default:
			continue // comments are about what was
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

// nameservers are those of a resolv.conf.
func nameservers(conf string) (servers []netip.AddrPort) {
	for line := range strings.Lines(conf) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			servers = append(servers, netip.AddrPortFrom(a, dnsPort))
		}
	}
	return servers
}
