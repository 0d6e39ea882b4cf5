package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// testDNS is a name server. Its records are those of zone, "name TYPE" to values.
type testDNS struct {
	mu    sync.Mutex
	zone  map[string][]string
	asked []string // "udp name TYPE"
	ttl   uint32

	// mangle, if not nil, makes the answers to a query out of the right one.
	mangle func(network string, answer []byte) [][]byte
}

func newTestDNS(zone map[string][]string) *testDNS { return &testDNS{zone: zone, ttl: 60} }

func (s *testDNS) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *testDNS) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// serve answers on both sockets until the test ends.
func (s *testDNS) serve(t *testing.T, pc net.PacketConn, l net.Listener) {
	t.Helper()
	var serving sync.WaitGroup
	t.Cleanup(func() { pc.Close(); l.Close(); serving.Wait() })
	serving.Go(func() {
		b := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			for _, a := range s.answer("udp", b[:n]) {
				pc.WriteTo(a, from)
			}
		}
	})
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				var size [2]byte
				if _, err := io.ReadFull(c, size[:]); err != nil {
					return
				}
				q := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(c, q); err != nil {
					return
				}
				for _, a := range s.answer("tcp", q) {
					c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(a))), a...))
				}
			})
		}
	})
}

// inside serves inside the VPN, on all addresses of n.
func (s *testDNS) inside(t *testing.T, n *Node) {
	t.Helper()
	pc, err := n.ListenPacket("udp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	l, err := n.Listen("tcp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	s.serve(t, pc, l)
}

// onHost serves on a loopback port of the system.
func (s *testDNS) onHost(t *testing.T) netip.AddrPort {
	t.Helper()
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		pc, err := net.ListenPacket("udp", l.Addr().String())
		if err != nil { // taken for UDP
			l.Close()
			continue
		}
		s.serve(t, pc, l)
		return netip.MustParseAddrPort(l.Addr().String())
	}
}

var dnsTypes = map[dnsmessage.Type]string{
	dnsmessage.TypeA: "A", dnsmessage.TypeAAAA: "AAAA", dnsmessage.TypeCNAME: "CNAME", dnsmessage.TypeTXT: "TXT", dnsmessage.TypeMX: "MX",
}

func (s *testDNS) answer(network string, query []byte) [][]byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil {
		return nil
	}
	q, err := p.Question()
	if err != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	name := canonical(q.Name.String())
	s.asked = append(s.asked, fmt.Sprintf("%s %s %s", network, name, dnsTypes[q.Type]))
	msg := s.message(h, q, name, network)
	if s.mangle != nil {
		return s.mangle(network, msg)
	}
	return [][]byte{msg}
}

// message answers by the zone; more than 512 bytes are cut for UDP.
func (s *testDNS) message(h dnsmessage.Header, q dnsmessage.Question, name, network string) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: h.ID, Response: true, RecursionDesired: h.RecursionDesired, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	owner := q.Name
	for cname := s.zone[name+" CNAME"]; cname != nil && q.Type != dnsmessage.TypeCNAME; cname = s.zone[name+" CNAME"] {
		m.Answers = append(m.Answers, record(owner, dnsmessage.TypeCNAME, s.ttl, cname[0]))
		name, owner = cname[0], dnsmessage.MustNewName(cname[0]+".")
	}
	for _, v := range s.zone[name+" "+dnsTypes[q.Type]] {
		m.Answers = append(m.Answers, record(owner, q.Type, s.ttl, v))
	}
	exists := false
	for k := range s.zone {
		exists = exists || strings.HasPrefix(k, name+" ")
	}
	if !exists {
		m.RCode = dnsmessage.RCodeNameError
	}
	if len(s.zone[name+" "+dnsTypes[q.Type]]) == 0 {
		m.Authorities = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName("example."), Class: dnsmessage.ClassINET, TTL: 3600},
			Body:   &dnsmessage.SOAResource{NS: dnsmessage.MustNewName("ns.example."), MBox: dnsmessage.MustNewName("x.example."), MinTTL: s.ttl},
		}}
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	if network == "udp" && len(b) > 512 {
		m.Answers, m.Truncated = m.Answers[:1], true
		b, _ = m.Pack()
	}
	return b
}

