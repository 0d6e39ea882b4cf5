package netstack

import (
	"context"
	"flag"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/refs"
)

func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" { // it keeps a stack trace of every reference
		refs.SetLeakMode(refs.LeaksPanic)
	}
	goleak.VerifyTestMain(leakCheck{m})
}

// leakCheck looks for leaked packet references after the last test.
type leakCheck struct{ m *testing.M }

func (l leakCheck) Run() int {
	code := l.m.Run()
	refs.DoRepeatedLeakCheck() // panics
	return code
}

func newKey(t testing.TB) PrivateKey {
	t.Helper()
	k, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func prefixes(ss ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range ss {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

// pair makes two nodes that know each other over loopback, a at 10.66.0.1 and fd66::1, b
// at 10.66.0.2 and fd66::2. change, if not nil, edits the configurations first.
func pair(t testing.TB, change func(a, b *Config)) (a, b *Node) {
	t.Helper()
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	ca := Config{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.1/24", "fd66::1/64")}
	cb := Config{PrivateKey: newKey(t), Listen: loopback, Addresses: prefixes("10.66.0.2/24", "fd66::2/64")}
	cb.Peers = []Peer{{Name: "a", PublicKey: ca.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}}
	if change != nil {
		change(&ca, &cb)
	}
	b = start(t, cb)
	ca.Peers = append(ca.Peers, Peer{
		Name: "b", PublicKey: cb.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128"),
		Endpoint: b.LocalAddrs()[0].String(),
	})
	a = start(t, ca)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.WaitEstablished(ctx, b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	if err := b.WaitEstablished(ctx, a.PublicKey()); err != nil {
		t.Fatal(err)
	}
	return a, b
}

// start makes a node that the test closes.
func start(t testing.TB, c Config) *Node {
	t.Helper()
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return n
}

// within bounds a test's waiting.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
