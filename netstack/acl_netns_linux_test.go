package netstack

import (
	"net"
	"strings"
	"testing"
)

// TestTUNKernelACL: one set of rules, and one table of flows, for the kernel, the stack and the router of a
// node with an interface of the kernel.
func TestTUNKernelACL(t *testing.T) {
	var client PublicKey
	w, _, b := tunNet(t, func(w *routerNet, ca, cb *Config) {
		client = ca.PrivateKey.Public()
		cb.Router = &RouterConfig{Flow: w.flow(routerNS)}
		cb.ACL = []ACLRule{
			{Direction: "in", Peer: client, Protocol: "tcp", Ports: []PortRange{{22, 22}}, To: prefixes("10.66.0.2/32", "fd66::2/128")},
			{Direction: "in", Protocol: "tcp", Ports: []PortRange{{80, 81}}},
			{Direction: "in", Protocol: "icmp"},
			{Direction: "out", Protocol: "tcp", Ports: []PortRange{{7, 7}}},
		}
	})
	for port, name := range map[string]string{":22": "kernel", ":23": "kernel"} {
		w.greeter(routerNS, port, name)
	}
	w.greeter(targetNS, ":80", "target")
	w.greeter(targetNS, ":22", "target")
	for _, port := range []string{":7", ":8"} {
		w.greeter(clientNS, port, "a")
	}
	l, err := b.Listen("tcp", ":81")
	w.Check(err)
	greet(l, "stack")

	for to, want := range map[string]string{
		"10.66.0.2:22": "kernel", "[fd66::2]:22": "kernel", "10.66.0.2:81": "stack", "[fd66::2]:81": "stack",
		"10.9.2.2:80": "target", "[fd92::2]:80": "target",
	} {
		c, err := w.dial(clientNS, to)
		if got := greeting(t, c, err); got != want {
			t.Errorf("%s: %q", to, got)
		}
	}
	for _, to := range []string{"10.66.0.1:7", "[fd66::1]:7"} {
		c, err := w.dial(routerNS, to)
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("b's kernel to %s: %q", to, got)
		}
		c, err = b.Dial(within(t, patience), "tcp", to)
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("b's stack to %s: %q", to, got)
		}
	}
	silent := func(ns int, to string) {
		t.Helper()
		w.On(ns, func() {
			if c, err := net.DialTimeout("tcp", to, silence); err == nil {
				c.Close()
				t.Errorf("%s is reached", to)
			} else if timeout, ok := err.(net.Error); !ok || !timeout.Timeout() {
				t.Errorf("%s: %v, want silence", to, err)
			}
		})
	}
	for _, to := range []string{"10.66.0.2:23", "[fd66::2]:23", "10.9.2.2:22", "[fd92::2]:22"} {
		silent(clientNS, to)
	}
	for _, to := range []string{"10.66.0.1:8", "[fd66::1]:8"} {
		silent(routerNS, to)
		if c, err := b.Dial(within(t, silence), "tcp", to); err == nil {
			c.Close()
			t.Errorf("b's stack reaches %s", to)
		}
	}
	for _, host := range []string{"10.66.0.2", "fd66::2"} { // fragments, by the fork and the filter
		if out, err := w.run(clientNS, "ping", "-c", "3", "-i", "0.05", "-s", "3000", "-W", "5", host); err != nil || !strings.Contains(out, " 0% packet loss") {
			t.Errorf("a's kernel pings %s: %v\n%s", host, err, out)
		}
	}
	if out, err := w.run(routerNS, "ping", "-c", "1", "-W", "1", "10.66.0.1"); err == nil {
		t.Errorf("b's kernel pings:\n%s", out)
	}

	s := b.Status()
	for i, flows := range []uint64{2, 4, 2, 4} {
		if r := s.ACL.Rules[i]; r.Flows != flows {
			t.Errorf("%d flows by %q, want %d", r.Flows, r.Rule, flows)
		}
	}
	const reason = "refused by the packet filter"
	if s.TUN.Drops[reason] == 0 || s.Drops[reason] == 0 || s.ACL.NoRule.Packets == 0 {
		t.Errorf("drops of the kernel's side %v, of the stack's %v, %+v", s.TUN.Drops, s.Drops, s.ACL)
	}
}
