package config

import (
	"fmt"
	"net/netip"

	"github.com/penstock-vpn/penstock/netstack"
)

// together finds what is wrong between the parts of a file, each of which may be
// right by itself.
func (r *reader) together(c *Config) {
	r.peersTogether(c)
	r.portsTogether("forward", c.Forwards)
	r.portsTogether("publish", c.Publishes)
	r.proxyTogether(&c.Proxy)
	r.routesTogether(c)
	if len(c.Node.Addresses) == 0 {
		return // reported already, and nothing can be said without them
	}
	for i, p := range c.Publishes {
		if a := hostAddr(p.Listen); a.IsValid() && !a.IsUnspecified() && !c.own(a) {
			r.wrong(element("publish", i)+".listen", a.String()+" is not an address of this node", "one of node.address")
		}
	}
	for i, p := range c.Forwards {
		if a := hostAddr(p.To); a.IsValid() && !c.own(a) && !c.carried(a) {
			r.wrong(element("forward", i)+".to", "no peer carries "+a.String(), "an address within some peer's allowed_ips")
		}
	}
	r.serversTogether(c)
}

func (r *reader) peersTogether(c *Config) {
	var own netstack.PublicKey
	if !c.Node.PrivateKey.IsZero() {
		own = c.Node.PrivateKey.Public()
	}
	names := map[string]int{}
	keys := map[netstack.PublicKey]int{}
	prefixes := map[netip.Prefix]int{}
	for i, p := range c.Peers {
		at := element("peer", i)
		if p.Name != "" {
			if j, twice := names[p.Name]; twice {
				r.wrong(at+".name", quoted(p.Name)+" is also the peer on "+r.lineOf(j, "name"), "a name of its own")
			} else {
				names[p.Name] = i
			}
		}
		if !p.PublicKey.IsZero() {
			if j, twice := keys[p.PublicKey]; twice {
				r.wrong(at+".public_key", "is also the key of the peer on "+r.lineOf(j, "public_key"), "each peer once")
			} else {
				keys[p.PublicKey] = i
			}
			if p.PublicKey == own {
				r.wrong(at+".public_key", "is the key of this node itself", "the public key of the other side")
			}
		}
		for k, a := range p.AllowedIPs {
			at := element(at+".allowed_ips", k)
			if !a.IsValid() {
				continue
			}
			if a.IsSingleIP() && c.own(a.Addr()) {
				r.wrong(at, a.String()+" is this node's own address", "addresses behind the peer")
			}
			if j, twice := prefixes[a.Masked()]; twice && j == i {
				r.wrong(at, a.String()+" is there twice", "each prefix once")
			} else if twice {
				r.wrong(at, a.String()+" also belongs to the peer on "+r.lineOf(j, "allowed_ips"),
					"each prefix with one peer (a longer prefix within it may be another's)")
			} else {
				prefixes[a.Masked()] = i
			}
		}
		if p.Endpoint == "" && len(c.Node.Listen) == 0 && r.index.at["node.listen"] == 0 {
			r.wrong(at+".endpoint", "is missing, and node.listen too, so neither side can call the other", "one of them")
		}
	}
}

// routesTogether warns of endpoints to which the routes without rules lead through the tunnel itself. A longer route of
// the host's own may lead elsewhere, and what a name stands for is not known here.
func (r *reader) routesTogether(c *Config) {
	if c.TUN == nil || c.TUN.Routes == RoutesAuto || c.TUN.Routes == RoutesNone {
		return
	}
	for i, p := range c.Peers {
		if a := hostAddr(p.Endpoint); a.IsValid() && c.carried(a) {
			r.warn(element("peer", i)+".endpoint", a.String()+" is within allowed_ips: the tunnel's own packets would go into the tunnel", `routes = "auto" in [tun]`)
		}
	}
}

// lineOf says where a key of the j-th peer stands.
func (r *reader) lineOf(j int, key string) string {
	return fmt.Sprintf("line %d", r.index.line(element("peer", j)+"."+key))
}

// portsTogether finds two tables that listen on the same port. Port 0 is another
// one each time.
func (r *reader) portsTogether(kind string, ports []Port) {
	seen := map[string]int{}
	for i, p := range ports {
		if p.Listen == "" || p.zeroPort() {
			continue
		}
		key := p.Network[:3] + " " + p.Listen
		if j, twice := seen[key]; twice {
			r.wrong(element(kind, i)+".listen", fmt.Sprintf("is taken by the one on line %d", r.index.line(element(kind, j)+".listen")), "a port of its own")
			continue
		}
		seen[key] = i
	}
}

func (p Port) zeroPort() bool { return len(p.Listen) > 1 && p.Listen[len(p.Listen)-2:] == ":0" }

func (c *Config) own(a netip.Addr) bool {
	for _, p := range c.Node.Addresses {
		if p.Addr() == a {
			return true
		}
	}
	return false
}

// carried tells whether packets to a go to some peer.
func (c *Config) carried(a netip.Addr) bool {
	for _, p := range c.Peers {
		for _, prefix := range p.AllowedIPs {
			if prefix.Contains(a) {
				return true
			}
		}
	}
	return false
}