func record(name dnsmessage.Name, t dnsmessage.Type, ttl uint32, value string) dnsmessage.Resource {
	r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: name, Class: dnsmessage.ClassINET, TTL: ttl}}
	switch t {
	case dnsmessage.TypeA:
		r.Body = &dnsmessage.AResource{A: netip.MustParseAddr(value).As4()}
	case dnsmessage.TypeAAAA:
		r.Body = &dnsmessage.AAAAResource{AAAA: netip.MustParseAddr(value).As16()}
	case dnsmessage.TypeCNAME:
		r.Body = &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(value + ".")}
	case dnsmessage.TypeMX:
		r.Body = &dnsmessage.MXResource{Pref: 10, MX: dnsmessage.MustNewName(value + ".")}
	default:
		r.Body = &dnsmessage.TXTResource{TXT: []string{value}}
	}
	return r
}

// manyAddrs do not fit a datagram.
func manyAddrs() (addrs []string) {
	for i := range 100 {
		addrs = append(addrs, fmt.Sprintf("10.66.1.%d", i))
	}
	return addrs
}

func lookedUp(t *testing.T, n *Node, host string) string {
	t.Helper()
	addrs, err := n.LookupNetIP(within(t, patience), "ip", host)
	var de *net.DNSError
	switch {
	case errors.As(err, &de) && de.IsNotFound:
		return "none"
	case err != nil:
		t.Fatalf("%s: %v", host, err)
	}
	return strings.Trim(fmt.Sprint(addrs), "[]")
}

func TestDNSInside(t *testing.T) {
	server := newTestDNS(map[string][]string{
		"www.corp.example A":         {"10.66.0.2"},
		"www.corp.example AAAA":      {"fd66::2"},
		"four.corp.example A":        {"10.66.0.2"},
		"six.corp.example AAAA":      {"fd66::2", "::ffff:10.66.0.2"},
		"alias.corp.example CNAME":   {"other.corp.example"},
		"other.corp.example CNAME":   {"www.corp.example"},
		"many.corp.example A":        manyAddrs(),
		"only.in.search.corp.test A": {"10.66.0.9"},
		"corp.example MX":            {"mail.corp.example"},
	})
	a, b := pair(t, func(a, _ *Config) {
		a.DNS = DNS{
			Servers: []netip.AddrPort{netip.MustParseAddrPort("[fd66::2]:53")},
			Search:  []string{"corp.example", "search.corp.test"},
		}
	})
	server.inside(t, b)
	for _, tt := range []struct{ host, want string }{
		{"www.corp.example", "fd66::2 10.66.0.2"},
		{"WWW.Corp.Example.", "fd66::2 10.66.0.2"},
		{"www", "fd66::2 10.66.0.2"},
		{"www.", "none"},
		{"four", "10.66.0.2"},
		{"six", "fd66::2"},
		{"alias", "fd66::2 10.66.0.2"},
		{"only.in", "10.66.0.9"},
		{"nowhere", "none"},
		{"10.66.0.7", "10.66.0.7"},
		{"::ffff:10.66.0.7", "10.66.0.7"},
		{"localhost", "::1 127.0.0.1"},
		{"", "none"},
		{strings.Repeat("x", 64) + ".example", "none"},
		{strings.Repeat("x.", 130), "none"},
	} {
		if got := lookedUp(t, a, tt.host); got != tt.want {
			t.Errorf("%q is %s, want %s", tt.host, got, tt.want)
		}
	}
	for _, q := range server.questions() {
		if strings.Contains(q, "10.66.0.7") || strings.Contains(q, "localhost") || strings.HasPrefix(q, "tcp") {
			t.Errorf("the server was asked %q", q)
		}
	}
	if got := strings.Count(lookedUp(t, a, "many"), "10.66.1."); got != 100 {
		t.Errorf("an answer that needs TCP had %d addresses, want 100", got)
	}
	// Go's own resolver reads the same messages with its own code.
	addrs, err := a.Resolver().LookupNetIP(within(t, patience), "ip4", "many.corp.example.")
	if err != nil || len(addrs) != 100 {
		t.Errorf("Resolver found %d addresses, %v, want 100", len(addrs), err)
	}
	if mx, err := a.Resolver().LookupMX(within(t, patience), "corp.example."); err != nil || len(mx) != 1 || mx[0].Host != "mail.corp.example." {
		t.Errorf("Resolver found %v, %v", mx, err)
	}
	if _, err := a.Resolver().LookupNetIP(within(t, patience), "ip", "no.corp.example."); !isNotFound(err) {
		t.Errorf("Resolver, for a name that is not there: %v", err)
	}

	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, want := range map[string]string{"www:80": "[fd66::2]:80", "four:http": "10.66.0.2:80"} {
		// On a machine under load IPv6 may take longer than the head start that it gets (RFC 8305 5).
		for try := 1; ; try++ {
			c, err := a.Dial(within(t, patience), "tcp", name)
			if err != nil {
				t.Fatal(err)
			}
			got := c.RemoteAddr().String()
			c.Close()
			if got == want {
				break
			}
			if try == 10 {
				t.Fatalf("Dial of %s reached %s, want %s", name, got, want)
			}
		}
	}
	if _, err := a.Dial(within(t, patience), "tcp4", "six:80"); !isNotFound(err) {
		t.Errorf("IPv4 to a name with IPv6 only: %v", err)
	}
}

