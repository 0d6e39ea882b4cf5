package main

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// A program after -- has the VPN for its only network, as an ordinary user.
func TestConnectProgram(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(nil)
	w.web()
	inside := func(program ...string) []string { return signedIn(s, append([]string{"--"}, program...)...) }
	for _, url := range []string{"http://10.97.0.1/", "http://[fd97::1]/"} {
		if got := w.run(asNobody, "lovelace\n", inside("curl", "-gsS", "--max-time", "10", url)...); got.code != 0 || !strings.HasPrefix(got.stdout, thePage) || got.stderr != "" {
			t.Errorf("curl %s: %+v", url, got)
		}
	}
	// Its resolver is the VPN's, the host is out of reach, the rest of the input is its own.
	got := w.run(asNobody, "lovelace\nthe rest\n", inside("sh", "-c", "cat /etc/resolv.conf; id -u; cat; ping -n -c 1 -W 1 "+connectServer)...)
	if want := "nameserver 10.97.0.1\n"; !strings.Contains(got.stdout, want) || !strings.Contains(got.stdout, "\n65534\nthe rest\n") || got.code == 0 {
		t.Errorf("%+v; want %q", got, want)
	}
	for program, code := range map[string]int{"exit 7": 7, "kill -9 $$": 128 + 9} {
		if got := w.run(asNobody, "lovelace\n", inside("sh", "-c", program)...); got.code != code {
			t.Errorf("%s: %+v", program, got)
		}
	}
	if got := w.run(asNobody, "byron\n", inside("true")...); got.code != 125 || !strings.Contains(got.stderr, "Login failed") {
		t.Errorf("wrong password: %+v", got)
	}
	if got := w.run(asNobody, "lovelace\n", inside("/nowhere/program")...); got.code != 127 {
		t.Errorf("no program: %+v", got)
	}
	// A signal is the program's, and the session ends with it.
	p := w.start(asNobody, "lovelace\n", signedIn(s, "--log-level", "info", "--", "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.1; done")...)
	p.await("msg=up ")
	for end := time.Now().Add(10 * time.Second); !strings.Contains(p.stdout.String(), "up") && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	if code := p.end(syscall.SIGTERM); code != 5 {
		t.Errorf("SIGTERM: exit code %d", code)
	}
	s.Await(10*time.Second, `user disconnected \(reason: user disconnected`)
}

// Cookies that others have made are not ended by a program that cannot start.
func TestConnectProgramCookie(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(func(o *stock.ServerOptions) { o.NoTLS13 = true })
	w.web()
	cookie := strings.TrimSpace(w.run(asNobody, "lovelace\n", signedIn(s, "--cookieonly")...).stdout)
	args := func(program string) []string {
		return []string{"penstock", "connect", s.URL, "-C", cookie, "--servercert", s.Pin, "--", program, "-sS", "http://10.97.0.1/"}
	}
	if got := w.run(asNobody, "", args("/nowhere/program")...); got.code != 127 {
		t.Errorf("%+v", got)
	}
	if got := w.run(asNobody, "", args("curl")...); got.code != 0 || !strings.HasPrefix(got.stdout, thePage) {
		t.Errorf("%+v", got)
	}
}
