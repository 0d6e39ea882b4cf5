package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// stores are the ways to keep state; each opens the same store again and again.
func stores(t *testing.T) map[string]func(t *testing.T) Store {
	must := func(t *testing.T, s Store, err error) Store {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	mini := miniredis.RunT(t)
	clock := time.Now() // its keys expire by a clock of its own
	all := map[string]func(t *testing.T) Store{
		"memory": func(*testing.T) Store { return NewMemoryStore() },
		"bolt": func(t *testing.T) Store {
			s, err := OpenBoltStore(filepath.Join(t.TempDir(), "store"))
			return must(t, s, err)
		},
		"miniredis": func(t *testing.T) Store {
			s, err := OpenRedisStore(RedisOptions{URL: "redis://" + mini.Addr(), Name: t.Name()})
			s = must(t, s, err)
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				for {
					select {
					case <-stop:
						return
					case <-time.After(10 * time.Millisecond):
						now := time.Now()
						mini.FastForward(now.Sub(clock))
						clock = now
					}
				}
			}()
			t.Cleanup(func() { close(stop); <-stopped })
			return s
		},
	}
	if socket := redisServer(t); socket != "" {
		all["redis"] = func(t *testing.T) Store {
			s, err := OpenRedisStore(RedisOptions{URL: "unix://" + socket, Name: t.Name()})
			return must(t, s, err)
		}
	}
	return all
}

// redisServer starts Debian's redis-server on a socket, where it is installed.
func redisServer(t *testing.T) (socket string) {
	program, err := exec.LookPath("redis-server")
	if err != nil {
		if os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
			t.Fatal("redis-server is not installed, and PENSTOCK_REQUIRE_TOOLS=1")
		}
		t.Log("redis-server is not installed: miniredis stands in for it")
		return ""
	}
	socket = filepath.Join(t.TempDir(), "redis.sock")
	cmd := exec.Command(program, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", filepath.Dir(socket))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return socket
		} else if time.Now().After(end) {
			t.Fatal("redis-server does not start: ", err)
		}
	}
}

// TestStores: every store keeps the promises of the interface.
func TestStores(t *testing.T) {
	for name, open := range stores(t) {
		t.Run(name, func(t *testing.T) {
			t.Run("values", func(t *testing.T) { testStoreValues(t, open(t)) })
			t.Run("together", func(t *testing.T) { testStoreTogether(t, open(t)) })
			t.Run("expiry", func(t *testing.T) { testStoreExpiry(t, open(t)) })
			t.Run("race", func(t *testing.T) { testStoreRace(t, open(t)) })
		})
	}
}

func testStoreValues(t *testing.T, s Store) {
	ctx := t.Context()
	if v, err := s.Get(ctx, "a/1"); v != nil || err != nil {
		t.Errorf("an empty store has %q, %v", v, err)
	}
	for _, value := range [][]byte{[]byte("one"), {}, {0, '=', 0xff, '\n'}, bytes.Repeat([]byte("x"), 5000)} {
		old, _ := s.Get(ctx, "a/1")
		if err := s.Update(ctx, Change{Key: "a/1", Old: old, New: value}); err != nil {
			t.Fatalf("%q: %v", value, err)
		}
		if v, err := s.Get(ctx, "a/1"); v == nil || !bytes.Equal(v, value) || err != nil {
			t.Errorf("got %q, %v, want %q", v, err, value)
		}
	}
	// The keys of two prefixes, one with what means something in a Redis pattern.
	for _, k := range []string{"a/2", "ab/3", "[a]*/4", "a]/5"} {
		if err := s.Update(ctx, Change{Key: k, New: []byte(k)}); err != nil {
			t.Fatal(err)
		}
	}
	for prefix, want := range map[string]int{"a/": 2, "[a]*/": 1, "": 5, "b": 0} {
		found, err := s.List(ctx, prefix)
		if err != nil || len(found) != want {
			t.Errorf("under %q there are %d, %v, want %d", prefix, len(found), err, want)
		}
		for k, v := range found {
			if k != "a/1" && string(v) != k {
				t.Errorf("%s is %q", k, v)
			}
		}
	}
}

