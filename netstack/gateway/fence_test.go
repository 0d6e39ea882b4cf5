package gateway

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// TestOnlyRoutes: clients of a group with OnlyRoutes reach its routes, its name server and the server, and nothing else, be it that the router allows it
// or that they are told nothing of it; those of others reach what the router allows.
func TestOnlyRoutes(t *testing.T) {
	cfg := testConfig(t,
		UserEntry{Name: "carl", Hash: cheap(t, "secret"), Groups: []string{"contractors"}},
		UserEntry{Name: "olga", Hash: cheap(t, "secret"), Groups: []string{"ops"}})
	cfg.Groups = []Group{
		{Name: "contractors", Profile: Profile{
			OnlyRoutes: true,
			Routes:     []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}, NoRoutes: []netip.Prefix{netip.MustParsePrefix("198.51.100.128/25")},
			DNS: []netip.Addr{netip.MustParseAddr("203.0.113.53")},
		}},
		{Name: "ops"},
	}
	cfg.Node.Switch = true
	cfg.Node.Router = &netstack.RouterConfig{
		Allow: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")},
		Flow: func(context.Context, netstack.Flow) (net.Conn, error) {
			a, b := net.Pipe()
			go func() { io.WriteString(b, "hello"); b.Close() }()
			return a, nil
		},
	}
	s := startServer(t, cfg)
	enter := func(user string) *netstack.Node {
		t.Helper()
		o := options(s, user, "secret")
		o.Prompt = answers(map[string]string{"username": user, "password": "secret", "group_list": DefaultGroup})
		login, err := openconnect.SignIn(within(t, 20*time.Second), o)
		if err != nil {
			t.Fatal(err)
		}
		// A client that sends what it likes.
		n, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{Login: *login, KeepSession: true, Timeout: 10 * time.Second,
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { n.Close() })
		return n
	}
	carl, olga := enter("carl"), enter("olga")
	hello := func(n *netstack.Node, at string) {
		t.Helper()
		l, err := n.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				io.WriteString(c, "hello")
				c.Close()
			}
		}()
	}
	hello(s.Node(), "10.9.0.1:80")
	hello(s.Node(), "[fd09::1]:80")
	hello(olga, net.JoinHostPort(addressesOf(olga)[0].String(), "80"))
	reaches := func(n *netstack.Node, to string) bool {
		c, err := n.Dial(within(t, 700*time.Millisecond), "tcp", to)
		if err != nil {
			return false
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		return string(b) == "hello" && err == nil
	}
	for _, v := range []struct {
		to         string
		carl, olga bool
	}{
		{"198.51.100.1:80", true, true},
		{"198.51.100.200:80", false, true},
		{"192.0.2.1:80", false, true},
		{"[2001:db8::1]:80", false, true},
		{"203.0.113.53:53", true, true},
		{"[fd09::1]:80", true, true},
		{"10.9.0.1:80", true, true},
		{net.JoinHostPort(addressesOf(olga)[0].String(), "80"), false, true},
	} {
		if got := reaches(carl, v.to); got != v.carl {
			t.Errorf("carl reaches %s: %v", v.to, got)
		}
		if got := reaches(olga, v.to); got != v.olga {
			t.Errorf("olga reaches %s: %v", v.to, got)
		}
	}
}

// TestFenceRules: the rules of groups come before a last one that allows everything, and after all others.
func TestFenceRules(t *testing.T) {
	g := newGroups(Profile{}, []Group{{Name: "g", Profile: Profile{OnlyRoutes: true}}})
	if r := newGroups(Profile{}, []Group{{Name: "g"}}).fence(nil, nil); r != nil {
		t.Errorf("without OnlyRoutes: %+v", r)
	}
	deny := netstack.ACLRule{Deny: true, Protocol: "udp"}
	for _, v := range []struct {
		rules       []netstack.ACLRule
		first, last netstack.ACLRule
	}{
		{nil, netstack.ACLRule{Direction: "in", Group: "g"}, netstack.ACLRule{}},
		{[]netstack.ACLRule{deny, {}}, deny, netstack.ACLRule{}},
		{[]netstack.ACLRule{deny}, deny, netstack.ACLRule{Direction: "in", Group: "g", Deny: true}},
	} {
		got := g.fence(v.rules, nil)
		if first, last := got[0], got[len(got)-1]; first.Group != v.first.Group || first.Deny != v.first.Deny || last.Group != v.last.Group || last.Deny != v.last.Deny {
			t.Errorf("%+v became %+v", v.rules, got)
		}
	}
}
