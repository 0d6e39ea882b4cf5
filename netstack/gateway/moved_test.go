package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// sharing starts servers that share a store.
func sharing(t *testing.T, change func(*Config), ids ...string) (servers []*Server) {
	t.Helper()
	mini := miniredis.RunT(t)
	users := testUsers(t)
	for _, id := range ids {
		store, err := OpenRedisStore(RedisOptions{URL: "redis://" + mini.Addr()})
		if err != nil {
			t.Fatal(err)
		}
		file, err := OpenUserFile(users, nil)
		if err != nil {
			t.Fatal(err)
		}
		cfg := testConfig(t)
		cfg.Store, cfg.ServerID, cfg.Users = store, id, file
		if change != nil {
			change(&cfg)
		}
		servers = append(servers, startServer(t, cfg))
	}
	return servers
}

// at is login for another server.
func at(s *Server, login *openconnect.Login) *openconnect.Login {
	moved := *login
	moved.Host, moved.Pin = s.Addrs()[0].String(), s.Pin()
	return &moved
}

// TestMovedSessionLives: the server that a client has left does not end the session when the client is at another.
func TestMovedSessionLives(t *testing.T) {
	s := sharing(t, nil, "a", "b")
	login := signInAs(t, s[0], "alice", "secret")
	first := mustConnect(t, login, true)
	first.Close() // the connection is lost
	eventually(t, "a sees it", func() bool { return !sessionsOf(t, s[0], "alice")[0].Connected })
	mustConnect(t, at(s[1], login), true)
	for _, session := range s[0].sessions.all() {
		session.look(t.Context(), time.Now().Add(6*time.Minute))
	}
	if n := len(s[0].sessions.all()); n != 0 {
		t.Errorf("the server that was left has %d sessions", n)
	}
	if list := sessionsOf(t, s[1], "alice"); len(list) != 1 || !list[0].Connected {
		t.Errorf("the other server's session was ended: %+v", list)
	}
}

// TestKickElsewhere: a session that another server ends is over here within SessionCheck.
func TestKickElsewhere(t *testing.T) {
	s := sharing(t, nil, "a", "b")
	mustConnect(t, signInAs(t, s[0], "alice", "secret"), true)
	if n, err := s[1].Kick(t.Context(), "alice"); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	for _, session := range s[0].sessions.all() {
		session.look(t.Context(), time.Now().Add(61*time.Second))
	}
	if n := len(s[0].sessions.all()); n != 0 {
		t.Errorf("a minute after it was kicked the client is still in")
	}
}

// hookStore calls hooks around another store.
type hookStore struct {
	Store
	get    atomic.Pointer[func(key string) error]
	update atomic.Pointer[func() error]
}

func (h *hookStore) Get(ctx context.Context, key string) ([]byte, error) {
	if f := h.get.Load(); f != nil {
		if err := (*f)(key); err != nil {
			return nil, err
		}
	}
	return h.Store.Get(ctx, key)
}

func (h *hookStore) Update(ctx context.Context, c ...Change) error {
	if f := h.update.Load(); f != nil {
		if err := (*f)(); err != nil {
			return err
		}
	}
	return h.Store.Update(ctx, c...)
}

// TestGoneWhileLost: a session has gone from the store, and its client comes back in the moment in which the loss of its connection is
// written down.
func TestGoneWhileLost(t *testing.T) {
	cfg := testConfig(t)
	store := &hookStore{Store: NewMemoryStore()}
	cfg.Store = store
	s := startServer(t, cfg)
	login := signInAs(t, s, "alice", "secret")
	mustConnect(t, login, true)
	session := s.sessions.all()[0]
	if err := endRecord(t.Context(), store, session.id); err != nil {
		t.Fatal(err)
	}
	fired := false
	update := func() error { // that of touch: the client comes now
		if !fired {
			fired = true
			session.connecting.Lock()
			session.load(t.Context())
			session.connecting.Unlock()
		}
		return nil
	}
	store.update.Store(&update)
	session.touch(t.Context(), false)
}

