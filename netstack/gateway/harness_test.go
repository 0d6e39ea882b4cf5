package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pquerna/otp/totp"
	"go.uber.org/goleak"
	"golang.org/x/crypto/bcrypt"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The stack's timers, as in netstack's own tests.
		goleak.IgnoreTopFunction("gvisor.dev/gvisor/pkg/sync.Gopark"),
	)
}

// cheap is a hash that takes a millisecond.
func cheap(t testing.TB, password string) string {
	t.Helper()
	h, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	return string(h)
}

// testUsers is a file with alice, password "secret", and what is said beside.
func testUsers(t testing.TB, entries ...UserEntry) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "users")
	err := EditUsers(path, func(set *UserSet) error {
		for _, e := range append(entries, UserEntry{Name: "alice", Hash: cheap(t, "secret")}) {
			if err := set.Add(e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// A testLog collects what a server logs, and prints it if the test fails.
type testLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *testLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// has tells whether text was logged.
func (l *testLog) has(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), text)
}

func testLogger(t testing.TB) (*slog.Logger, *testLog) {
	l := new(testLog)
	t.Cleanup(func() {
		if t.Failed() {
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Log(l.b.String())
		}
	})
	return slog.New(slog.NewTextHandler(l, nil)), l
}

// testConfig is a server on loopback with pools of 100 and 2^64 addresses.
func testConfig(t testing.TB, entries ...UserEntry) Config {
	t.Helper()
	log, _ := testLogger(t)
	users, err := OpenUserFile(testUsers(t, entries...), log)
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Listen:   []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		StateDir: t.TempDir(), Users: users,
		Profile: Profile{Pool: pool(t, "10.9.0.10-10.9.0.109", "fd09::/64")},
		Node: netstack.Config{
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64")},
			Router:    &netstack.RouterConfig{},
		},
		Ban:    BanConfig{Exempt: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}},
		Logger: log,
	}
}

func pool(t testing.TB, ranges ...string) (p Pool) {
	t.Helper()
	for _, s := range ranges {
		r, err := ParseRange(s)
		if err != nil {
			t.Fatal(err)
		}
		p = append(p, r)
	}
	return p
}

func startServer(t testing.TB, cfg Config) *Server {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// options are those of a client of s.
func options(s *Server, user, password string) openconnect.Options {
	return openconnect.Options{
		Dialer: openconnect.Dialer{Pin: s.Pin()}, Server: "https://" + s.Addrs()[0].String(),
		Tries: 1, Prompt: answers(map[string]string{"username": user, "password": password}),
	}
}

var errNoAnswer = errors.New("this is not to be asked")

// answers is a prompt that knows what to say to the fields of these names.
func answers(m map[string]string) func(context.Context, openconnect.Question) (string, error) {
	return func(_ context.Context, q openconnect.Question) (string, error) {
		if a, ok := m[q.Field.Name]; ok {
			return a, nil
		}
		return "", fmt.Errorf("%s: %w", q.Field.Name, errNoAnswer)
	}
}

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// signInAs signs in, or fails the test.
func signInAs(t testing.TB, s *Server, user, password string) *openconnect.Login {
	t.Helper()
	login, err := openconnect.SignIn(within(t, 20*time.Second), options(s, user, password))
	if err != nil {
		t.Fatal(err)
	}
	return login
}

// connectAs is a node that is a client of the server.
func connectAs(t testing.TB, login *openconnect.Login, keep bool) (*netstack.Node, error) {
	t.Helper()
	log, _ := testLogger(t)
	n, err := netstack.New(netstack.Config{
		OpenConnect: &netstack.OpenConnect{
			Login: *login, KeepSession: keep, Timeout: 10 * time.Second,
		},
		Logger: log,
	})
	if err == nil {
		t.Cleanup(func() { n.Close() })
	}
	return n, err
}

func mustConnect(t testing.TB, login *openconnect.Login, keep bool) *netstack.Node {
	t.Helper()
	n, err := connectAs(t, login, keep)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// addressesOf are a client's, IPv4 first.
func addressesOf(n *netstack.Node) (list []netip.Addr) {
	for _, p := range n.Addresses() {
		list = append(list, p.Addr())
	}
	return list
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

// sessionsOf are a user's as the server lists them.
func sessionsOf(t testing.TB, s *Server, user string) (list []SessionStatus) {
	t.Helper()
	all, err := s.Sessions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, st := range all {
		if st.User == user {
			list = append(list, st)
		}
	}
	return list
}

func codeNow(t testing.TB, secret string, at time.Time) string {
	t.Helper()
	code, err := totp.GenerateCode(secret, at)
	if err != nil {
		t.Fatal(err)
	}
	return code
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
