package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/netstack/vpntest/hosts"
	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// A lab is three network namespaces in a row, for tests of penstock serve with stock clients:
//
//	client 10.99.0.1 ──── 10.99.0.2 server 10.98.0.1 ──── 10.98.0.2 lan
//	       fd99::1         fd99::2          fd98::1         fd98::2
//
// Only the server is between the others, and it does not forward: what the client reaches of
// the lan it reaches through the VPN. In the lan a web server at port 80 says hello.
type lab struct {
	*hosts.Hosts
	t    *testing.T
	dir  string // for the server, which runs as nobody
	bin  string // the program, where nobody can read it
	root bool   // the server is to run as root
}

// The namespaces.
const (
	labClient = iota
	labServer
	labLAN
)

const (
	labURL = "https://10.99.0.2:4443"
	// nobody is a user without any privileges.
	nobody = 65534
)

// newLab makes one; it skips where that cannot be done. The calling goroutine keeps its thread.
func newLab(t *testing.T) *lab {
	t.Helper()
	l := &lab{Hosts: hosts.New(t, 3), t: t}
	l.join(labClient, labServer, "99")
	l.join(labServer, labLAN, "98")
	l.On(labServer, func() { // ping without privileges, for both families
		l.Sysctl("net/ipv4/ping_group_range", "0 2147483647")
	})
	var err error
	l.dir, err = os.MkdirTemp("", "penstock-lab")
	l.Check(err)
	t.Cleanup(func() { os.RemoveAll(l.dir) })
	l.Check(os.Chmod(l.dir, 0o755))
	self, err := os.ReadFile("/proc/self/exe")
	l.Check(err)
	l.bin = filepath.Join(l.dir, "penstock")
	l.Check(os.WriteFile(l.bin, self, 0o755))
	l.Check(os.Mkdir(filepath.Join(l.dir, "run"), 0o700))
	for _, path := range []string{l.dir, filepath.Join(l.dir, "run")} {
		l.Check(os.Chown(path, nobody, nobody))
	}
	l.serveHello()
	return l
}

// join makes a link between two hosts, the first with .1 and the second with .2 of 10.NET.0.0/24
// and fdNET::/64.
func (l *lab) join(a, b int, net string) {
	port := func(host, last int) hosts.Port {
		return hosts.Port{Host: host, Name: "veth" + net, Addrs: []string{fmt.Sprintf("10.%s.0.%d/24", net, last), fmt.Sprintf("fd%s::%d/64", net, last)}}
	}
	l.Join(port(a, 1), port(b, 2))
}

// hello is what the lan's web server says, over and over up to the length that is asked for.
const hello = "hello from the lan\n"

func (l *lab) serveHello() {
	var listener net.Listener
	l.On(labLAN, func() {
		var err error
		listener, err = net.Listen("tcp", ":80")
		l.Check(err)
	})
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := 1
		fmt.Sscan(r.URL.Query().Get("times"), &n)
		for range n {
			if _, err := io.WriteString(w, hello); err != nil {
				return
			}
		}
	})}
	served := make(chan struct{})
	go func() { defer close(served); s.Serve(listener) }()
	l.t.Cleanup(func() { s.Close(); <-served })
}

// A labProgram is penstock under way.
type labProgram struct {
	l    *lab
	cmd  *exec.Cmd
	done chan struct{}

	text // what it has printed
}

// write makes a file for the server.
func (l *lab) write(name, text string) string {
	path := filepath.Join(l.dir, name)
	l.Check(os.WriteFile(path, []byte(text), 0o600))
	l.Check(os.Chown(path, nobody, nobody))
	return path
}

// command is penstock as nobody.
func (l *lab) command(args ...string) *exec.Cmd {
	cmd := exec.Command(l.bin, args...)
	cmd.Dir = l.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + l.dir, "XDG_RUNTIME_DIR=" + filepath.Join(l.dir, "run"), "TMPDIR=" + l.dir}
	if !l.root {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	return cmd
}