func testStoreTogether(t *testing.T, s Store) {
	ctx := t.Context()
	if err := s.Update(ctx, Change{Key: "a", New: []byte("1")}, Change{Key: "b", New: []byte("2")}); err != nil {
		t.Fatal(err)
	}
	for _, changes := range [][]Change{
		{{Key: "a", New: []byte("9")}},
		{{Key: "a", Old: []byte("8"), New: []byte("9")}},
		{{Key: "c", Old: []byte{}, New: []byte("9")}},
		{{Key: "a", Old: []byte("1"), New: []byte("9")}, {Key: "b", Old: []byte("1")}},
		{{Key: "b", Old: []byte("2")}, {Key: "a"}},
	} {
		if err := s.Update(ctx, changes...); !errors.Is(err, ErrConflict) {
			t.Errorf("%+v: %v, want a conflict", changes, err)
		}
	}
	if err := s.Update(ctx, Change{Key: "a", Old: []byte("1")}, Change{Key: "b", Old: []byte("2"), New: []byte("3")}); err != nil {
		t.Fatal(err)
	}
	if found, _ := s.List(ctx, ""); len(found) != 1 || string(found["b"]) != "3" {
		t.Errorf("what is left: %q", found)
	}
}

func testStoreExpiry(t *testing.T, s Store) {
	ctx := t.Context()
	if err := s.Update(ctx, Change{Key: "short", New: []byte("1"), TTL: 300 * time.Millisecond}, Change{Key: "long", New: []byte("2"), TTL: time.Hour}, Change{Key: "ever", New: []byte("3")}); err != nil {
		t.Fatal(err)
	}
	if v, _ := s.Get(ctx, "short"); string(v) != "1" {
		t.Errorf("at once it is %q", v)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		found, err := s.List(ctx, "")
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 2 && found["short"] == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it never expires: %q", found)
		}
	}
	if err := s.Update(ctx, Change{Key: "short", New: []byte("4")}); err != nil {
		t.Errorf("what has expired is in the way: %v", err)
	}
}

// testStoreRace: of many that want the same key one gets it, and increments are not lost.
func testStoreRace(t *testing.T, s Store) {
	ctx := t.Context()
	const clients, rounds = 8, 10
	var all sync.WaitGroup
	var mu sync.Mutex
	winners := 0
	for i := range clients {
		all.Go(func() {
			if s.Update(ctx, Change{Key: "one", New: fmt.Append(nil, i)}) == nil {
				mu.Lock()
				winners++
				mu.Unlock()
			}
			for range rounds {
				for {
					old, err := s.Get(ctx, "n")
					if err != nil {
						t.Error(err)
						return
					}
					var n int
					fmt.Sscan(string(old), &n)
					err = s.Update(ctx, Change{Key: "n", Old: old, New: fmt.Append(nil, n+1)})
					if err == nil {
						break
					}
					if !errors.Is(err, ErrConflict) {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	all.Wait()
	if v, _ := s.Get(ctx, "n"); winners != 1 || string(v) != fmt.Sprint(clients*rounds) {
		t.Errorf("%d have got the key; %s increments of %d", winners, v, clients*rounds)
	}
}

// TestBoltStoreSurvives: what is in the file is there after it was closed; meanwhile nobody else gets in.
func TestBoltStoreSurvives(t *testing.T) {
	file := filepath.Join(t.TempDir(), "store")
	s, err := OpenBoltStore(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Update(t.Context(), Change{Key: "k", New: []byte("v"), TTL: time.Hour}, Change{Key: "gone", New: []byte("v"), TTL: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenBoltStore(file); err == nil {
		t.Error("two have it open")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	time.Sleep(5 * time.Millisecond)
	if s, err = OpenBoltStore(file); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if found, err := s.List(t.Context(), ""); err != nil || len(found) != 1 || string(found["k"]) != "v" {
		t.Errorf("after opening it again: %q, %v", found, err)
	}
}
