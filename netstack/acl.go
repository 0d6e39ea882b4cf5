package netstack

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// ACLRule decides about the flows that fit all of its conditions: which packets of the node's stack, its
// router and its interface of the kernel pass to peers, and which of peers pass to them. The first rule of
// Config.ACL that fits the first packet of a flow decides; what follows in the flow, both
// ways, needs no rule. Unless there are no rules at all, what fits none is dropped.
type ACLRule struct {
	Deny bool // allow otherwise

	Direction string    // of the flow's first packet: "in", from a peer, "out", to one, or "", either
	Peer      PublicKey // zero: any
	Group     string    // that of a session, as given to [Node.AddSession]; empty: any, and peers
	// Protocol is "tcp", "udp" or "icmp", which is ping; empty: every one, those without a name here
	// included.
	Protocol string
	Ports    []PortRange    // of the target, TCP and UDP only; empty: any
	From     []netip.Prefix // the source; empty: any
	To       []netip.Prefix // the target; empty: any. The node's own addresses are those in Config.Addresses.
}

// ACLLimits bound what the rules of Config.ACL make the node remember. 0 is a default.
type ACLLimits struct {
	// Flows at once, and those with one peer. What begins more is dropped: the old ones are
	// somebody's work.
	Flows, FlowsPerPeer int
	// TCPIdle is the silence after which a connection is forgotten, and UDPIdle after which
	// any other flow is that was answered, ping excepted.
	TCPIdle, UDPIdle time.Duration
	// Stateless: nothing is remembered. The rules, which then have no Protocol and no Ports, decide about each packet
	// by its addresses, and what they let through one way needs one for the way back too.
	Stateless bool
}

// validate reports what is wrong with the rules and limits.
func (c *Config) validateACL(bad complain) {
	prefixes := func(key string, ps []netip.Prefix) {
		for i, p := range ps {
			if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() {
				bad(index(key, i), p.String(), "a prefix such as 192.168.1.0/24 or 2001:db8:1::/48")
			}
		}
	}
	for i := range c.ACL {
		r, key := &c.ACL[i], index("ACL", i)
		switch r.Direction {
		case "", "in", "out":
		default:
			bad(key+".Direction", strconv.Quote(r.Direction), `"in", "out" or ""`)
		}
		switch r.Protocol {
		case "", "tcp", "udp":
		case "icmp":
			if len(r.Ports) > 0 {
				bad(key+".Ports", "", "nothing with the protocol icmp")
			}
		default:
			bad(key+".Protocol", strconv.Quote(r.Protocol), `"tcp", "udp", "icmp" or ""`)
		}
		for j, p := range r.Ports {
			if p.First == 0 || p.Last < p.First {
				bad(index(key+".Ports", j), fmt.Sprintf("%d-%d", p.First, p.Last), "a range such as 80-90, from 1 on")
			}
		}
		if c.ACLLimits.Stateless && (r.Protocol != "" || len(r.Ports) > 0) {
			bad(key, r.Protocol, "no protocol and no ports, as ACLLimits.Stateless is set")
		}
		prefixes(key+".From", r.From)
		prefixes(key+".To", r.To)
	}
	l := &c.ACLLimits
	for _, v := range []struct {
		key string
		n   int
	}{{"Flows", l.Flows}, {"FlowsPerPeer", l.FlowsPerPeer}} {
		if v.n < 0 {
			bad("ACLLimits."+v.key, strconv.Itoa(v.n), "a number above 0, or 0 for the default")
		}
	}
	for _, v := range []struct {
		key string
		d   time.Duration
	}{{"TCPIdle", l.TCPIdle}, {"UDPIdle", l.UDPIdle}} {
		if v.d < 0 {
			bad("ACLLimits."+v.key, v.d.String(), "a time above 0, or 0 for the default")
		}
	}
}

// newFilter makes the packet filter of the rules, nil if there are none. It knows no peers yet.
func (c *Config) newFilter() (*tunwrap.Filter, error) {
	if len(c.ACL) == 0 {
		return nil, nil
	}
	o := tunwrap.FilterOptions{
		Flows: c.ACLLimits.Flows, FlowsPerPeer: c.ACLLimits.FlowsPerPeer,
		TCPIdle: c.ACLLimits.TCPIdle, UDPIdle: c.ACLLimits.UDPIdle, Stateless: c.ACLLimits.Stateless,
	}
	for i := range c.ACL {
		r := &c.ACL[i]
		f := tunwrap.FilterRule{Deny: r.Deny, Group: r.Group, Protocol: r.Protocol, From: slices.Clone(r.From), To: slices.Clone(r.To)}
		switch r.Direction {
		case "in":
			f.Direction = tunwrap.Inbound
		case "out":
			f.Direction = tunwrap.Outbound
		}
		if !r.Peer.IsZero() {
			f.Peer = r.Peer.String()
		}
		for _, p := range r.Ports {
			f.Ports = append(f.Ports, tunwrap.PortRange(p))
		}
		o.Rules = append(o.Rules, f)
	}
	return tunwrap.NewFilter(o)
}

