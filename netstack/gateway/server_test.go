package gateway

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// TestServer: our own client signs in, has addresses of both families, and reaches the server inside; its goodbye
// ends everything.
func TestServer(t *testing.T) {
	s := startServer(t, testConfig(t))
	n := mustConnect(t, signInAs(t, s, "alice", "secret"), false)
	for _, host := range []string{"10.9.0.1", "fd09::1"} {
		if _, err := n.Ping(within(t, 10*time.Second), netip.MustParseAddr(host), netstack.PingOptions{}); err != nil {
			t.Errorf("ping %s: %v", host, err)
		}
	}
	list := sessionsOf(t, s, "alice")
	if len(list) != 1 || !list[0].Connected || !slices.Equal(list[0].Addresses, addressesOf(n)) || !strings.Contains(list[0].Agent, "Penstock") {
		t.Fatalf("%+v, the client has %v", list, addressesOf(n))
	}
	if st := s.Status(); st.Clients != 1 || st.Sessions != 1 || st.SignIns != 1 || st.WrongSignIns != 0 {
		t.Errorf("%+v", st)
	}
	n.Close()
	eventually(t, "the session ends", func() bool { return len(sessionsOf(t, s, "alice")) == 0 })
	found, err := s.cfg.Store.List(t.Context(), "")
	if err != nil || len(found) != 1 || found[secretKey] == nil {
		t.Errorf("left in the store: %q, %v", found, err)
	}
}

// TestPorts: a client's UDP goes to the port by which it has come, or to the one that the operator names.
func TestPorts(t *testing.T) {
	cfg := testConfig(t)
	cfg.Listen = append(cfg.Listen, netip.MustParseAddrPort("[::1]:0"))
	s := startServer(t, cfg)
	port := func(s *Server, host string) int {
		t.Helper()
		login := signInAs(t, s, "alice", "secret")
		login.Host = host
		tunnel, err := openconnect.Connect(within(t, 20*time.Second), login, openconnect.ConnectOptions{})
		if err != nil {
			t.Fatal(err)
		}
		tunnel.Conn.Close()
		return tunnel.Settings.DTLSPort
	}
	for _, a := range s.Addrs() {
		if got := port(s, a.String()); got != int(a.Port()) {
			t.Errorf("a client that comes by %v sends UDP to port %d", a, got)
		}
	}
	cfg = testConfig(t)
	cfg.PublicPort = 443
	s = startServer(t, cfg)
	if got := port(s, s.Addrs()[0].String()); got != 443 {
		t.Errorf("behind a port mapping UDP goes to port %d", got)
	}
	if c := s.Command("vpn.example.net", ""); !strings.HasSuffix(c, "https://vpn.example.net") {
		t.Errorf("behind a port mapping: %s", c)
	}
}

// TestCookie: whoever has it gets the same addresses again, after a lost connection and beside a living one; an
// unknown one gets nobody in.
func TestCookie(t *testing.T) {
	s := startServer(t, testConfig(t))
	login := signInAs(t, s, "alice", "secret")
	first := mustConnect(t, login, true)
	before := addressesOf(first)
	first.Close() // without a goodbye
	second := mustConnect(t, login, true)
	if after := addressesOf(second); !slices.Equal(before, after) {
		t.Errorf("first %v, then %v", before, after)
	}
	third := mustConnect(t, login, true)
	if after := addressesOf(third); !slices.Equal(before, after) {
		t.Errorf("first %v, then %v", before, after)
	}
	if list := sessionsOf(t, s, "alice"); len(list) != 1 {
		t.Errorf("%+v", list)
	}
	for _, cookie := range []string{newCookie(), login.Cookie[:len(login.Cookie)-1], idOf(login.Cookie)} {
		other := *login
		other.Cookie = cookie
		if _, err := connectAs(t, &other, true); !errors.Is(err, openconnect.ErrCookie) {
			t.Errorf("with cookie %q: %v", cookie, err)
		}
	}
	if n := len(s.sessions.all()); n != 1 {
		t.Errorf("%d sessions are known, those of unknown cookies too", n)
	}
}