func isNotFound(err error) bool {
	var de *net.DNSError
	return errors.As(err, &de) && de.IsNotFound
}

// TestDNSFamilies: a node of one family does not ask for the other.
func TestDNSFamilies(t *testing.T) {
	server := newTestDNS(map[string][]string{"www.example A": {"10.66.0.2"}, "www.example AAAA": {"fd66::2"}})
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24"),
		DNS: DNS{Split: []SplitDNS{{Domains: []string{"."}, Servers: []netip.AddrPort{server.onHost(t)}, ViaHost: true}}},
	})
	if got := lookedUp(t, n, "www.example"); got != "10.66.0.2" {
		t.Errorf("got %s", got)
	}
	if got := strings.Join(server.questions(), ", "); got != "udp www.example A" {
		t.Errorf("asked %s", got)
	}
}

// TestDNSSplit: the longest domain decides who is asked, and on which network.
func TestDNSSplit(t *testing.T) {
	inside := newTestDNS(map[string][]string{"a.corp.example A": {"10.66.0.2"}, "plain.example A": {"10.66.0.3"}, "xlab.corp.example A": {"10.66.0.4"}})
	outside := newTestDNS(map[string][]string{"a.lab.corp.example A": {"10.66.0.5"}, "lab.corp.example A": {"10.66.0.6"}})
	a, b := pair(t, func(a, _ *Config) {
		a.DNS = DNS{
			Servers: []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")},
			Split: []SplitDNS{
				{Domains: []string{"corp.example"}, Servers: []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")}},
				{Domains: []string{"Lab.corp.example."}, Servers: []netip.AddrPort{outside.onHost(t)}, ViaHost: true},
			},
		}
	})
	inside.inside(t, b)
	for host, want := range map[string]string{
		"a.corp.example": "10.66.0.2", "plain.example": "10.66.0.3", "xlab.corp.example": "10.66.0.4",
		"a.lab.corp.example": "10.66.0.5", "lab.corp.example": "10.66.0.6", "b.lab.corp.example": "none",
	} {
		if got := lookedUp(t, a, host); got != want {
			t.Errorf("%s is %s, want %s", host, got, want)
		}
		if addrs, err := a.Resolver().LookupNetIP(within(t, patience), "ip4", host+"."); (err == nil) != (want != "none") || err == nil && addrs[0].String() != want {
			t.Errorf("Resolver: %s is %v, %v, want %s", host, addrs, err, want)
		}
	}
}

// A scriptedDNS is a client with two servers on loopback and a clock of its own. It waits long for
// an answer: where one is to stay away, the test sets rounds.
func scriptedDNS(t *testing.T, zone map[string][]string) (c *dnsClient, first, second *testDNS, clock *time.Time) {
	t.Helper()
	first, second = newTestDNS(zone), newTestDNS(zone)
	d := &DNS{Split: []SplitDNS{{Domains: []string{"."}, Servers: []netip.AddrPort{first.onHost(t), second.onHost(t)}, ViaHost: true}}}
	c = newDNSClient(d, nil)
	now := time.Now()
	clock = &now
	c.now = func() time.Time { return *clock }
	c.rounds = []time.Duration{patience, patience}
	t.Cleanup(func() { c.Close() })
	return c, first, second, clock
}

func (c *dnsClient) testLookup(t *testing.T, name string) (string, error) {
	t.Helper()
	addrs, err := c.lookup(within(t, patience), "ip4", name)
	return strings.Trim(fmt.Sprint(addrs), "[]"), err
}

func TestDNSCache(t *testing.T) {
	c, first, _, clock := scriptedDNS(t, map[string][]string{"a.example A": {"10.0.0.1"}})
	for range 5 {
		if got, err := c.testLookup(t, "a.example"); got != "10.0.0.1" {
			t.Fatal(got, err)
		}
		if _, err := c.testLookup(t, "b.example"); !isNotFound(err) {
			t.Fatal(err)
		}
	}
	if got := first.questions(); len(got) != 2 {
		t.Errorf("asked %v, want each name once", got)
	}
	first.set(func() { first.zone = map[string][]string{"a.example A": {"10.0.0.2"}, "b.example A": {"10.0.0.3"}} })
	*clock = clock.Add(59 * time.Second)
	if got, _ := c.testLookup(t, "a.example"); got != "10.0.0.1" {
		t.Errorf("before the TTL is over: %s", got)
	}
	*clock = clock.Add(2 * time.Second)
	if got, _ := c.testLookup(t, "a.example"); got != "10.0.0.2" {
		t.Errorf("after it: %s", got)
	}
	if got, _ := c.testLookup(t, "b.example"); got != "10.0.0.3" {
		t.Errorf("after the negative TTL: %s", got)
	}
	// A TTL of zero is not kept, one of years is.
	first.set(func() { first.ttl = 0; first.zone["c.example A"] = []string{"10.0.0.4"} })
	before := len(first.questions())
	c.testLookup(t, "c.example")
	c.testLookup(t, "c.example")
	if got := len(first.questions()) - before; got != 2 {
		t.Errorf("TTL 0 was asked %d times of 2", got)
	}
	first.set(func() { first.ttl = 1 << 30; first.zone["d.example A"] = []string{"10.0.0.4"} })
	c.testLookup(t, "d.example")
	*clock = clock.Add(maxTTL)
	before = len(first.questions())
	c.testLookup(t, "d.example")
	if got := len(first.questions()) - before; got != 1 {
		t.Error("an answer was kept for longer than the longest time")
	}
}

// TestDNSCacheBound: however many names are asked for, the cache holds the last ones.
func TestDNSCacheBound(t *testing.T) {
	var c dnsCache
	now := time.Now()
	key := func(i int) dnsKey { return dnsKey{name: fmt.Sprint(i), qtype: dnsmessage.TypeA} }
	for i := range 3 * maxCached {
		c.put(&dnsEntry{key: key(i), expires: now.Add(time.Hour)})
		if _, ok := c.get(key(0), now); !ok {
			t.Fatalf("the one in use went after %d others", i)
		}
	}
	if len(c.byKey) != maxCached || c.used.Len() != maxCached {
		t.Errorf("%d entries, want %d", len(c.byKey), maxCached)
	}
	if _, ok := c.get(key(maxCached), now); ok {
		t.Error("an old one is still there")
	}
	c.put(&dnsEntry{key: key(-1), msg: make([]byte, maxCachedSize+1), expires: now.Add(time.Hour)})
	if _, ok := c.get(key(-1), now); ok {
		t.Error("a large answer was kept")
	}
}

func TestDNSRetries(t *testing.T) {
	zone := map[string][]string{"a.example A": {"10.0.0.1"}, "b.example A": {"10.0.0.2"}, "c.example A": {"10.0.0.3"}}
	silent := func(string, []byte) [][]byte { return nil }
	refuses := func(_ string, b []byte) [][]byte { b[3] |= byte(dnsmessage.RCodeRefused); return [][]byte{b} }
	for name, mangle := range map[string]func(string, []byte) [][]byte{"silent": silent, "refuses": refuses} {
		t.Run(name, func(t *testing.T) {
			c, first, second, _ := scriptedDNS(t, zone)
			c.rounds = []time.Duration{time.Second, patience}
			first.set(func() { first.mangle = mangle })
			for _, q := range []struct{ name, want string }{{"a.example", "10.0.0.1"}, {"b.example", "10.0.0.2"}} {
				if got, err := c.testLookup(t, q.name); got != q.want {
					t.Fatal(got, err)
				}
			}
			if f, s := len(first.questions()), len(second.questions()); f != 1 || s != 2 {
				t.Errorf("the bad server got %d questions, the good one %d, want 1 and 2", f, s)
			}
		})
	}
	t.Run("loss", func(t *testing.T) {
		c, first, second, _ := scriptedDNS(t, zone)
		c.rounds = []time.Duration{100 * time.Millisecond, patience}
		second.set(func() { second.mangle = silent })
		lost := false
		first.set(func() {
			first.mangle = func(_ string, b []byte) [][]byte {
				if !lost {
					lost = true
					return nil
				}
				return [][]byte{b}
			}
		})
		if got, err := c.testLookup(t, "a.example"); got != "10.0.0.1" {
			t.Error(got, err)
		}
	})
	t.Run("all silent", func(t *testing.T) {
		c, first, second, clock := scriptedDNS(t, zone)
		c.rounds = []time.Duration{100 * time.Millisecond, 200 * time.Millisecond}
		first.set(func() { first.mangle = silent })
		second.set(func() { second.mangle = silent })
		_, err := c.testLookup(t, "a.example")
		var de *net.DNSError
		if !errors.As(err, &de) || !de.IsTimeout || de.IsNotFound || de.Server == "" {
			t.Fatalf("got %v, want a timeout of a server", err)
		}
		asked := func() int { return len(first.questions()) + len(second.questions()) }
		for end := time.Now().Add(patience); asked() < 4 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		} // the last one may not have been read yet
		if n := asked(); n != 4 {
			t.Errorf("%d datagrams, want 2 to each", n)
		}
		first.set(func() { first.mangle = nil })
		c.rounds = []time.Duration{patience}
		if _, err := c.testLookup(t, "a.example"); err == nil {
			t.Error("asked again at once")
		}
		*clock = clock.Add(failureTTL)
		if got, err := c.testLookup(t, "a.example"); got != "10.0.0.1" {
			t.Error(got, err)
		}
	})
}

