package hostnet

import (
	"cmp"
	"net/netip"
	"slices"
)

// A table of our own keeps the routes apart from the main table, but where a packet goes must not
// depend on which of the two has the longer prefix. So for each length L of a prefix of ours, the
// longest first, there are two rules:
//
//	lookup main suppress_prefixlength L            what main knows better
//	not fwmark M lookup T suppress_prefixlength L-1    what we know as well as that
//
// Together they find the longest prefix of both tables, ours among equals: for 0.0.0.0/0 alone they
// are the rules of wg-quick(8). The tunnel's own packets have the mark and see main only; they
// cannot enter the tunnel whatever its routes are and wherever the peers roam.
//
// The priority of a rule says its length and which node it is of, such that those of several nodes
// mix as they should.

const (
	firstTable = 5182
	slots      = 16 // nodes on one host; each has a table and a place among the rules of each length
	// firstPriority leaves room below for the rules of others, and 129 lengths of 32 rules each above
	// end well before the 32766 of main.
	firstPriority = 20000

	tableMain = 254 // RT_TABLE_MAIN of linux/rtnetlink.h
)

// A rule of policy routing.
type rule struct {
	V6       bool   `json:"v6,omitempty"`
	Priority int    `json:"priority"`
	Table    int    `json:"table"`
	NotMark  uint32 `json:"not_mark,omitempty"` // 0: whatever the mark
	Suppress int    `json:"suppress"`           // routes up to this prefix length do not count; -1: all do
}

// rules merge table, which has routes to prefixes, with main.
func rules(table int, mark uint32, prefixes []netip.Prefix) (rs []rule) {
	type length struct {
		v6   bool
		bits int
	}
	var lengths []length
	for _, p := range prefixes {
		lengths = append(lengths, length{p.Addr().Is6(), p.Bits()})
	}
	slices.SortFunc(lengths, func(a, b length) int {
		if a.v6 != b.v6 {
			if a.v6 {
				return 1
			}
			return -1
		}
		return cmp.Compare(b.bits, a.bits)
	})
	slot := table - firstTable
	for _, l := range slices.Compact(lengths) {
		all := 32
		if l.v6 {
			all = 128
		}
		at := firstPriority + 2*slots*(all-l.bits) + slot
		rs = append(rs,
			rule{V6: l.v6, Priority: at, Table: tableMain, Suppress: l.bits},
			rule{V6: l.v6, Priority: at + slots, Table: table, NotMark: mark, Suppress: l.bits - 1})
	}
	return rs
}

// prefixes are those that get a route: the ones behind the peers, and the networks of the
// interface's own addresses, whose other hosts are nowhere else.
func (c *Config) prefixes() (ps []netip.Prefix) {
	for _, p := range c.Routes {
		ps = append(ps, p.Masked())
	}
	for _, p := range c.Addresses {
		if !p.IsSingleIP() {
			ps = append(ps, p.Masked())
		}
	}
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(ps)
}

// source is the own address for packets to p: one beside it, if there is one.
func (c *Config) source(p netip.Prefix) netip.Addr {
	for _, a := range c.Addresses {
		if a.Masked().Overlaps(p) && a.Bits() <= p.Bits() {
			return a.Addr()
		}
	}
	for _, a := range c.Addresses {
		if a.Addr().Is4() == p.Addr().Is4() {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

// catchesEndpoint tells whether a reverse lookup without a mark would find the interface for some
// packet of an IPv4 tunnel: strict reverse path filtering then drops it. Peers whose addresses are not known
// may have any that is not private: private ones are taken for the VPN's.
func (c *Config) catchesEndpoint() bool {
	return slices.ContainsFunc(c.Routes, func(p netip.Prefix) bool {
		return p.Addr().Is4() && (p.Bits() <= 1 || c.Anywhere && !private(p) || slices.ContainsFunc(c.Endpoints, p.Contains))
	})
}

// private tells whether no address of p is one of the Internet's.
func private(p netip.Prefix) bool {
	return slices.ContainsFunc([]string{
		"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", // RFC 1918
		"100.64.0.0/10", // RFC 6598
	}, func(text string) bool {
		all := netip.MustParsePrefix(text)
		return all.Bits() <= p.Bits() && all.Contains(p.Addr())
	})
}