// TestSharedStore: servers that share a store know each other's sign-ins under way, sessions and leases.
func TestSharedStore(t *testing.T) {
	mini := miniredis.RunT(t)
	users := testUsers(t)
	server := func(id string) *Server {
		cfg := testConfig(t)
		store, err := OpenRedisStore(RedisOptions{URL: "redis://" + mini.Addr()})
		if err != nil {
			t.Fatal(err)
		}
		file, err := OpenUserFile(users, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Store, cfg.ServerID, cfg.Users = store, id, file
		// Two addresses: the second server must not give away those of the first.
		cfg.Profile.Pool = pool(t, "10.9.0.10-10.9.0.11")
		return startServer(t, cfg)
	}
	a, b := server("a"), server("b")
	if !strings.HasPrefix(a.Pin(), "pin-sha256:") || a.Pin() == b.Pin() {
		t.Errorf("pins %s and %s", a.Pin(), b.Pin())
	}
	login := signInAs(t, a, "alice", "secret")
	first := mustConnect(t, login, true)
	before := addressesOf(first)
	second := mustConnect(t, signInAs(t, b, "alice", "secret"), false)
	if addressesOf(second)[0] == before[0] {
		t.Errorf("both have %v", before)
	}
	if _, err := connectAs(t, signInAs(t, b, "alice", "secret"), false); err == nil || !strings.Contains(err.Error(), "No address is free") {
		t.Errorf("a third client: %v", err)
	}
	if list := sessionsOf(t, a, "alice"); len(list) != 3 {
		t.Errorf("%+v", list)
	}
	// The first moves to the other server. The one that it has left lets go.
	moved := *login
	moved.Host, moved.Pin = b.Addrs()[0].String(), b.Pin()
	again := mustConnect(t, &moved, false)
	if after := addressesOf(again); !slices.Equal(before, after) {
		t.Errorf("at the first server %v, at the second %v", before, after)
	}
	for _, session := range a.sessions.all() {
		session.touch(t.Context(), true)
	}
	if n := len(a.sessions.all()); n != 0 {
		t.Errorf("the server that was left has %d sessions", n)
	}
	if list := sessionsOf(t, a, "alice"); len(list) != 3 {
		t.Errorf("the session was ended for the other one: %+v", list)
	}
	first.Close()
	// What one server ends is ended for all.
	if n, err := a.Kick(t.Context(), "alice"); n != 3 || err != nil {
		t.Errorf("kicked %d, %v", n, err)
	}
	for _, session := range b.sessions.all() {
		session.touch(t.Context(), true)
	}
	if n := len(b.sessions.all()); n != 0 {
		t.Errorf("kicked sessions go on: %d", n)
	}
}

// TestRestart: with bbolt the cookie is good at the next start, and addresses are the same.
func TestRestart(t *testing.T) {
	file := filepath.Join(t.TempDir(), "store")
	state, users := t.TempDir(), testUsers(t)
	server := func() *Server {
		store, err := OpenBoltStore(file)
		if err != nil {
			t.Fatal(err)
		}
		u, err := OpenUserFile(users, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg := testConfig(t)
		cfg.Store, cfg.StateDir, cfg.Users = store, state, u
		s, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := server()
	pin := s.Pin()
	login := signInAs(t, s, "alice", "secret")
	n := mustConnect(t, login, true)
	before := addressesOf(n)
	n.Close()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = server()
	defer s.Close()
	if s.Pin() != pin {
		t.Errorf("the pin was %s and is %s", pin, s.Pin())
	}
	// Somebody else does not get these addresses.
	other := mustConnect(t, signInAs(t, s, "alice", "secret"), false)
	if a := addressesOf(other); a[0] == before[0] || a[1] == before[1] {
		t.Errorf("%v were given away: %v", before, a)
	}
	login.Host = s.Addrs()[0].String()
	if after := addressesOf(mustConnect(t, login, false)); !slices.Equal(before, after) {
		t.Errorf("before %v, after %v", before, after)
	}
}

// TestLimits: of a user, where a session without a client gives way, and in all.
func TestLimits(t *testing.T) {
	cfg := testConfig(t, UserEntry{Name: "bob", Hash: cheap(t, "secret")})
	cfg.MaxPerUser, cfg.MaxClients = 2, 3
	s := startServer(t, cfg)
	mustConnect(t, signInAs(t, s, "alice", "secret"), true)
	idle := signInAs(t, s, "alice", "secret")
	third := signInAs(t, s, "alice", "secret") // displaces idle
	if _, err := connectAs(t, idle, false); !errors.Is(err, openconnect.ErrCookie) {
		t.Errorf("the displaced session: %v", err)
	}
	mustConnect(t, third, true)
	if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "secret")); !errors.Is(err, openconnect.ErrDenied) || !strings.Contains(err.Error(), "too many sessions") {
		t.Errorf("a third session: %v", err)
	}
	mustConnect(t, signInAs(t, s, "bob", "secret"), true)
	var full *openconnect.UnavailableError
	if _, err := connectAs(t, signInAs(t, s, "bob", "secret"), true); !errors.As(err, &full) || !strings.Contains(full.Reason, "full") {
		t.Errorf("a fourth client: %v", err)
	}
}

// TestTimeouts: sessions end by age, by idleness, and when their client has been gone for long, and free their addresses.
func TestTimeouts(t *testing.T) {
	for name, change := range map[string]func(p *Profile){
		"session": func(p *Profile) { p.SessionTimeout = 2 * time.Second },
		"idle":    func(p *Profile) { p.IdleTimeout = 2 * time.Second },
		"gone":    func(p *Profile) { p.DisconnectedTimeout = 2 * time.Second },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig(t)
			change(&cfg.Profile)
			s := startServer(t, cfg)
			login := signInAs(t, s, "alice", "secret")
			n := mustConnect(t, login, true)
			if name == "gone" {
				n.Close()
			}
			eventually(t, "the session ends", func() bool { return len(sessionsOf(t, s, "alice")) == 0 })
			if _, err := connectAs(t, login, false); !errors.Is(err, openconnect.ErrCookie) {
				t.Errorf("its cookie: %v", err)
			}
			if len(s.sessions.inUse) != 0 {
				t.Errorf("addresses are not free: %v", s.sessions.inUse)
			}
		})
	}
}

