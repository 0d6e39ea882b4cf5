package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

const (
	wantTarget   = `a prefix that this machine reaches, such as "192.168.1.0/24" or "::/0"`
	wantRulePeer = `the name or the public key of a [[peer]]; without the key every peer fits`
	wantProtocol = `"tcp", "udp" or "icmp"`
	wantPorts    = `ports such as 443, "8000-8080" or [22, 80]`
	wantAction   = `"allow" or "deny"`
)

// maxFlows bounds the limits: a process has no more descriptors on most systems
// (fs.nr_open).
const maxFlows = 1 << 20

// router reads [router] with its [[router.rule]] tables; nil when the file has neither. The peers
// have been read.
func (r *reader) router(raw *rawRouter, peers []Peer) *netstack.RouterConfig {
	if _, written := r.index.kinds["router"]; !written {
		return nil
	}
	c := &netstack.RouterConfig{Allow: r.targets("router.allow", raw.Allow, wantTarget)}
	for i := range raw.Rule {
		c.Rules = append(c.Rules, r.rule(element("router.rule", i), &raw.Rule[i], peers))
	}
	allows := len(c.Allow) > 0 || !r.empty(raw.Allow)
	for i := range c.Rules {
		allows = allows || !c.Rules[i].Deny
	}
	if !allows {
		r.wrong("router", "allows nothing", `allow = ["192.168.1.0/24"], or a [[router.rule]] with action = "allow"`)
	}
	limit := func(key string, v any) int { return int(r.integer("router."+key, v, 1, maxFlows)) }
	c.Limits = netstack.RouterLimits{
		TCP: limit("tcp", raw.TCP), TCPPerPeer: limit("tcp_per_peer", raw.TCPPerPeer),
		HalfOpen: limit("half_open", raw.HalfOpen), HalfOpenPerPeer: limit("half_open_per_peer", raw.HalfOpenPerPeer),
		HalfOpenPerTarget: limit("half_open_per_target", raw.HalfOpenPerTarget),
		UDP:               limit("udp", raw.UDP), UDPPerPeer: limit("udp_per_peer", raw.UDPPerPeer),
		ICMP: limit("icmp", raw.ICMP), ICMPPerPeer: limit("icmp_per_peer", raw.ICMPPerPeer),
	}
	idle := func(key string, v any) time.Duration {
		return r.duration("router."+key, v, time.Second, 24*time.Hour, false)
	}
	c.Timeouts = netstack.RouterTimeouts{
		Dial:    r.duration("router.dial_timeout", raw.DialTimeout, 100*time.Millisecond, 5*time.Minute, false),
		UDPIdle: idle("udp_idle", raw.UDPIdle), DNSIdle: idle("dns_idle", raw.DNSIdle), ICMPIdle: idle("icmp_idle", raw.ICMPIdle),
	}
	return c
}

// targets reads a list of prefixes; want says of what kind.
func (r *reader) targets(path string, v any, want string) (prefixes []netip.Prefix) {
	for _, it := range r.texts(path, v, want) {
		p, problem := parsePrefix(it.text)
		switch {
		case problem != "":
			r.wrong(it.path, quoted(it.text)+" "+problem, want)
		case p != p.Masked():
			r.wrong(it.path, quoted(it.text)+" has bits set after its prefix",
				fmt.Sprintf("%v for the network or %v for the one address", p.Masked(), netip.PrefixFrom(p.Addr(), p.Addr().BitLen())))
		case p.Addr().IsMulticast():
			r.wrong(it.path, quoted(it.text)+" is multicast, which is not routed", want)
		case slices.Contains(prefixes, p):
			r.wrong(it.path, quoted(it.text)+" is there twice", "each prefix once")
		}
		prefixes = append(prefixes, p)
	}
	return prefixes
}

// rulePrefixes reads the prefixes of a rule; what names what they are.
func (r *reader) rulePrefixes(path string, v any, want, what string) []netip.Prefix {
	if v != nil && r.empty(v) {
		r.wrong(path, "is an empty list", want+"; without the key every "+what+" fits")
	}
	return r.targets(path, v, want)
}

func (r *reader) rule(at string, raw *rawRule, peers []Peer) (rule netstack.RouterRule) {
	rule.Deny = r.action(at+".action", raw.Action)
	rule.Peer = r.rulePeer(at+".peer", raw.Peer, peers)
	if s, ok := r.text(at+".protocol", raw.Protocol, wantProtocol); ok {
		if rule.Protocol = s; s != "tcp" && s != "udp" && s != "icmp" {
			r.wrong(at+".protocol", quoted(s)+" is no protocol that is routed", wantProtocol)
		}
	}
	rule.Ports = r.rulePorts(at+".ports", raw.Ports, rule.Protocol)
	rule.To = r.rulePrefixes(at+".to", raw.To, wantTarget, "target")
	return rule
}

// ports reads a number, a range in a string, or a list of them.
func (r *reader) ports(path string, v any) (ranges []netstack.PortRange) {
	if v == nil {
		return nil
	}
	list, isList := v.([]any)
	if isList && len(list) == 0 {
		r.wrong(path, "is an empty list", wantPorts+"; without the key every port fits")
	}
	if !isList {
		if p, ok := r.portRange(path, v); ok {
			ranges = append(ranges, p)
		}
		return ranges
	}
	for i, e := range list {
		if p, ok := r.portRange(element(path, i), e); ok {
			ranges = append(ranges, p)
		}
	}
	return ranges
}

func (r *reader) portRange(path string, v any) (p netstack.PortRange, ok bool) {
	switch v := v.(type) {
	case int64:
		if v < 1 || v > 65535 {
			r.wrong(path, fmt.Sprintf("is %d", v), wantPorts)
			return p, false
		}
		return netstack.PortRange{First: uint16(v), Last: uint16(v)}, true
	case string:
		first, last, isRange := strings.Cut(v, "-")
		if !isRange {
			last = first
		}
		a, err1 := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
		b, err2 := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
		if err1 != nil || err2 != nil || a == 0 || b < a {
			r.wrong(path, quoted(v)+" is no range of ports", wantPorts)
			return p, false
		}
		return netstack.PortRange{First: uint16(a), Last: uint16(b)}, true
	}
	r.wrong(path, "is "+typeOf(v), wantPorts)
	return p, false
}
