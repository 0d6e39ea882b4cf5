package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const serveConfig = `
[server]
listen = ["10.9.1.2:4443"]
name = "10.9.1.2"
address = ["10.98.0.1/24", "fd98::1/64"]
control = "server.sock"

[auth]
users = "users"

[clients]
pool = ["10.98.0.0/24", "fd98::/64"]
routes = ["10.44.0.0/24", "fd44::/64"]
rekey = "10s"
dpd = "5s"

[[group]]
name = "staff"

[[group]]
name = "ops"
label = "Operators"
routes = ["10.44.0.0/24"]

[router]
allow = ["10.44.0.1/32", "fd44::1/128"]
`

// A connectServed is penstock serve in the server's place, with a web server behind it at 10.44.0.1 and fd44::1.
type connectServed struct {
	*connectNet
	*started
	url, pin, secret string // of grace's codes, a file
}

func (w *connectNet) serve(config string) *connectServed {
	w.t.Helper()
	for _, a := range []string{"10.44.0.1/32", "fd44::1/128"} {
		w.root(w.server, "ip", "addr", "add", a, "dev", "lo")
	}
	dir := filepath.Join(w.dir, "server")
	w.check(os.Mkdir(dir, 0o700))
	w.check(os.WriteFile(filepath.Join(dir, "server.toml"), []byte(config), 0o644))
	w.check(os.Chown(dir, int(asNobody), int(asNobody)))
	file := filepath.Join(dir, "server.toml")
	s := &connectServed{connectNet: w, url: "https://10.9.1.2:4443", secret: filepath.Join(w.dir, "secret")}
	user := func(args ...string) string {
		p := w.startIn(w.server, asNobody, "lovelace\n", append([]string{"penstock", "user", "-c", file, "add", "--passwd-on-stdin"}, args...)...)
		if p.wait(20*time.Second) != 0 {
			w.t.Fatalf("penstock user add %v: %s", args, &p.stderr)
		}
		return p.stdout.String()
	}
	user("ada", "--groups", "staff,ops")
	_, secret, ok := strings.Cut(user("grace", "--totp", "--groups", "staff"), "Secret: ")
	if !ok {
		w.t.Fatal("no secret")
	}
	w.check(os.WriteFile(s.secret, []byte(secret), 0o644))
	s.launch(file)
	s.pin = regexp.MustCompile(`pin-sha256:[A-Za-z0-9+/]{43}=`).FindString(s.stderr.String())
	return s
}

// launch starts the server, perhaps again.
func (s *connectServed) launch(file string) {
	s.started = s.startIn(s.server, asNobody, "", "penstock", "serve", "-c", file)
	s.await("msg=serving")
	s.await("pin-sha256:")
}

// args are those of penstock connect.
func (s *connectServed) args(user string, more ...string) []string {
	return append([]string{"penstock", "connect", s.url, "-u", user, "--passwd-on-stdin", "--servercert", s.pin}, more...)
}