// TestDNSForgery: datagrams that do not answer the question, and bytes that are no DNS at all, are
// waited out.
func TestDNSForgery(t *testing.T) {
	c, first, _, _ := scriptedDNS(t, map[string][]string{"a.example A": {"10.0.0.1"}})
	forged := newTestDNS(map[string][]string{"a.example A": {"10.9.9.9"}, "z.example A": {"10.9.9.9"}})
	first.set(func() {
		first.mangle = func(network string, b []byte) [][]byte {
			otherID := slices.Clone(b)
			otherID[0] ^= 1
			query := slices.Clone(b)
			query[2] &^= 0x80
			q, _ := newQuestion("z.example", dnsmessage.TypeA)
			otherName := forged.message(dnsmessage.Header{ID: binary.BigEndian.Uint16(b)}, q, "z.example", network)
			return [][]byte{otherID, query, otherName, {}, {1}, []byte("garbage, longer than a header"), b[:len(b)-3], b}
		}
	})
	if got, err := c.testLookup(t, "a.example"); got != "10.0.0.1" {
		t.Error(got, err)
	}
	if n := len(first.questions()); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestDNSOnce: many who want to know the same make one question.
func TestDNSOnce(t *testing.T) {
	c, first, _, _ := scriptedDNS(t, map[string][]string{"a.example A": {"10.0.0.1"}})
	release := make(chan struct{})
	first.set(func() {
		first.mangle = func(_ string, b []byte) [][]byte { <-release; return [][]byte{b} }
	})
	var asking sync.WaitGroup
	for range 50 {
		asking.Go(func() {
			if got, err := c.testLookup(t, "a.example"); got != "10.0.0.1" {
				t.Error(got, err)
			}
		})
	}
	// One who does not want to wait does not end it for the others.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.lookup(ctx, "ip4", "a.example"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after its deadline: %v", err)
	}
	close(release)
	asking.Wait()
	if n := len(first.questions()); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestDNSClose: lookups under way end with the node, and leave nothing.
func TestDNSClose(t *testing.T) {
	a, b := pair(t, func(a, _ *Config) { a.DNS.Servers = []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")} })
	pc, err := b.ListenPacket("udp", ":53") // and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	ended := make(chan error, 2)
	go func() { _, err := a.Dial(context.Background(), "tcp", "www.example:80"); ended <- err }()
	go func() { _, err := a.Resolver().LookupTXT(context.Background(), "www.example."); ended <- err }()
	pc.SetDeadline(time.Now().Add(patience))
	if _, _, err := pc.ReadFrom(make([]byte, 1500)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	a.Close()
	first, second := <-ended, <-ended
	if took := time.Since(began); took > patience/3 {
		t.Errorf("Close took %v", took)
	}
	if !errors.Is(first, net.ErrClosed) && !errors.Is(second, net.ErrClosed) {
		t.Errorf("Dial and LookupTXT ended with %v and %v", first, second)
	}
	if _, err := a.LookupNetIP(t.Context(), "ip", "www.example"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestDNSTimeout(t *testing.T) {
	a, b := pair(t, func(a, _ *Config) { a.DNS.Servers = []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")} })
	pc, err := b.ListenPacket("udp", ":53") // and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.Dial(ctx, "tcp", "www.example:80"); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want a timeout", err)
	}
}

func TestDNSMistakes(t *testing.T) {
	server := []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")}
	for want, d := range map[string]DNS{
		"DNS.Servers[0]":          {Servers: []netip.AddrPort{{}}},
		"DNS.Search[1]":           {Search: []string{"a.example", "b..example"}},
		"DNS.Search":              {Search: slices.Repeat([]string{"a"}, maxSearch+1)},
		"DNS.Split[0].Domains":    {Split: []SplitDNS{{Servers: server}}},
		"DNS.Split[0].Servers":    {Split: []SplitDNS{{Domains: []string{"a"}}}},
		"DNS.Split[1].Domains[0]": {Split: []SplitDNS{{Domains: []string{"a"}, Servers: server}, {Domains: []string{"A."}, Servers: server}}},
	} {
		_, err := New(Config{PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24"), DNS: d})
		var ce *ConfigError
		if !errors.As(err, &ce) || ce.Key != want {
			t.Errorf("%+v: %v, want a mistake in %s", d, err, want)
		}
	}
}

// FuzzDNSAnswer: whatever a server sends, what we read is in the answer section by
// dnsmessage's own reckoning, of the type that was asked for, and does not stay for ever.
func FuzzDNSAnswer(f *testing.F) {
	server := newTestDNS(map[string][]string{
		"a.example A": {"10.0.0.1", "10.0.0.2"}, "b.example CNAME": {"a.example"}, "c.example AAAA": {"fd66::1", "::ffff:1.2.3.4"}, "d.example A": manyAddrs(),
	})
	for _, name := range []string{"a.example", "b.example", "c.example", "d.example", "e.example"} {
		for _, t := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeMX} {
			q, err := newQuestion(name, t)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(server.message(dnsmessage.Header{ID: 7}, q, name, "tcp"), uint16(7), name, uint16(t))
			f.Add(server.message(dnsmessage.Header{ID: 7}, q, name, "udp"), uint16(7), name, uint16(t))
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte, id uint16, name string, qtype uint16) {
		name = canonical(name)
		if !isName(name) {
			return
		}
		q, err := newQuestion(name, dnsmessage.Type(qtype))
		if err != nil {
			t.Fatalf("%q passed isName: %v", name, err)
		}
		kept := slices.Clone(msg)
		a, err := readAnswer(msg, id, q)
		if !slices.Equal(msg, kept) {
			t.Fatal("the message was changed")
		}
		if err != nil {
			return
		}
		var p dnsmessage.Parser
		h, err := p.Start(msg)
		if err != nil || !h.Response || h.ID != id {
			t.Fatalf("took %+v (%v) for an answer to %d", h, err, id)
		}
		if h.Truncated {
			if len(a.addrs) > 0 || a.ttl != 0 {
				t.Fatal("believed a truncated answer")
			}
			return
		}
		if qs, err := p.AllQuestions(); err != nil || len(qs) != 1 || qs[0].Type != q.Type || !strings.EqualFold(qs[0].Name.String(), q.Name.String()) {
			t.Fatalf("took an answer to %v (%v) for one to %v", qs, err, q)
		}
		all, err := p.AllAnswers()
		if err != nil && a.final() {
			t.Fatalf("read a message that is malformed: %v", err)
		}
		for _, addr := range a.addrs {
			if !slices.ContainsFunc(all, func(r dnsmessage.Resource) bool { return r.Header.Type == q.Type && holds(r, addr) }) {
				t.Fatalf("%v is not among the answers", addr)
			}
		}
		if a.ttl < 0 || keepFor(&a) > maxTTL || len(a.addrs) > 0 && a.negative {
			t.Fatalf("ttl %v, kept for %v, %d addresses, negative %v", a.ttl, keepFor(&a), len(a.addrs), a.negative)
		}
	})
}

func holds(r dnsmessage.Resource, addr netip.Addr) bool {
	switch b := r.Body.(type) {
	case *dnsmessage.AResource:
		return netip.AddrFrom4(b.A) == addr
	case *dnsmessage.AAAAResource:
		return netip.AddrFrom16(b.AAAA) == addr && !addr.Is4In6()
	}
	return false
}

// TestResolverNextServer: of the system's servers the first is down. Names that no rule covers are found by the next, as
// without a node.
func TestResolverNextServer(t *testing.T) {
	server := newTestDNS(map[string][]string{"www.example A": {"192.0.2.7"}})
	down, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	servers := []string{down.LocalAddr().String(), server.onHost(t).String()}
	down.Close()
	c := newDNSClient(&DNS{}, nil)
	t.Cleanup(func() { c.Close() })
	asked := 0
	r := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		asked++
		return newDNSConn(c, servers[min(asked-1, 1)]), nil
	}}
	addrs, err := r.LookupNetIP(t.Context(), "ip4", "www.example.")
	if err != nil || asked != 2 || len(addrs) != 1 {
		t.Errorf("%v, %v, servers asked: %d", addrs, err, asked)
	}
}
