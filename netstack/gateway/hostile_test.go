package gateway

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// TestStateAlone: who can seal states, as he has read the store, does not get in without the password, or the certificate.
func TestStateAlone(t *testing.T) {
	s := startServer(t, testConfig(t))
	c := &openconnect.Client{Remote: netip.MustParseAddrPort("127.0.0.1:1")}
	d, err := signIn{s}.Answer(t.Context(), c, &openconnect.Answers{State: []byte(`{"u":"alice","p":true}`)})
	if err != nil || d.Cookie != "" {
		t.Errorf("in by a state alone: %+v, %v", d, err)
	}
	s.cfg.Method = Both // as configured since the state was made, or at another server
	d, err = signIn{s}.Answer(t.Context(), c, &openconnect.Answers{State: []byte(`{}`), Username: "alice", Password: "secret"})
	if err != nil || d.Cookie != "" {
		t.Errorf("in without a certificate: %+v, %v", d, err)
	}
	s.cfg.Method = Certificate
	d, err = signIn{s}.Answer(t.Context(), c, &openconnect.Answers{State: []byte(`{}`), Username: "alice", Password: "secret"})
	if err != nil || d.Cookie != "" {
		t.Errorf("in without a certificate: %+v, %v", d, err)
	}
}

// TestOwnSignInForgivesNothingElse: who has an account of his own does not get the points back that guessing at another's has cost.
func TestOwnSignInForgivesNothingElse(t *testing.T) {
	cfg := testConfig(t, UserEntry{Name: "mallory", Hash: cheap(t, "mine")})
	cfg.Ban = BanConfig{}
	s := startServer(t, cfg)
	guesses := 0
	for ; guesses < 30; guesses++ {
		if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "alice", "wrong")); err == nil {
			t.Fatal("a wrong password was right")
		}
		if s.Status().Bans > 0 {
			return
		}
		if guesses%5 == 4 {
			if _, err := openconnect.SignIn(within(t, 20*time.Second), options(s, "mallory", "mine")); err != nil {
				break
			}
		}
	}
	if s.Status().Bans == 0 {
		t.Errorf("%d wrong passwords for alice, and no ban", guesses)
	}
}

// TestUsersWrittenInPlace: a file that is being written over is not taken for what is in it so far.
func TestUsersWrittenInPlace(t *testing.T) {
	cfg := testConfig(t, UserEntry{Name: "bob", Hash: cheap(t, "secret")})
	cfg.SessionCheck = 50 * time.Millisecond
	s := startServer(t, cfg)
	mustConnect(t, signInAs(t, s, "alice", "secret"), true)
	path := cfg.Users.(*UserFile).path
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// As by "for u in ...; do htpasswd -nbB $u ...; done > users".
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		time.Sleep(300 * time.Millisecond)
		s.sessions.all()[0].look(t.Context(), time.Now())
		if len(s.sessions.all()) == 0 {
			t.Fatal("alice's session was ended before her line was written")
		}
		f.WriteString(line)
	}
	f.Close()
	eventually(t, "the file is read again", func() bool {
		f := cfg.Users.(*UserFile)
		f.current()
		f.mu.Lock()
		defer f.mu.Unlock()
		st, err := stateOf(path)
		return err == nil && st.same(f.state)
	})
	if len(sessionsOf(t, s, "alice")) != 1 {
		t.Error("alice's session was ended")
	}
}

// TestCostsTakeTheSameTime: with hashes of several costs nobody's takes less time than another's, or than that of an unknown user.
func TestCostsTakeTheSameTime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users")
	dear, err := bcrypt.GenerateFromPassword([]byte("x"), 9)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, "old1:"+cheap(t, "x")+"\nold2:"+cheap(t, "x")+"\nnew:"+string(dear)+"\n")
	f, err := OpenUserFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	least := map[string]time.Duration{}
	try := func(name string) time.Duration {
		began := time.Now()
		if _, err := f.Password(t.Context(), name, "wrong"); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
		d := time.Since(began)
		if before, ok := least[name]; ok {
			d = min(d, before)
		}
		least[name] = d
		return d
	}
	// The least of several tries, on a machine that has other work too.
	var bad string
	for range 40 {
		bad = ""
		unknown := try("nobody")
		for _, name := range []string{"old1", "new"} {
			if d := try(name); d < unknown*2/3 || d > unknown*3/2 {
				bad = fmt.Sprintf("%s is refused after %v, an unknown user after %v", name, d, unknown)
			}
		}
		if bad == "" {
			break
		}
	}
	if bad != "" {
		t.Error(bad)
	}
	if _, err := f.Password(t.Context(), "old1", "x"); err != nil {
		t.Error(err)
	}
}

// TestStoreAwayIsLeftAlone: a store that does not answer is not waited for once for each session.
func TestStoreAwayIsLeftAlone(t *testing.T) {
	cfg := testConfig(t)
	store := &hookStore{Store: NewMemoryStore()}
	cfg.Store = store
	s := startServer(t, cfg)
	for range 5 {
		mustConnect(t, signInAs(t, s, "alice", "secret"), true)
	}
	var calls atomic.Int32
	away := func() error { calls.Add(1); return errors.New("away") }
	store.update.Store(&away)
	for _, session := range s.sessions.all() {
		session.look(t.Context(), time.Now().Add(2*time.Minute))
	}
	// upkeep itself goes on with the clock as it is, and has nothing to write.
	if n := calls.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// TestRedisURLStaysSecret: no message has the password of a URL.
func TestRedisURLStaysSecret(t *testing.T) {
	for _, url := range []string{"redis://:hush@host:port/0", "redis://:hush@ho st/0", "http://:hush@host/", "redis://:hush@127.0.0.1:1/x"} {
		_, err := OpenRedisStore(RedisOptions{URL: url})
		if err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v", err)
		}
	}
}