// TestDisabled: a user who is disabled is out, with his session.
func TestDisabled(t *testing.T) {
	cfg := testConfig(t)
	cfg.SessionCheck = 100 * time.Millisecond
	s := startServer(t, cfg)
	mustConnect(t, signInAs(t, s, "alice", "secret"), true)
	path := cfg.Users.(*UserFile).path
	err := EditUsers(path, func(set *UserSet) error {
		e, _ := set.Find("alice")
		e.Disabled = true
		return set.Replace(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "her session ends", func() bool { return len(sessionsOf(t, s, "alice")) == 0 })
	if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "secret")); !errors.Is(err, openconnect.ErrDenied) {
		t.Errorf("a disabled user: %v", err)
	}
}

// TestStoreAway: while the store does not answer nobody signs in, but tunnels go on; then all is as before.
func TestStoreAway(t *testing.T) {
	mini := miniredis.RunT(t)
	store, err := OpenRedisStore(RedisOptions{URL: "redis://" + mini.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t)
	cfg.Store = store
	s := startServer(t, cfg)
	n := mustConnect(t, signInAs(t, s, "alice", "secret"), false)
	mini.SetError("LOADING the store is away")
	if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "secret")); err == nil || errors.Is(err, openconnect.ErrDenied) {
		t.Errorf("without a store: %v", err)
	}
	if st := s.Status(); st.WrongSignIns != 0 {
		t.Error("the store's failure was held against the user")
	}
	for _, session := range s.sessions.all() {
		session.look(t.Context(), time.Now().Add(time.Minute))
	}
	if _, err := n.Ping(within(t, 10*time.Second), netip.MustParseAddr("10.9.0.1"), netstack.PingOptions{}); err != nil {
		t.Error(err)
	}
	mini.SetError("")
	mini.FlushAll() // everything has expired meanwhile
	for _, session := range s.sessions.all() {
		session.mu.Lock()
		session.touched = time.Now().Add(-time.Hour)
		session.mu.Unlock()
		session.touch(t.Context(), true)
	}
	if list := sessionsOf(t, s, "alice"); len(list) != 1 || !slices.Equal(list[0].Addresses, addressesOf(n)) {
		t.Errorf("written down anew: %+v", list)
	}
	if l, err := loadIDs(t.Context(), store, "alice"); err != nil || len(l.ids) != 1 {
		t.Errorf("it does not count as one of hers: %v, %v", l.ids, err)
	}
}