// applyACL tells the packet filter whose which addresses are: peers', members', and what is behind an
// OpenConnect server. n.mu is held.
func (n *Node) applyACL(peers []Peer) error {
	if n.filter == nil {
		return nil
	}
	fs := make([]tunwrap.FilterPeer, 0, 1+len(n.members)+len(peers))
	fs = append(fs, tunwrap.FilterPeer{ID: "behind the server", Prefixes: n.behindServer})
	for m := range n.members {
		fs = append(fs, tunwrap.FilterPeer{ID: fmt.Sprintf("session %p", m), Group: m.group, Prefixes: m.allowed})
	}
	for _, p := range peers {
		fs = append(fs, tunwrap.FilterPeer{ID: p.PublicKey.String(), Prefixes: p.AllowedIPs})
	}
	return n.filter.SetPeers(fs)
}

// followMembers is applyACL after a member has come or gone, whose prefixes are checked elsewhere. n.mu is
// held.
func (n *Node) followMembers() {
	if err := n.applyACL(n.peers); err != nil {
		n.log.Warn("the packet filter does not know all members", "err", err)
	}
}

// ACLStatus is about the packet filter. A superpacket counts as one packet; bytes are those of IP packets.
type ACLStatus struct {
	Rules []ACLRuleStatus `json:"rules"` // in order
	// Stateless: there are no flows, and the numbers about them are 0.
	Stateless bool `json:"stateless,omitempty"`
	// Flows is how many are remembered now, and the others how many may be.
	Flows            int `json:"flows"`
	FlowLimit        int `json:"flow_limit"`
	FlowLimitPerPeer int `json:"flow_limit_per_peer"`
	// Known are packets that passed as part of a flow; they are counted by its rule too.
	Known ACLCount `json:"known"`
	// What was dropped by no rule: what no rule fits; what only a known flow may have and
	// belongs to none, or never passes; and what would have been a flow too many.
	NoRule  ACLCount `json:"no_rule"`
	Unknown ACLCount `json:"unknown"`
	Full    ACLCount `json:"full"`
}

// ACLRuleStatus counts what a rule has decided: of one that allows all packets of its flows, both ways,
// of one that denies those dropped.
type ACLRuleStatus struct {
	Rule     string   `json:"rule"`  // in words
	Flows    uint64   `json:"flows"` // that it has allowed
	Outbound ACLCount `json:"outbound"`
	Inbound  ACLCount `json:"inbound"`
}

// ACLCount counts packets.
type ACLCount struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// aclStatus is nil if there are no rules.
func (n *Node) aclStatus() *ACLStatus {
	if n.filter == nil {
		return nil
	}
	f := n.filter.Stats()
	s := &ACLStatus{
		Stateless: n.cfg.ACLLimits.Stateless, Flows: f.Flows, FlowLimit: f.Limit, FlowLimitPerPeer: f.LimitPerPeer,
		Known: ACLCount(f.Known), NoRule: ACLCount(f.NoRule), Unknown: ACLCount(f.Unknown), Full: ACLCount(f.Full),
	}
	n.mu.Lock()
	names := make(map[PublicKey]string, len(n.peers))
	for _, p := range n.peers {
		names[p.PublicKey] = p.Name
	}
	n.mu.Unlock()
	for i, r := range f.Rules {
		s.Rules = append(s.Rules, ACLRuleStatus{
			Rule: n.cfg.ACL[i].words(names), Flows: r.Flows, Outbound: ACLCount(r.Outbound), Inbound: ACLCount(r.Inbound),
		})
	}
	return s
}

// words is the rule as one would say it.
func (r *ACLRule) words(names map[PublicKey]string) string {
	w := []string{"allow"}
	if r.Deny {
		w[0] = "deny"
	}
	add := func(word, value string) {
		if value != "" {
			w = append(w, strings.TrimSpace(word+" "+value))
		}
	}
	add("", r.Direction)
	if !r.Peer.IsZero() {
		name := names[r.Peer]
		if name == "" {
			name = r.Peer.String()
		}
		add("peer", name)
	}
	add("", r.Protocol)
	var ports []string
	for _, p := range r.Ports {
		if p.First == p.Last {
			ports = append(ports, strconv.Itoa(int(p.First)))
		} else {
			ports = append(ports, fmt.Sprintf("%d-%d", p.First, p.Last))
		}
	}
	add("ports", strings.Join(ports, ", "))
	list := func(ps []netip.Prefix) string {
		var ss []string
		for _, p := range ps {
			ss = append(ss, p.String())
		}
		return strings.Join(ss, ", ")
	}
	add("from", list(r.From))
	add("to", list(r.To))
	return strings.Join(w, " ")
}
