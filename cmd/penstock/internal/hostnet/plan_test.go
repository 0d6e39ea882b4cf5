package hostnet

import (
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

func prefixes(s ...string) (ps []netip.Prefix) {
	for _, s := range s {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

func TestRules(t *testing.T) {
	got := rules(5183, 7, prefixes("10.0.0.0/8", "::/0", "0.0.0.0/0", "10.9.0.0/16", "172.16.0.0/16", "fd00::/64"))
	want := []rule{
		{false, 20000 + 32*16 + 1, tableMain, 0, 16}, {false, 20000 + 32*16 + 17, 5183, 7, 15},
		{false, 20000 + 32*24 + 1, tableMain, 0, 8}, {false, 20000 + 32*24 + 17, 5183, 7, 7},
		{false, 20000 + 32*32 + 1, tableMain, 0, 0}, {false, 20000 + 32*32 + 17, 5183, 7, -1},
		{true, 20000 + 32*64 + 1, tableMain, 0, 64}, {true, 20000 + 32*64 + 17, 5183, 7, 63},
		{true, 20000 + 32*128 + 1, tableMain, 0, 0}, {true, 20000 + 32*128 + 17, 5183, 7, -1},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

// lookup is what the kernel does with rules and tables (fib_rules_lookup, fib_table_lookup,
// fib4_rule_suppress): the route's name.
func lookup(rs []rule, tables map[int][]netip.Prefix, a netip.Addr, mark uint32) (table int, found netip.Prefix) {
	for _, r := range rs {
		if r.NotMark != 0 && r.NotMark == mark {
			continue
		}
		best := netip.Prefix{}
		for _, p := range tables[r.Table] {
			if p.Contains(a) && (!best.IsValid() || p.Bits() > best.Bits()) {
				best = p
			}
		}
		if best.IsValid() && best.Bits() > r.Suppress {
			return r.Table, best
		}
	}
	return 0, netip.Prefix{}
}

// TestRulesFindTheLongest: of all tables together, ours first; with the mark, of main.
func TestRulesFindTheLongest(t *testing.T) {
	tables := map[int][]netip.Prefix{
		tableMain: prefixes("0.0.0.0/0", "10.0.0.0/8", "10.9.9.0/24", "10.9.9.128/25", "192.168.0.0/16", "10.66.0.7/32"),
		5182:      prefixes("0.0.0.0/0", "10.9.0.0/16", "10.9.9.0/24", "10.66.0.0/24"),
		5184:      prefixes("10.0.0.0/8", "192.168.3.0/24", "10.9.9.200/32"),
	}
	for _, nodes := range [][]int{{5182}, {5184}, {5182, 5184}} {
		var rs []rule
		seen := map[int][]netip.Prefix{tableMain: tables[tableMain]}
		for _, n := range nodes {
			rs = append(rs, rules(n, 9, tables[n])...)
			seen[n] = tables[n]
		}
		slices.SortStableFunc(rs, func(a, b rule) int { return a.Priority - b.Priority })
		rs = append(rs, rule{Priority: 32766, Table: tableMain, Suppress: -1})
		for _, a := range []string{
			"8.8.8.8", "10.1.1.1", "10.9.1.1", "10.9.9.1", "10.9.9.129", "10.9.9.200", "10.66.0.1", "10.66.0.7", "192.168.3.1", "192.168.4.1",
		} {
			addr := netip.MustParseAddr(a)
			longest := netip.Prefix{}
			for _, ps := range seen {
				for _, p := range ps {
					if p.Contains(addr) && (!longest.IsValid() || p.Bits() > longest.Bits()) {
						longest = p
					}
				}
			}
			table, got := lookup(rs, seen, addr, 0)
			if got != longest {
				t.Errorf("nodes %v, %s: %v of table %d, want %v", nodes, a, got, table, longest)
			}
			if ours := slices.ContainsFunc(nodes, func(n int) bool { return slices.Contains(tables[n], longest) }); ours != (table != tableMain) {
				t.Errorf("nodes %v, %s: table %d", nodes, a, table)
			}
			if table, _ := lookup(rs, seen, addr, 9); table != tableMain {
				t.Errorf("nodes %v, %s, with the mark: table %d", nodes, a, table)
			}
		}
	}
}

func TestPrefixes(t *testing.T) {
	c := Config{Addresses: prefixes("10.66.0.1/24", "fd66::1/128", "10.77.0.1/24"), Routes: prefixes("10.66.0.2/32", "10.66.0.0/24", "0.0.0.0/0", "fd66::2/128")}
	if got, want := c.prefixes(), prefixes("0.0.0.0/0", "10.66.0.0/24", "10.66.0.2/32", "10.77.0.0/24", "fd66::2/128"); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for p, want := range map[string]string{"0.0.0.0/0": "10.66.0.1", "10.77.0.5/32": "10.77.0.1", "fd66::2/128": "fd66::1", "8.0.0.0/8": "10.66.0.1"} {
		if got := c.source(netip.MustParsePrefix(p)); got.String() != want {
			t.Errorf("source for %s: %v, want %s", p, got, want)
		}
	}
}