// run runs penstock to its end and returns what it prints.
func (l *lab) run(stdin string, args ...string) (string, error) {
	cmd := l.command(args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must is run for what must not fail.
func (l *lab) must(stdin string, args ...string) string {
	l.t.Helper()
	out, err := l.run(stdin, args...)
	if err != nil {
		l.t.Fatalf("penstock %v: %v\n%s", args, err, out)
	}
	return out
}

// start starts penstock in the server's namespace, without privileges, and waits until it says that it is up.
func (l *lab) start(args ...string) *labProgram {
	l.t.Helper()
	p := &labProgram{l: l, cmd: l.command(args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	l.On(labServer, func() { l.Check(p.cmd.Start()) })
	go func() { defer close(p.done); p.cmd.Wait() }()
	l.t.Cleanup(func() {
		p.stop(syscall.SIGTERM)
		if l.t.Failed() {
			l.t.Logf("penstock %v:\n%s", args, p.String())
		}
	})
	p.await("msg=serving")
	return p
}

// await waits until penstock has printed text.
func (p *labProgram) await(text string) {
	p.l.t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(p.String(), text); time.Sleep(10 * time.Millisecond) {
		select {
		case <-p.done:
			p.l.t.Fatalf("penstock has ended:\n%s", p.String())
		default:
		}
		if time.Now().After(end) {
			p.l.t.Fatalf("penstock never says %q:\n%s", text, p.String())
		}
	}
}

func (p *labProgram) stop(s syscall.Signal) {
	p.cmd.Process.Signal(s)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		p.cmd.Process.Kill()
		<-p.done
		p.l.t.Errorf("penstock does not end by %v", s)
	}
}

// pin is the server's key as it is printed.
func (p *labProgram) pin() string {
	p.await("pin-sha256:")
	_, rest, _ := strings.Cut(p.String(), "pin-sha256:")
	return "pin-sha256:" + strings.Fields(rest)[0]
}

// sessions asks the server.
func (p *labProgram) sessions() (list []gateway.SessionStatus) {
	p.l.t.Helper()
	out := p.l.must("", "sessions", "--json")
	p.l.Check(json.Unmarshal([]byte(out), &list))
	return list
}

// session waits for the one session of a user that is as ok wants it.
func (p *labProgram) session(user string, ok func(s *gateway.SessionStatus) bool) gateway.SessionStatus {
	p.l.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		var mine []gateway.SessionStatus
		for _, s := range p.sessions() {
			if s.User == user {
				mine = append(mine, s)
			}
		}
		if len(mine) == 1 && ok(&mine[0]) {
			return mine[0]
		}
		if time.Now().After(end) {
			p.l.t.Fatalf("sessions of %s: %+v", user, mine)
		}
	}
}

// nobodyIn waits until a user has no session.
func (p *labProgram) nobodyIn(user string) {
	p.l.t.Helper()
next:
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		for _, s := range p.sessions() {
			if s.User == user {
				if time.Now().After(end) {
					p.l.t.Fatalf("%s is still in: %+v", user, s)
				}
				continue next
			}
		}
		return
	}
}

func (p *labProgram) status() (r control.Report) {
	p.l.t.Helper()
	p.l.Check(json.Unmarshal([]byte(p.l.must("", "status", "--json")), &r))
	return r
}

// connect starts openconnect in the client's namespace.
func (l *lab) connect(o stock.ClientOptions) (c *stock.Client) {
	l.t.Helper()
	if o.URL == "" {
		o.URL = labURL
	}
	l.On(labClient, func() { c = stock.StartClient(l.t, o) })
	return c
}

// connectFromLAN makes a second client, of the lan. Its web server is then at its address inside too.
func (l *lab) connectFromLAN(o stock.ClientOptions) (c *stock.Client) {
	l.t.Helper()
	o.URL = "https://10.98.0.1:4443"
	l.On(labLAN, func() { c = stock.StartClient(l.t, o) })
	return c
}

// client runs a program in the client's namespace.
func (l *lab) client(name string, args ...string) (string, error) {
	var out []byte
	var err error
	l.On(labClient, func() { out, err = exec.Command(name, args...).CombinedOutput() })
	return string(out), err
}

// pings wants answers from hosts.
func (l *lab) pings(hosts ...string) {
	l.t.Helper()
	for _, host := range hosts {
		if out, err := l.client("ping", "-c", "2", "-i", "0.2", "-W", "5", host); err != nil {
			l.t.Errorf("ping %s: %v\n%s", host, err, out)
		}
	}
}

// downloads fetches hello from the lan, times times in one file.
func (l *lab) downloads(host string, times int) {
	l.t.Helper()
	out, err := l.client("curl", "-sS", "--max-time", "30", fmt.Sprintf("http://%s/?times=%d", host, times))
	if err != nil || out != strings.Repeat(hello, times) {
		l.t.Errorf("curl %s: %d bytes, %v: %.200s", host, len(out), err, out)
	}
}