// Our client with our server, both as ordinary users: password, code, groups, both families, and what ends a session.
func TestConnectServe(t *testing.T) {
	w := newConnectNet(t)
	s := w.serve(serveConfig)
	w.web()
	for _, tt := range []struct {
		name string
		args []string
		code int
		want string
	}{
		{"wrong user", s.args("byron", "--authgroup", "staff", "--cookieonly"), exitFailure, "denied"},
		{"no code", s.args("grace", "--authgroup", "staff", "--cookieonly"), exitUsage, "--token-secret"},
		{"no group", s.args("ada", "--cookieonly"), exitUsage, "--authgroup"},
		{"code", s.args("grace", "--authgroup", "staff", "--cookieonly", "--token-secret", s.secret), exitOK, ""},
	} {
		if got := w.run(asNobody, "lovelace\n", tt.args...); got.code != tt.code || !strings.Contains(got.stderr, tt.want) {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
	for _, path := range []string{"dtls", "cstp"} {
		args := s.args("ada", "--authgroup", "staff")
		if path == "cstp" {
			args = append(args, "--no-dtls")
		}
		p := w.start(asNobody, "lovelace\n", args...)
		p.await("path=" + path)
		p.await("msg=up ")
		for _, url := range []string{"http://10.44.0.1/", "http://[fd44::1]/"} {
			if _, err := w.fetch("-x", "socks5h://127.0.0.1:1080", url); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		if code := p.end(syscall.SIGTERM); code != exitOK {
			t.Errorf("%s: exit code %d", path, code)
		}
	}
	// Another group has other networks behind it.
	p := w.start(asNobody, "lovelace\n", s.args("ada", "--authgroup", "Operators")...)
	p.await("msg=up ")
	if o := w.report(asNobody).Node.OpenConnect; strings.Contains(fmt.Sprint(o.AllowedIPs), "fd44::") {
		t.Errorf("behind the server: %v", o.AllowedIPs)
	}
	// A server that was killed knows no cookies: the password is still known here.
	s.end(syscall.SIGKILL)
	s.launch(filepath.Join(w.dir, "server", "server.toml"))
	p.await("signing in again")
	for end := time.Now().Add(20 * time.Second); w.report(asNobody).Node.OpenConnect.State != "up"; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never up again: %+v", w.report(asNobody).Node.OpenConnect)
		}
	}
	if _, err := w.fetch("-x", "socks5h://127.0.0.1:1080", "http://10.44.0.1/"); err != nil {
		t.Errorf("after the server has started again: %v", err)
	}
	// The server sends the user away: that is the end.
	kick := w.startIn(w.server, asNobody, "", "penstock", "kick", "--socket", filepath.Join(w.dir, "server", "server.sock"), "ada")
	if kick.wait(20*time.Second) != 0 {
		t.Fatalf("kick: %s", &kick.stderr)
	}
	if code := p.wait(20 * time.Second); code != exitFailure || !strings.Contains(p.stderr.String(), "has ended") {
		t.Errorf("kicked: exit code %d\n%s", code, &p.stderr)
	}
}

// New keys in the middle of a download: every byte arrives, by DTLS, by TLS and through the kernel's interface.
func TestConnectServeRekey(t *testing.T) {
	w := newConnectNet(t)
	s := w.serve(serveConfig)
	const size = 7 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(data)
	w.inServer(func() {
		l, err := net.Listen("tcp", "[::]:80")
		w.check(err)
		// 14 s, so that a good deal of it is under the new keys.
		h := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Length", strconv.Itoa(size))
			for rest := data; len(rest) > 0; rest = rest[min(len(rest), 32<<10):] {
				if _, err := rw.Write(rest[:min(len(rest), 32<<10)]); err != nil {
					return
				}
				time.Sleep(14 * time.Second / (size / (32 << 10)))
			}
		})}
		go h.Serve(l)
		t.Cleanup(func() { h.Close() })
	})
	want := fmt.Sprintf("%x", sha256.Sum256(data))
	type transfer struct {
		name    string
		as      user
		flags   []string
		curl    []string
		client  *started
		control string
		curling *started
	}
	transfers := []*transfer{
		{name: "dtls", as: asNobody, flags: []string{"--socks5", "127.0.0.1:1081"}, curl: []string{"-x", "socks5h://127.0.0.1:1081"}},
		{name: "cstp", as: asNobody, flags: []string{"--socks5", "127.0.0.1:1082", "--no-dtls"}, curl: []string{"-x", "socks5h://127.0.0.1:1082"}},
		{name: "tun", as: asRoot, flags: []string{"--tun"}},
	}
	for _, x := range transfers {
		x.control = filepath.Join(w.dir, x.name+".sock")
		x.client = w.start(x.as, "lovelace\n", s.args("ada", append(x.flags, "--authgroup", "staff", "--control", x.control)...)...)
		x.client.await("msg=up ")
		x.curling = w.start(asNobody, "", append([]string{"curl", "-gsS", "--max-time", "60", "-o", filepath.Join(w.dir, x.name), "http://10.44.0.1/"}, x.curl...)...)
	}
	for _, x := range transfers {
		if code := x.curling.wait(70 * time.Second); code != 0 {
			t.Errorf("%s: curl ends with %d: %s", x.name, code, &x.curling.stderr)
		}
		f, err := os.Open(filepath.Join(w.dir, x.name))
		w.check(err)
		sum := sha256.New()
		io.Copy(sum, f)
		f.Close()
		if got := fmt.Sprintf("%x", sum.Sum(nil)); got != want {
			t.Errorf("%s: another file arrived", x.name)
		}
		if n := strings.Count(x.client.stderr.String(), `reason="new keys are due"`); n < 1 {
			t.Errorf("%s: new keys %d times\n%s", x.name, n, &x.client.stderr)
		}
		x.client.end(syscall.SIGTERM)
	}
}
