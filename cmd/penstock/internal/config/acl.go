package config

import (
	"slices"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

const (
	wantDirection   = `"in", from peers, or "out", to them; without the key both`
	wantACLPrefix   = `a prefix inside the VPN, such as "10.66.0.0/24" or "fd66::1/128"`
	wantACLProtocol = `"tcp", "udp" or "icmp", which is ping; without the key every protocol`
)

// maxFilterFlows bounds filter.flows: 400 MB.
const maxFilterFlows = 1 << 22

// acl reads one [[acl]] table. The peers have been read.
func (r *reader) acl(at string, raw *rawACL, peers []Peer) (rule netstack.ACLRule) {
	rule.Deny = r.action(at+".action", raw.Action)
	if s, ok := r.text(at+".direction", raw.Direction, wantDirection); ok {
		if rule.Direction = s; s != "in" && s != "out" {
			r.wrong(at+".direction", quoted(s)+" is no direction", wantDirection)
		}
	}
	rule.Peer = r.rulePeer(at+".peer", raw.Peer, peers)
	if s, ok := r.text(at+".protocol", raw.Protocol, wantACLProtocol); ok {
		if rule.Protocol = s; s != "tcp" && s != "udp" && s != "icmp" {
			r.wrong(at+".protocol", quoted(s)+" is no protocol that has a name here", wantACLProtocol)
		}
	}
	rule.Ports = r.rulePorts(at+".ports", raw.Ports, rule.Protocol)
	rule.From = r.rulePrefixes(at+".from", raw.From, wantACLPrefix, "source")
	rule.To = r.rulePrefixes(at+".to", raw.To, wantACLPrefix, "target")
	return rule
}

// filter reads [filter].
func (r *reader) filter(raw *rawFilter, rules int) (l netstack.ACLLimits) {
	if _, written := r.index.kinds["filter"]; written && rules == 0 {
		r.wrong("filter", "has nothing to bound", "an [[acl]]; without one everything passes and nothing is remembered")
	}
	idle := func(key string, v any) time.Duration {
		return r.duration("filter."+key, v, time.Second, 7*24*time.Hour, false)
	}
	l = netstack.ACLLimits{
		Flows:        int(r.integer("filter.flows", raw.Flows, 1, maxFilterFlows)),
		FlowsPerPeer: int(r.integer("filter.flows_per_peer", raw.FlowsPerPeer, 1, maxFilterFlows)),
		TCPIdle:      idle("tcp_idle", raw.TCPIdle),
		UDPIdle:      idle("udp_idle", raw.UDPIdle),
	}
	return l
}

// action reads "allow" or "deny".
func (r *reader) action(path string, v any) (deny bool) {
	s, ok := r.text(path, v, wantAction)
	switch {
	case v == nil:
		r.wrong(path, "is missing", wantAction)
	case ok && s != "allow" && s != "deny":
		r.wrong(path, quoted(s)+" is no action", wantAction)
	}
	return s == "deny"
}

// rulePeer reads the name or the key of a peer; zero when it is absent.
func (r *reader) rulePeer(path string, v any, peers []Peer) (k netstack.PublicKey) {
	if s, ok := r.text(path, v, wantRulePeer); ok {
		i := slices.IndexFunc(peers, func(p Peer) bool { return p.Name == s || p.PublicKey.String() == s })
		if i < 0 {
			r.wrong(path, quoted(s)+" is no peer", wantRulePeer)
			return k
		}
		k = peers[i].PublicKey
	}
	return k
}

// rulePorts reads the ports of a rule for protocol.
func (r *reader) rulePorts(path string, v any, protocol string) []netstack.PortRange {
	if protocol == "icmp" && v != nil {
		r.wrong(path, "is there beside icmp, which has none", "protocol tcp or udp, or no ports")
	}
	return r.ports(path, v)
}
