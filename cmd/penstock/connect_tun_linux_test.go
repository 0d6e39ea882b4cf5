package main

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// host is what --tun may change where the client is.
func (w *connectNet) host() string {
	var b strings.Builder
	for _, what := range []string{"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all", "-br link"} {
		for _, line := range strings.Split(w.root(w.client, append([]string{"ip"}, strings.Fields(what)...)...), "\n") {
			if !strings.Contains(line, "fe80:") { // comes when the kernel finds the time
				fmt.Fprintln(&b, strings.TrimSpace(line))
			}
		}
	}
	b.WriteString(w.root(w.client, "cat", "/etc/resolv.conf"))
	b.WriteString(w.root(w.client, "ls", "/etc"))
	return b.String()
}

// throughKernel checks that programs that know of nothing reach what is behind the server.
func (w *connectNet) throughKernel(own ...string) {
	w.t.Helper()
	for i, url := range []string{"http://10.97.0.1/", "http://[fd97::1]/"} {
		if from, err := w.fetch(url); err != nil || from != own[i] {
			w.t.Errorf("from %s, want %s; %v", from, own[i], err)
		}
	}
	for _, to := range []string{"10.97.0.1", "fd97::1"} {
		if got := w.run(asRoot, "", "ping", "-n", "-c", "2", "-i", "0.2", "-W", "5", to); got.code != 0 {
			w.t.Errorf("ping %s: %s%s", to, got.stdout, got.stderr)
		}
	}
}

// --tun: the kernel's own programs use the VPN, and the machine is as before afterwards, whatever ends the program.
func TestConnectTUN(t *testing.T) {
	for _, tt := range []struct {
		name, config, inside, outside string
	}{
		{"some networks", "route = 10.97.0.0/255.255.255.0\nroute = fd97::/64\n", "10.97.0.77", "8.8.8.8"},
		{"everything but one", "no-route = 198.51.100.0/255.255.255.0\n", "8.8.8.8", "198.51.100.1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newConnectNet(t)
			s := w.ocserv(func(o *stock.ServerOptions) {
				o.Config = "max-ban-score = 0\ndns = 10.97.0.1\ndefault-domain = corp.example\n" + tt.config
			})
			w.web()
			before := w.host()
			up := func() (p *started, own []string) {
				p = w.start(asRoot, "lovelace\n", signedIn(s, "--tun")...)
				p.await("msg=up ")
				p.await("path=dtls")
				for _, a := range w.report(asRoot).Node.Addresses {
					own = append(own, a.Addr().String())
				}
				return p, own
			}
			p, own := up()
			w.throughKernel(own...)
			for to, want := range map[string]string{tt.inside: "dev penstock0", tt.outside: "dev eth0", "10.9.1.77": "dev eth0"} {
				if got := w.root(w.client, "ip", "route", "get", to); !strings.Contains(got, want) {
					t.Errorf("to %s: %s, want %s", to, got, want)
				}
			}
			// The tunnel itself goes beside it.
			if got := w.root(w.client, "ip", "route", "get", connectServer, "mark", "5182"); !strings.Contains(got, "dev eth0") {
				t.Errorf("to the server: %s", got)
			}
			if got := w.root(w.client, "cat", "/etc/resolv.conf"); !strings.Contains(got, "\nnameserver 10.97.0.1\nsearch corp.example\n") || strings.Contains(got, "192.0.2.53") {
				t.Errorf("resolv.conf:\n%s", got)
			}
			if code := p.end(syscall.SIGTERM); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if after := w.host(); after != before {
				t.Errorf("after SIGTERM:\n%s\nbefore:\n%s", after, before)
			}
			// Killed: the next start takes back what is left, before it calls the server.
			p, _ = up()
			w.check(w.command(w.client, asRoot, "kill", "-9", fmt.Sprint(w.report(asRoot).PID)).Run())
			p.wait(10 * 1e9)
			if w.host() == before {
				t.Error("nothing is left behind: this test tests nothing")
			}
			p, own = up()
			if !strings.Contains(p.stderr.String(), "took back what a node left that died") {
				t.Errorf("nothing was taken back:\n%s", &p.stderr)
			}
			w.throughKernel(own...)
			if code := p.end(syscall.SIGINT); code != exitOK {
				t.Errorf("exit code %d", code)
			}
			if after := w.host(); after != before {
				t.Errorf("after SIGKILL and another start:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
	t.Run("without privileges", func(t *testing.T) {
		w := newConnectNet(t)
		got := w.run(asNobody, "lovelace\n", "penstock", "connect", connectServer, "-u", "ada", "--passwd-on-stdin", "--tun")
		if got.code != exitFailure || !strings.Contains(got.stderr, "CAP_NET_ADMIN") {
			t.Errorf("%+v", got)
		}
	})
}