// TestLateClient: a client that comes back when its session has just expired leaves its addresses to others.
func TestLateClient(t *testing.T) {
	s := startServer(t, testConfig(t))
	login := signInAs(t, s, "alice", "secret")
	n := mustConnect(t, login, true)
	n.Close()
	session := s.sessions.all()[0]
	eventually(t, "the loss is noticed", func() bool {
		session.mu.Lock()
		defer session.mu.Unlock()
		return session.tunnel == nil || !session.tunnel.stream
	})
	if err := endRecord(t.Context(), s.cfg.Store, session.id); err != nil { // as if it had expired
		t.Fatal(err)
	}
	if _, err := connectAs(t, login, true); !errors.Is(err, openconnect.ErrCookie) {
		t.Fatal(err)
	}
	if len(s.sessions.inUse) != 0 {
		t.Errorf("addresses that nobody gets any more: %v", s.sessions.inUse)
	}
}

// TestCookiesWithoutStore: what comes with cookies that cannot be looked up leaves nothing behind.
func TestCookiesWithoutStore(t *testing.T) {
	cfg := testConfig(t)
	store := &hookStore{Store: NewMemoryStore()}
	cfg.Store = store
	s := startServer(t, cfg)
	login := signInAs(t, s, "alice", "secret")
	away := func(string) error { return errors.New("away") }
	store.get.Store(&away)
	for range 20 {
		other := *login
		other.Cookie = newCookie()
		if _, err := connectAs(t, &other, true); err == nil {
			t.Fatal("let in")
		}
	}
	if n := len(s.sessions.all()); n != 0 {
		t.Errorf("%d sessions of strangers are kept", n)
	}
}

// TestCrowdedPool: an address is found among many that other servers have.
func TestCrowdedPool(t *testing.T) {
	cfg := testConfig(t)
	cfg.Profile.Pool = pool(t, "10.9.0.10-10.9.0.29")
	cfg.Store = NewMemoryStore()
	s := startServer(t, cfg)
	for i := range 19 { // another server's
		a := netip.AddrFrom4([4]byte{10, 9, 0, byte(10 + i)})
		if err := cfg.Store.Update(t.Context(), Change{Key: leaseKey + a.String(), New: fmt.Append(nil, "other", i)}); err != nil {
			t.Fatal(err)
		}
	}
	n := mustConnect(t, signInAs(t, s, "alice", "secret"), true)
	if a := addressesOf(n); a[0].String() != "10.9.0.29" {
		t.Error(a)
	}
}

// TestRenewWithoutStore: a client that comes back while the store is away goes on.
func TestRenewWithoutStore(t *testing.T) {
	cfg := testConfig(t)
	store := &hookStore{Store: NewMemoryStore()}
	cfg.Store = store
	s := startServer(t, cfg)
	login := signInAs(t, s, "alice", "secret")
	n := mustConnect(t, login, true)
	away := func(string) error { return errors.New("away") }
	awayToo := func() error { return errors.New("away") }
	store.get.Store(&away)
	store.update.Store(&awayToo)
	n.Close()
	again, err := connectAs(t, login, true)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := addressesOf(n), addressesOf(again); fmt.Sprint(a) != fmt.Sprint(b) {
		t.Errorf("%v, then %v", a, b)
	}
}

// TestGroupTakenAway: who is taken out of a group is out of its sessions too.
func TestGroupTakenAway(t *testing.T) {
	cfg := testConfig(t, UserEntry{Name: "olga", Hash: cheap(t, "secret"), Groups: []string{"ops"}})
	cfg.Groups = []Group{{Name: "ops"}}
	cfg.SessionCheck = 100 * time.Millisecond
	s := startServer(t, cfg)
	o := options(s, "olga", "secret")
	o.Prompt = answers(map[string]string{"username": "olga", "password": "secret", "group_list": "ops"})
	login, err := openconnect.SignIn(within(t, 20*time.Second), o)
	if err != nil {
		t.Fatal(err)
	}
	mustConnect(t, login, true)
	err = EditUsers(cfg.Users.(*UserFile).path, func(set *UserSet) error {
		e, _ := set.Find("olga")
		e.Groups = nil
		return set.Replace(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(6 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if len(sessionsOf(t, s, "olga")) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("her session in the group goes on")
		}
	}
}
