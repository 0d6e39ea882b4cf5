package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

const (
	wantForwardListen = `a network, an address and a port of this machine, such as "tcp 127.0.0.1:8080"`
	wantForwardTo     = `a host and a port inside the VPN, such as "10.66.0.2:80"`
	wantPublishListen = `a network, an address of this node and a port, such as "tcp 10.66.0.1:80"`
	wantPublishTo     = `a host and a port that this machine reaches, such as "127.0.0.1:8000"`
)

var networks = []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"}

// port reads one [[forward]] or [[publish]] table.
func (r *reader) port(at string, raw *rawPort) (p Port) {
	forward := strings.HasPrefix(at, "forward")
	wantListen, wantTo := wantPublishListen, wantPublishTo
	if forward {
		wantListen, wantTo = wantForwardListen, wantForwardTo
	}
	if s, ok := r.text(at+".listen", raw.Listen, wantListen); ok {
		if network, address, two := strings.Cut(s, " "); !two || !slices.Contains(networks, network) {
			r.wrong(at+".listen", quoted(s)+" does not begin with a network", wantListen)
		} else {
			p.Network, p.Listen = network, strings.TrimSpace(address)
			// Port 0 makes sense for a forward: penstock status shows what it became.
			if problem := checkHostPort(p.Listen, true, forward); problem != "" {
				r.wrong(at+".listen", quoted(s)+" "+problem, wantListen)
			} else if problem := checkListen(p); problem != "" {
				r.wrong(at+".listen", quoted(s)+" "+problem, wantListen)
			}
		}
	} else if raw.Listen == nil {
		r.wrong(at+".listen", "is missing", wantListen)
	}
	if s, ok := r.text(at+".to", raw.To, wantTo); ok {
		p.To = s
		if problem := checkHostPort(s, false, false); problem != "" {
			r.wrong(at+".to", quoted(s)+" "+problem, wantTo)
		} else if host := hostAddr(s); host.IsUnspecified() || host.IsMulticast() {
			r.wrong(at+".to", quoted(s)+" is no address of a host", wantTo)
		}
	} else if raw.To == nil {
		r.wrong(at+".to", "is missing", wantTo)
	}
	return p
}

// ParseForward reads LISTEN=TO, what a [[forward]] table says in two keys: "tcp 127.0.0.1:8080=10.66.0.2:80". Without a
// network it is tcp.
func ParseForward(text string) (Port, error) {
	listen, to, ok := strings.Cut(text, "=")
	if !ok {
		return Port{}, fmt.Errorf("%s has no =; expected LISTEN=TO, such as %q", quoted(text), "tcp 127.0.0.1:8080=10.66.0.2:80")
	}
	listen, to = strings.TrimSpace(listen), strings.TrimSpace(to)
	if !strings.Contains(listen, " ") {
		listen = "tcp " + listen
	}
	r := &reader{index: &index{}}
	p := r.port("forward", &rawPort{Listen: listen, To: to})
	if len(r.mistakes) > 0 {
		m := r.mistakes[0]
		return p, fmt.Errorf("%s: %s; expected %s", quoted(text), m.Problem, m.Want)
	}
	return p, nil
}

// checkListen says why p cannot be listened on; its form is right already.
func checkListen(p Port) string {
	host, _, _ := net.SplitHostPort(p.Listen)
	a := hostAddr(p.Listen)
	switch {
	case host != "" && host != "localhost" && !a.IsValid():
		return "has a name where an address must be"
	case a.IsMulticast():
		return "has a multicast address"
	case a.IsValid() && p.family() != 0 && a.BitLen() != p.family():
		return "has an address of another family"
	}
	return ""
}

// family is the length in bits of the addresses a port is bound to by its
// network; 0 for both.
func (p Port) family() int {
	switch {
	case strings.HasSuffix(p.Network, "4"):
		return 32
	case strings.HasSuffix(p.Network, "6"):
		return 128
	}
	return 0
}

// hostAddr is the address in "host:port"; not valid when the host is a name or
// empty.
func hostAddr(s string) netip.Addr {
	host, _, err := net.SplitHostPort(s)
	if err != nil {
		return netip.Addr{}
	}
	a, _ := netip.ParseAddr(host)
	return a
}
