package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// TestUserLines: what is written is what is read, and mistakes are told with their line and without the hash.
func TestUserLines(t *testing.T) {
	hash := cheap(t, "x")
	good := "# users\n\nalice:" + hash + "\nbob:" + strings.Replace(hash, "$2a$", "$2y$", 1) + ":groups=ops,staff address=10.9.0.5,fd09::5 totp=JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP disabled\ncarol:*\n"
	path := filepath.Join(t.TempDir(), "users")
	writeFile(t, path, good)
	set, err := ReadUsers(path)
	if err != nil {
		t.Fatal(err)
	}
	bob, _ := set.Find("bob")
	if len(set.Entries()) != 3 || len(bob.Groups) != 2 || len(bob.Addresses) != 2 || !bob.Disabled || bob.Secret == "" {
		t.Errorf("%+v", set.Entries())
	}
	if err := EditUsers(path, func(*UserSet) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if again, _ := os.ReadFile(path); string(again) != good {
		t.Errorf("written as\n%s\nwas\n%s", again, good)
	}
	for line, want := range map[string]string{
		"alice":                      ":1: no colon",
		":" + hash:                   "the name \"\" is empty",
		"a b:" + hash:                "a space",
		"alice:plain":                "no bcrypt hash",
		"alice:$2a$31$" + hash[7:]:   "a cost of 31",
		"alice:" + hash + ":group=x": "option \"group\" is not known",
		"alice:" + hash + ":address=10.0.0.1,10.0.0.2":     "a second address of its family",
		"alice:" + hash + ":address=127.0.0.1":             "no address that a user can have",
		"alice:" + hash + ":totp=short":                    "not base32",
		"alice:" + hash + ":disabled=no":                   "disabled has no value",
		"alice:" + hash + "\nalice:" + hash:                ":2: user alice is there already",
		"alice:*:address=10.0.0.1\nbob:*:address=10.0.0.1": "is that of alice",
		strings.Repeat("a", 200) + ":*":                    "too long",
	} {
		_, err := parseUsers("users", line)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), hash[10:]) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
}

// TestUserFileChanges: the file is read again when it changes, and stays as it was when it has a mistake.
func TestUserFileChanges(t *testing.T) {
	path := testUsers(t)
	log, said := testLogger(t)
	f, err := OpenUserFile(path, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if _, err := f.Password(ctx, "alice", "secret"); err != nil {
		t.Fatal(err)
	}
	err = EditUsers(path, func(set *UserSet) error {
		e, _ := set.Find("alice")
		e.Hash = cheap(t, "another")
		return errors.Join(set.Replace(e), set.Add(UserEntry{Name: "bob", Hash: "*", Addresses: []netip.Addr{netip.MustParseAddr("10.9.0.5")}}))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Password(ctx, "alice", "secret"); !errors.Is(err, ErrDenied) {
		t.Errorf("the old password: %v", err)
	}
	if _, err := f.Password(ctx, "alice", "another"); err != nil {
		t.Errorf("the new one: %v", err)
	}
	if a := netip.MustParseAddr("10.9.0.5"); !f.Reserved(a, "alice") || f.Reserved(a, "bob") {
		t.Error("bob's address is not his")
	}
	writeFile(t, path, "alice:nonsense\n")
	if err := os.Chtimes(path, time.Time{}, time.Now().Add(-2*settleTime)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Password(ctx, "alice", "another"); err != nil {
		t.Errorf("with a mistake in the file: %v", err)
	}
	if !said.has("users are as before") || !said.has("no bcrypt hash") {
		t.Error("nothing was said about the mistake")
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// TestEditUsersTogether: changes at the same time are all there.
func TestEditUsersTogether(t *testing.T) {
	path := testUsers(t)
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			err := EditUsers(path, func(set *UserSet) error { return set.Add(UserEntry{Name: fmt.Sprint("u", i), Hash: "*"}) })
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	set, err := ReadUsers(path)
	if err != nil || len(set.Entries()) != 21 {
		t.Errorf("%d users, %v", len(set.Entries()), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".users*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestUnknownUserTakesAsLong: an unknown user, a disabled one and one without a password cost a check like any other.
func TestUnknownUserTakesAsLong(t *testing.T) {
	const cost = 8 // some 16 ms: much more than the rest
	h, err := bcrypt.GenerateFromPassword([]byte("secret"), cost)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "users")
	writeFile(t, path, "alice:"+string(h)+"\nbob:"+string(h)+":disabled\ncarol:*\n")
	f, err := OpenUserFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	// The least of several tries, on a machine that has other work too.
	least := map[[2]string]time.Duration{}
	try := func(name, password string) time.Duration {
		began := time.Now()
		if _, err := f.Password(t.Context(), name, password); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
		key := [2]string{name, password}
		d := time.Since(began)
		if before, ok := least[key]; ok {
			d = min(d, before)
		}
		least[key] = d
		return d
	}
	var bad []string
	for range 40 {
		bad = nil
		wrong := try("alice", "wrong")
		for name, password := range map[string]string{"nobody": "x", "bob": "secret", "carol": "*", "": "", strings.Repeat("x", 100): "x"} {
			if d := try(name, password); d < wrong/2 || d > 2*wrong {
				bad = append(bad, fmt.Sprintf("%q is refused after %v, a wrong password after %v", name, d, wrong))
			}
		}
		if d := try("alice", "secret"+strings.Repeat("x", 100)); d < wrong/2 {
			bad = append(bad, fmt.Sprintf("a long password is refused after %v, a wrong one after %v", d, wrong))
		}
		if len(bad) == 0 {
			return
		}
	}
	t.Errorf("%q", bad)
}

// TestPasswordGate: a flood of passwords is refused rather than kept, and takes no more than its share.
func TestPasswordGate(t *testing.T) {
	g := newPasswordGate()
	hash := cheap(t, "x")
	for range cap(g.running) {
		g.running <- struct{}{} // all processors are busy
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	results := make(chan error, maxWaiting+10)
	for range maxWaiting + 10 {
		all.Go(func() { results <- g.check(ctx, hash, "x") })
	}
	for range 10 {
		if err := <-results; !errors.Is(err, ErrBusy) {
			t.Errorf("one too many: %v", err)
		}
	}
	cancel()
	all.Wait()
	for range maxWaiting {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("one that waits: %v", err)
		}
	}
	<-g.running
	if err := g.check(t.Context(), hash, "x"); err != nil {
		t.Error(err)
	}
}

func FuzzUsers(f *testing.F) {
	f.Add("alice:$2a$04$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234:groups=a,b address=10.0.0.1\n#x\n\nbob:*\n")
	f.Add("a:*:totp=JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP disabled\r\n")
	f.Fuzz(func(t *testing.T, text string) {
		set, err := parseUsers("users", text)
		if err != nil {
			return
		}
		var b strings.Builder
		for _, e := range set.Entries() {
			b.WriteString(e.String() + "\n")
		}
		again, err := parseUsers("users", b.String())
		if err != nil {
			t.Fatalf("accepted, but not when written down again: %v\n%s", err, b.String())
		}
		if fmt.Sprint(set.Entries()) != fmt.Sprint(again.Entries()) {
			t.Fatalf("%v became %v", set.Entries(), again.Entries())
		}
	})
}