// TestStrangers: connections on which nobody signs in are bounded, and the oldest gives way.
func TestStrangers(t *testing.T) {
	cfg := testConfig(t)
	cfg.Ban = BanConfig{Connection: -1, Rate: 10000, Burst: 10000, PerAddress: 1000, Unknown: 20}
	s := startServer(t, cfg)
	var conns []net.Conn
	for range 40 {
		c, err := net.Dial("tcp", s.Addrs()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
	}
	eventually(t, "the oldest are closed", func() bool { return s.Status().Refused["displaced by newer ones"] == 20 })
	conns[0].SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conns[0].Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the first: %v", err)
	}
	// Somebody who means it gets in meanwhile.
	mustConnect(t, signInAs(t, s, "alice", "secret"), false)
	s.strangers.mu.Lock()
	defer s.strangers.mu.Unlock()
	if s.strangers.n > 20 {
		t.Errorf("%d strangers", s.strangers.n)
	}
}

// TestBan: wrong passwords lead to a ban, which closes connections unread and leaves tunnels alone.
func TestBan(t *testing.T) {
	cfg := testConfig(t)
	cfg.Ban = BanConfig{}
	s := startServer(t, cfg)
	n := mustConnect(t, signInAs(t, s, "alice", "secret"), false)
	tries := 0
	for ; tries < 20 && s.Status().Bans == 0; tries++ {
		if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "wrong")); err == nil {
			t.Fatal("a wrong password was right")
		}
	}
	if tries < 6 || tries > 8 { // 80 points, 10 each and one for the connection
		t.Errorf("banned after %d tries", tries)
	}
	if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "secret")); err == nil {
		t.Error("a banned address came in")
	}
	st := s.Status()
	if len(st.Banned) != 1 || st.Banned[0].Source.String() != "127.0.0.1/32" || st.Refused["banned"] == 0 {
		t.Errorf("%+v", st)
	}
	if _, err := n.Ping(within(t, 10*time.Second), netip.MustParseAddr("10.9.0.1"), netstack.PingOptions{}); err != nil {
		t.Errorf("the tunnel of before: %v", err)
	}
}

// TestCodes: after the password a code, each once, and tries are bounded by user.
func TestCodes(t *testing.T) {
	secret, uri, err := NewSecret("Lab", "tina")
	if err != nil || !strings.HasPrefix(uri, "otpauth://totp/Lab:tina?") {
		t.Fatal(uri, err)
	}
	s := startServer(t, testConfig(t, UserEntry{Name: "tina", Hash: cheap(t, "secret"), Secret: secret}))
	with := func(code string) error {
		o := options(s, "tina", "secret")
		o.Prompt = func(_ context.Context, q openconnect.Question) (string, error) {
			switch {
			case q.Field.Name == "username":
				return "tina", nil
			case q.Form.Message == "" || !strings.Contains(q.Form.Message, "authenticator"):
				return "secret", nil
			}
			return code, nil
		}
		_, err := openconnect.SignIn(within(t, 20*time.Second), o)
		return err
	}
	now := time.Now()
	code := codeNow(t, secret, now)
	for _, wrong := range []string{"", "000000x", codeNow(t, secret, now.Add(time.Hour)), codeNow(t, secret, now.Add(-time.Hour))} {
		if err := with(wrong); err == nil {
			t.Errorf("with the code %q he came in", wrong)
		}
	}
	if err := with(code); err != nil {
		t.Fatal(err)
	}
	if err := with(code); err == nil {
		t.Error("a code was good twice")
	}
	for range maxCodeTries {
		_ = with("123456")
	}
	if err := with(codeNow(t, secret, time.Now().Add(totpPeriod*time.Second))); err == nil {
		t.Error("too many tries, and the right code is good")
	}
	if err := s.codes.try("tina", time.Now().Add(2*codeTriesTime)); !err {
		t.Error("for ever")
	}
}
