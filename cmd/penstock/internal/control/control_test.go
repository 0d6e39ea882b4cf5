package control

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/penstock-vpn/penstock/netstack"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// folder is an empty default folder: its path is short, as a socket's must be.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pst")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("XDG_RUNTIME_DIR", dir)
	return Folder()
}

func TestServeAndFetch(t *testing.T) {
	dir := folder(t)
	path := Path("/etc/penstock/home.toml")
	if path != filepath.Join(dir, "home.sock") {
		t.Fatalf("default path %s, want it in %s", path, dir)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	want := Report{Version: "v1", PID: 17, Config: "/x", Node: netstack.Status{MTU: 1400, Drops: map[string]uint64{"why": 3}}}
	stop := Serve(l, func() Report { return want }, nil)
	if runtime.GOOS != "windows" {
		for name, mode := range map[string]fs.FileMode{dir: 0o700, path: 0o600} {
			if st, err := os.Stat(name); err != nil || st.Mode().Perm() != mode {
				t.Errorf("%s has mode %v, want %v (%v)", name, st.Mode().Perm(), mode, err)
			}
		}
	}
	body, err := Fetch(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	var got Report
	if err := json.Unmarshal(body, &got); err != nil {
		t.Fatal(err)
	}
	if got.Version != want.Version || got.PID != want.PID || got.Node.MTU != 1400 || got.Node.Drops["why"] != 3 {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := Listen(path); !errors.Is(err, ErrRunning) {
		t.Errorf("a second node: %v, want ErrRunning", err)
	}
	if _, err := Fetch(t.Context(), path); err != nil {
		t.Errorf("after the second node had tried: %v", err)
	}
	stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if _, err := Fetch(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after stop: %v, want ErrNotRunning", err)
	}
}

// abandon leaves a socket behind as a process that was killed does.
func abandon(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
}

func TestStaleIsReplaced(t *testing.T) {
	folder(t)
	path := Path("node.toml")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	abandon(t, path)
	if _, err := Fetch(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("a stale socket: %v, want ErrNotRunning", err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestOneOfManyStarts: of nodes that start at once over a stale socket exactly one
// gets it.
func TestOneOfManyStarts(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no lock there")
	}
	folder(t)
	path := Path("node.toml")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		abandon(t, path)
		var started atomic.Int32
		var starting sync.WaitGroup
		listeners := make(chan net.Listener, 8)
		for range 8 {
			starting.Go(func() {
				l, err := Listen(path)
				switch {
				case err == nil:
					started.Add(1)
					listeners <- l
				case !errors.Is(err, ErrRunning):
					t.Error(err)
				}
			})
		}
		starting.Wait()
		close(listeners)
		for l := range listeners {
			l.Close()
		}
		if n := started.Load(); n != 1 {
			t.Fatalf("%d of 8 nodes started", n)
		}
	}
}

func TestListenRefuses(t *testing.T) {
	dir := folder(t)
	file := filepath.Join(filepath.Dir(dir), "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file: "is not a socket",
		filepath.Join(filepath.Dir(dir), "none", "x.sock"): "no such file",
		"/" + strings.Repeat("x", MaxPath):                 "set [node] control",
	} {
		if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file now holds %q, %v", b, err)
	}
	if runtime.GOOS == "windows" {
		return
	}
	// A folder that somebody else may have made, or made open.
	for name, prepare := range map[string]func() error{
		"open to others": func() error { return os.Mkdir(dir, 0o777) },
		"a link":         func() error { return os.Symlink(t.TempDir(), dir) },
		"a file":         func() error { return os.WriteFile(dir, nil, 0o600) },
	} {
		if err := prepare(); err != nil {
			t.Fatal(err)
		}
		if name == "open to others" {
			if err := os.Chmod(dir, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		if l, err := Listen(filepath.Join(dir, "x.sock")); err == nil || !strings.Contains(err.Error(), "mode 0700") {
			t.Errorf("%s: got %v, want a refusal", name, err)
			if err == nil {
				l.Close()
			}
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestHungClient: who connects and says nothing does not keep the node from
// stopping.
func TestHungClient(t *testing.T) {
	folder(t)
	path := Path("node.toml")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	stop := Serve(l, func() Report { return Report{} }, nil)
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET /sta")); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("stop took %v", took)
	}
}

// TestService: a node that a service manager starts has its socket in the folder made for it, and is
// found there by who has not that folder.
func TestService(t *testing.T) {
	own := folder(t)
	system, err := os.MkdirTemp("", "pst")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(system) })
	was := systemFolder
	systemFolder = system
	t.Cleanup(func() { systemFolder = was })
	if got := Find("/etc/penstock/home.toml"); got != filepath.Join(own, "home.sock") {
		t.Errorf("no node at all is asked at %s", got)
	}
	if got := Sockets(); len(got) != 0 {
		t.Errorf("sockets %v of no node", got)
	}
	home := filepath.Join(system, "home")
	if err := os.Mkdir(home, 0o755); err != nil { // what RuntimeDirectoryMode= has by default
		t.Fatal(err)
	}
	t.Setenv("RUNTIME_DIRECTORY", home+":/run/another")
	path := Path("/run/credentials/penstock@home.service/home.toml")
	if want := filepath.Join(home, "home.sock"); path != want {
		t.Fatalf("path %s, want %s", path, want)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer Serve(l, func() Report { return Report{PID: 5} }, nil)()
	t.Setenv("RUNTIME_DIRECTORY", "")
	if got := Find("/etc/penstock/home.toml"); got != path {
		t.Errorf("asked at %s, want %s", got, path)
	}
	if got := Sockets(); len(got) != 1 || got[0] != path {
		t.Errorf("sockets %v, want %s", got, path)
	}
	if _, err := Fetch(t.Context(), path); err != nil {
		t.Error(err)
	}
}

// TestShare: the socket opens for a group.
func TestShare(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no groups of files here")
	}
	folder(t)
	l, err := Listen(Path("a.toml"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	path := l.Addr().String()
	if err := Share(path, strconv.Itoa(os.Getgid())); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, want 0660 (%v)", st.Mode().Perm(), err)
	}
	if err := Share(path, "no-such-group"); err == nil {
		t.Error("shared with a group that does not exist")
	}
}

// TestDown: a node can be asked to end, and the answer comes before the end.
func TestDown(t *testing.T) {
	folder(t)
	path := Path("node.toml")
	if err := Down(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("nobody there: %v", err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan struct{}, 1)
	stopped := make(chan struct{})
	stop := Serve(l, func() Report { return Report{} }, nil, OnDown(func() { asked <- struct{}{} }))
	go func() {
		defer close(stopped)
		<-asked
		stop()
	}()
	if err := Down(t.Context(), path); err != nil {
		t.Error(err)
	}
	<-stopped
	if err := Down(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("after the end: %v", err)
	}
}
