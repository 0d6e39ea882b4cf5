package gateway

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func TestParseRange(t *testing.T) {
	for text, want := range map[string]string{
		"10.9.0.0/24":          "10.9.0.1-10.9.0.254",
		"10.9.0.7/24":          "10.9.0.1-10.9.0.254",
		"10.9.0.0/30":          "10.9.0.1-10.9.0.2",
		"10.9.0.0/31":          "10.9.0.0-10.9.0.1",
		"10.9.0.4":             "10.9.0.4-10.9.0.4",
		"10.9.0.4 - 10.9.1.4":  "10.9.0.4-10.9.1.4",
		"fd09::/64":            "fd09::1-fd09::ffff:ffff:ffff:ffff",
		"fd09::/120":           "fd09::1-fd09::ff",
		"fd09::10-fd09::1:0:0": "fd09::10-fd09::1:0:0",
	} {
		if r, err := ParseRange(text); err != nil || r.String() != want {
			t.Errorf("%s is %v, %v, want %s", text, r, err, want)
		}
	}
	for _, text := range []string{"", "x", "10.9.0.9-10.9.0.1", "10.9.0.1-fd09::1", "224.0.0.0/24", "127.0.0.0/8", "::ffff:10.0.0.0/104", "10.0.0.0/33", "0.0.0.0/0", "fe80::1%eth0"} {
		if r, err := ParseRange(text); err == nil {
			t.Errorf("%s is %v, want a refusal", text, r)
		}
	}
}

// TestPick: every address of a pool is found, none twice, and users begin at places of their own.
func TestPick(t *testing.T) {
	p := pool(t, "10.9.0.0/28", "10.9.1.4-10.9.1.6", "fd09::/126")
	for is4, want := range map[bool]int{true: 14 + 3, false: 3} {
		used := map[netip.Addr]bool{}
		for {
			a, ok := p.family(is4).pick("u", func(a netip.Addr) bool { return used[a] })
			if !ok {
				break
			}
			if used[a] || !p.contains(a) || a.Is4() != is4 {
				t.Fatalf("%v was picked", a)
			}
			used[a] = true
		}
		if len(used) != want {
			t.Errorf("%d addresses, want %d", len(used), want)
		}
	}
	wide := pool(t, "fd09::/48")
	first := map[netip.Addr]bool{}
	for i := range 100 {
		a, ok := wide.pick(fmt.Sprint("user", i), func(netip.Addr) bool { return false })
		if !ok || !netip.MustParsePrefix("fd09::/48").Contains(a) {
			t.Fatal(a)
		}
		first[a] = true
	}
	if len(first) != 100 {
		t.Errorf("100 users have %d first addresses in a /48", len(first))
	}
	if _, ok := Pool(nil).pick("u", func(netip.Addr) bool { return false }); ok {
		t.Error("an address out of nothing")
	}
}

// TestScoreboard: points add up by source, are forgotten, and the table is bounded.
func TestScoreboard(t *testing.T) {
	now := time.Now()
	b := newScoreboard(BanConfig{Limit: 30, Reset: time.Minute, Exempt: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}})
	a := netip.MustParseAddr("198.51.100.1")
	for i := range 3 {
		if b.banned(a, now) {
			t.Fatalf("banned after %d", i)
		}
		b.wrong(a, "u", now)
	}
	if !b.banned(a, now) || b.connection(a, now) != refusedBanned {
		t.Error("not banned")
	}
	if b.banned(netip.MustParseAddr("198.51.100.2"), now) {
		t.Error("the neighbour is banned too")
	}
	if b.banned(a, now.Add(time.Minute)) || b.connection(a, now.Add(time.Minute)) != admitted {
		t.Error("for ever")
	}
	six := netip.MustParseAddr("2001:db8::1")
	for range 3 {
		b.wrong(six, "u", now)
		six = six.Next()
	}
	if !b.banned(netip.MustParseAddr("2001:db8::ffff:1"), now) || b.banned(netip.MustParseAddr("2001:db8:0:1::1"), now) {
		t.Error("a /64 is one source, and the next another")
	}
	mapped := netip.MustParseAddr("::ffff:203.0.113.9")
	for range 3 {
		b.wrong(mapped, "u", now)
	}
	if !b.banned(netip.MustParseAddr("203.0.113.9"), now) {
		t.Error("an IPv4 address has two scores")
	}
	for range 10 {
		b.wrong(netip.MustParseAddr("192.0.2.1"), "u", now)
	}
	if b.banned(netip.MustParseAddr("192.0.2.1"), now) {
		t.Error("an exempt address is banned")
	}
	list, total := b.status(now)
	if len(list) != 2 || total != 3 { // the first has connected since, later
		t.Errorf("%d banned now, %d in all: %v", len(list), total, list)
	}
	b.max = 100
	at := netip.MustParseAddr("10.0.0.1")
	for range 10000 {
		b.wrong(at, "u", now)
		at = at.Next()
	}
	if len(b.scores) > 104 || b.order.Len() != len(b.scores) {
		t.Errorf("%d sources are remembered, in a list of %d", len(b.scores), b.order.Len())
	}
}

// TestRate: connections from one address come at a bounded rate, and so many at once.
func TestRate(t *testing.T) {
	now := time.Now()
	b := newScoreboard(BanConfig{Connection: -1, Rate: 10, Burst: 20, PerAddress: 1000})
	a := netip.MustParseAddr("198.51.100.1")
	count := func() (n int) {
		for range 100 {
			if b.connection(a, now) == admitted {
				n++
			}
		}
		return n
	}
	if n := count(); n != 20 {
		t.Errorf("%d at once, want 20", n)
	}
	now = now.Add(time.Second)
	if n := count(); n != 10 {
		t.Errorf("%d after a second, want 10", n)
	}
	few := newScoreboard(BanConfig{Connection: -1, PerAddress: 3})
	for i := range 5 {
		if v := few.connection(a, now); (v == admitted) != (i < 3) {
			t.Errorf("connection %d: %v", i, v)
		}
	}
	few.settled(a, true, now)
	if v := few.connection(a, now); v != admitted {
		t.Errorf("one has signed in, and the next is refused: %v", v)
	}
}
