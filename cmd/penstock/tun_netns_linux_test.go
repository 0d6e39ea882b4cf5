package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/penstock-vpn/penstock/netstack"
)

// A place is a network namespace and a mount namespace with /etc and /run of its own.
type place struct {
	t    *testing.T
	do   chan func()
	home string // a folder for configurations
	env  []string
}

// newPlace skips the test where namespaces cannot be made, unless PENSTOCK_REQUIRE_NETNS=1 says that
// this is a failure.
func newPlace(t *testing.T) *place {
	t.Helper()
	p := &place{t: t, do: make(chan func()), home: t.TempDir()}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread dies with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
		made <- err
		if err != nil {
			return
		}
		for f := range p.do {
			f()
		}
	}()
	if err := <-made; err != nil {
		if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
			t.Fatal(err)
		}
		t.Skipf("SKIPPED: no namespaces can be made here: %v", err)
	}
	t.Cleanup(func() { close(p.do) })
	p.in(func() {
		p.check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
		passwd, err := os.ReadFile("/etc/passwd")
		p.check(err)
		for _, dir := range []string{"/etc", "/run"} {
			p.check(unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
		}
		for path, text := range map[string]string{
			"/etc/nsswitch.conf": "hosts: files dns\n",
			"/etc/passwd":        string(passwd),
			"/etc/hosts":         "127.0.0.1 localhost\n",
			"/etc/resolv.conf":   "# of the host\nnameserver 203.0.113.1\n",
		} {
			p.check(os.WriteFile(path, []byte(text), 0o644))
		}
	})
	p.sh("ip link set lo up")
	p.env = append(os.Environ(), "XDG_RUNTIME_DIR=/run")
	return p
}

func (p *place) check(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Error(err) // not Fatal: it may be the place's goroutine
	}
}

// in runs f in the place.
func (p *place) in(f func()) {
	done := make(chan struct{})
	p.do <- func() {
		defer close(done)
		f()
	}
	<-done
}

// output runs a program to its end, which comes soon.
func (p *place) output(cmd *exec.Cmd) (out string, err error) {
	if cmd.Env == nil {
		cmd.Env, cmd.Dir = p.env, "/"
	}
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	p.in(func() { err = cmd.Start() })
	if err == nil {
		late := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		defer late.Stop()
		err = cmd.Wait()
	}
	return b.String(), err
}

func (p *place) run(name string, args ...string) (out string, err error) {
	return p.output(exec.Command(name, args...))
}

func (p *place) sh(script string) string {
	p.t.Helper()
	out, err := p.run("sh", "-ec", script)
	if err != nil {
		p.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// everything is what a node may change on its host.
func (p *place) everything() string {
	p.t.Helper()
	return p.sh(`ip -4 rule; ip -6 rule; ip -4 route show table all; ip -6 route show table all
		cat /proc/sys/net/ipv4/conf/*/rp_filter; ls -Al --time-style=+ /etc /run; ls -A /run/penstock 2>/dev/null || true
		cat /etc/resolv.conf`)
}

// penstock is this program.
func (p *place) penstock(ctx context.Context, args ...string) *exec.Cmd {
	self, err := os.Executable()
	p.check(err)
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Args[0] = "penstock" // see TestMain
	return cmd
}

// call runs a verb to its end.
func (p *place) call(args ...string) (out string, err error) {
	return p.output(p.penstock(context.Background(), args...))
}

// A runningNode is penstock up.
type runningNode struct {
	cmd   *exec.Cmd
	log   *bytes.Buffer
	ended chan error
}

// up starts penstock with the place's configuration.
func (p *place) up() *runningNode {
	p.t.Helper()
	n := &runningNode{cmd: p.penstock(context.Background(), "up", "-c", p.config()), log: new(bytes.Buffer), ended: make(chan error, 1)}
	n.cmd.Env, n.cmd.Dir, n.cmd.Stderr = p.env, "/", n.log
	p.in(func() { p.check(n.cmd.Start()) })
	go func() { n.ended <- n.cmd.Wait() }()
	p.t.Cleanup(func() {
		n.cmd.Process.Kill()
		n.wait()
		if p.t.Failed() {
			p.t.Logf("%s:\n%s", p.config(), n.log)
		}
	})
	return n
}

func (p *place) config() string { return filepath.Join(p.home, "node.toml") }

// end sends a signal and waits.
func (n *runningNode) end(s os.Signal) error {
	n.cmd.Process.Signal(s)
	return n.wait()
}

func (n *runningNode) wait() error {
	select {
	case err := <-n.ended:
		n.ended <- err
		return err
	case <-time.After(20 * time.Second):
		return fmt.Errorf("it does not end")
	}
}

// await waits for a program to succeed.
func (p *place) await(name string, args ...string) string {
	p.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := p.run(name, args...)
		if err == nil {
			return out
		}
		if time.Now().After(end) {
			p.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
}

// A world is a host and a far side, each behind a network of its own, with the Internet between them,
// where there are a web server, and a name server that knows far.example.
type world struct {
	t                   *testing.T
	host, internet, far *place
	page                string
}

func newWorld(t *testing.T) *world {
	required(t, "curl", "ping", "ip")
	for _, name := range []string{"curl", "ping", "ip"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
	w := &world{t: t, host: newPlace(t), internet: newPlace(t), far: newPlace(t)}
	w.internet.sh(`echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		ip addr add 203.0.113.1/32 dev lo; ip -6 addr add 2001:db8:cafe::1/128 dev lo nodad`)
	w.join(w.host, 1)
	w.join(w.far, 2)
	w.internet.sh("ip route add 10.66.0.0/24 via 10.2.0.2; ip -6 route add fd66::/64 via 2001:db8:2::2")
	w.page = strings.Repeat("a page of the Internet\n", 200_000)
	w.internet.in(w.serve)
	return w
}

// serve is the Internet.
func (w *world) serve() {
	l, err := net.Listen("tcp", ":80")
	if err != nil {
		w.t.Error(err)
		return
	}
	server := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/me" {
			fmt.Fprint(rw, r.RemoteAddr)
			return
		}
		fmt.Fprint(rw, w.page)
	})}
	go server.Serve(l)
	w.t.Cleanup(func() { server.Close() })
	c, err := net.ListenPacket("udp4", "203.0.113.1:53")
	if err != nil {
		w.t.Error(err)
		return
	}
	go answerNames(c, map[string]string{"far.example.": "10.2.0.2"})
	w.t.Cleanup(func() { c.Close() })
}

// join leads a place to the Internet by the networks 10.n.0.0/24 and 2001:db8:n::/64.
func (w *world) join(p *place, n int) {
	w.t.Helper()
	thread := make(chan int, 1)
	w.internet.in(func() { thread <- unix.Gettid() })
	p.sh(fmt.Sprintf(`ip link add eth0 type veth peer name world%d netns %d
		ip link set eth0 addrgenmode none; ip link set eth0 up
		ip addr add 10.%[1]d.0.2/24 dev eth0
		ip -6 addr add 2001:db8:%[1]d::2/64 dev eth0 nodad; ip -6 addr add fe80::2/64 dev eth0 nodad`, n, <-thread))
	// Neighbour discovery for what is forwarded is from link-local addresses.
	w.internet.sh(fmt.Sprintf(`ip link set world%[1]d addrgenmode none; ip link set world%[1]d up
		ip addr add 10.%[1]d.0.1/24 dev world%[1]d
		ip -6 addr add 2001:db8:%[1]d::1/64 dev world%[1]d nodad; ip -6 addr add fe80::1/64 dev world%[1]d nodad`, n))
	p.sh(fmt.Sprintf("ip route add default via 10.%[1]d.0.1; ip -6 route add default via 2001:db8:%[1]d::1", n))
	for range 500 {
		if local := p.sh("ip -6 route show table local"); strings.Contains(local, fmt.Sprintf("2001:db8:%d::2", n)) && strings.Contains(local, "fe80::2") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.t.Fatal("the IPv6 addresses never work")
}

// answerNames is a name server.
func answerNames(c net.PacketConn, names map[string]string) {
	b := make([]byte, 4096)
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		answer := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true}, Questions: m.Questions}
		if a, ok := names[q.Name.String()]; !ok {
			answer.RCode = dnsmessage.RCodeNameError
		} else if q.Type == dnsmessage.TypeA {
			answer.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60},
				Body:   &dnsmessage.AResource{A: netip.MustParseAddr(a).As4()},
			}}
		}
		if packed, err := answer.Pack(); err == nil {
			c.WriteTo(packed, from)
		}
	}
}

// configure writes both sides' configurations.
func (w *world) configure(hostTUN, far, farTables string) {
	w.t.Helper()
	var private, public [2]string
	for i := range private {
		k, err := netstack.GenerateKey()
		if err != nil {
			w.t.Fatal(err)
		}
		text, err := k.MarshalText()
		if err != nil {
			w.t.Fatal(err)
		}
		private[i], public[i] = string(text), k.Public().String()
	}
	const timing = "[timing]\nhandshake_retry = \"100ms\"\nhandshake_retry_max = \"300ms\"\ndpd = \"300ms\"\ndpd_timeout = \"1s\"\n"
	write := func(p *place, text string) {
		if err := os.WriteFile(p.config(), []byte(text+timing), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	write(w.host, fmt.Sprintf(`[node]
private_key = %q
address = ["10.66.0.1/24", "fd66::1/64"]
device = "tun"
[tun]
%s
[dns]
servers = "10.66.0.2"
search = "corp.example"
[[peer]]
name = "far"
public_key = %q
endpoint = "far.example:5182"
allowed_ips = ["0.0.0.0/0", "::/0"]
`, private[0], hostTUN, public[1]))
	write(w.far, fmt.Sprintf(`[node]
private_key = %q
address = ["10.66.0.2/24", "fd66::2/64"]
listen = "[::]:5182"
%s
[[peer]]
name = "host"
public_key = %q
allowed_ips = ["10.66.0.1", "fd66::1"]
%s
`, private[1], far, public[0], farTables))
}

// established waits until the host's node has changed it and reached its peer.
func (w *world) established() {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := w.host.call("status", "-c", w.host.config())
		if err == nil && strings.Contains(out, "peer far: established") {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("never established: %v\n%s", err, out)
		}
	}
}

// carries checks that all goes through the tunnel, and whom the Internet sees for the host.
func (w *world) carries(who4, who6 string) {
	w.t.Helper()
	w.established()
	w.host.await("ping", "-c1", "-W1", "10.66.0.2")
	w.host.await("ping", "-c1", "-W1", "fd66::2")
	for url, who := range map[string]string{"http://203.0.113.1/": who4, "http://[2001:db8:cafe::1]/": who6} {
		if got := w.host.await("curl", "-gsSf", "-m5", url+"me"); !strings.HasPrefix(got, who) {
			w.t.Errorf("%s sees %s, want %s", url, got, who)
		}
		if got := w.host.await("curl", "-gsSf", "-m20", url); got != w.page {
			w.t.Errorf("%s: %d bytes, not the page", url, len(got))
		}
	}
	if text := w.host.sh("cat /etc/resolv.conf"); !strings.Contains(text, "\nnameserver 10.66.0.2\nsearch corp.example\n") {
		w.t.Errorf("resolv.conf:\n%s", text)
	}
}

// direct checks that the host is by itself.
func (w *world) direct() {
	w.t.Helper()
	for url, who := range map[string]string{"http://203.0.113.1/": "10.1.0.2:", "http://[2001:db8:cafe::1]/": "[2001:db8:1::2]:"} {
		if got := w.host.await("curl", "-gsSf", "-m5", url+"me"); !strings.HasPrefix(got, who) {
			w.t.Errorf("%s sees %s, want %s", url, got, who)
		}
	}
}

// remember returns a check that the host is as it is now.
func (w *world) remember() (same func(when string)) {
	before := w.host.everything()
	return func(when string) {
		w.t.Helper()
		if now := w.host.everything(); now != before {
			w.t.Errorf("%s the host is not as it was:\n%s\nbefore:\n%s", when, now, before)
		}
	}
}

// fullTunnel is a world where the host's peer has an interface of the kernel too and forwards, and
// where the host filters strictly by the way back.
func fullTunnel(t *testing.T) *world {
	w := newWorld(t)
	w.host.sh("for f in all eth0; do echo 1 >/proc/sys/net/ipv4/conf/$f/rp_filter; done")
	// The kernel forgets the default route of IPv6 with forwarding.
	w.far.sh(`echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
		ip -6 route replace default via 2001:db8:2::1`)
	w.configure("name = \"ps0\"", "device = \"tun\"\n[tun]\nname = \"far0\"\nqueues = 2\n", "")
	// The folder of the journals and control sockets stays.
	w.host.sh("mkdir -m 700 /run/penstock; touch /run/penstock/.hostnet.lock; chmod 600 /run/penstock/.hostnet.lock")
	w.direct()
	return w
}

// TestFullTunnel: a host with everything in the tunnel, whose peer is lost and found again; and that the
// host is as it was by whatever signal it ends.
func TestFullTunnel(t *testing.T) {
	w := fullTunnel(t)
	same := w.remember()
	far := w.far.up()
	host := w.host.up()
	w.carries("10.66.0.1:", "[fd66::1]:")
	if out, err := w.host.call("up", "-c", w.host.config()); err == nil || !strings.Contains(out, "already running") {
		t.Errorf("a second one: %v, %s", err, out)
	}
	w.host.sh("ip link show ps0 | grep -q 'mtu 14[0-9][0-9]'") // the path's 1500 less what the tunnel adds

	// By name, while all questions of the host go into the tunnel.
	if err := far.end(syscall.SIGTERM); err != nil {
		t.Errorf("the far side: %v", err)
	}
	time.Sleep(1500 * time.Millisecond)
	w.far.up()
	w.carries("10.66.0.1:", "[fd66::1]:")

	host.cmd.Process.Signal(syscall.SIGPIPE) // these two end nothing
	host.cmd.Process.Signal(syscall.SIGWINCH)
	for i, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGABRT, 64} {
		if i > 0 {
			host = w.host.up()
		}
		w.established()
		if err := host.end(s); err != nil {
			t.Errorf("%v: %v", s, err)
		}
		same(fmt.Sprintf("after %v", s))
	}
	w.direct()
	host = w.host.up()
	w.established()
	if out, err := w.host.call("down", "-c", w.host.config()); err != nil || !strings.HasSuffix(out, " has ended\n") {
		t.Errorf("penstock down: %v, %s", err, out)
	}
	if err := host.wait(); err != nil {
		t.Errorf("after penstock down: %v", err)
	}
	same("after penstock down")
}

// TestKilled: packets take their old ways at once; the next start, or penstock down, does the rest.
func TestKilled(t *testing.T) {
	w := fullTunnel(t)
	same := w.remember()
	before := w.host.everything()
	w.far.up()
	for _, again := range []bool{true, false} {
		host := w.host.up()
		w.carries("10.66.0.1:", "[fd66::1]:")
		host.end(syscall.SIGKILL)
		w.direct()
		w.host.sh("rm /run/penstock/node.sock") // which is not what this is about
		if w.host.everything() == before {
			t.Error("it left nothing")
		}
		if again {
			host = w.host.up()
			w.carries("10.66.0.1:", "[fd66::1]:")
			if err := host.end(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			if !strings.Contains(host.log.String(), "took back what a node left that died") {
				t.Error("the next start says nothing of what it took back")
			}
			same("after the next one")
			continue
		}
		if out, err := w.host.call("down", "-c", w.host.config()+".other"); err != nil || out != "" {
			t.Errorf("penstock down of another: %v, %s", err, out)
		}
		out, err := w.host.call("down", "-c", w.host.config())
		if err != nil || !strings.Contains(out, "took back ") || !strings.Contains(out, "interface ps0") {
			t.Errorf("penstock down: %v, %s", err, out)
		}
		same("after SIGKILL and penstock down")
	}
	if out, err := w.host.call("down"); err != nil || out != "" {
		t.Errorf("penstock down with nothing to do: %v, %s", err, out)
	}
}

// TestFullTunnelThroughNetstack: the far side has no interface and routes in its own stack.
func TestFullTunnelThroughNetstack(t *testing.T) {
	w := newWorld(t)
	w.configure("", "", "[router]\nallow = [\"0.0.0.0/0\", \"::/0\"]\n")
	w.far.up()
	host := w.host.up()
	w.carries("10.2.0.2:", "[2001:db8:2::2]:")
	if err := host.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	w.direct()
}

// TestHostRefuses: a host that cannot be changed is left as it is, with a message that says why.
func TestHostRefuses(t *testing.T) {
	w := newWorld(t)
	w.host.sh("mkdir -m 700 /run/penstock; touch /run/penstock/.hostnet.lock; chmod 600 /run/penstock/.hostnet.lock")
	refuses := func(tun, want string) {
		t.Helper()
		w.configure(tun, "", "")
		same := w.remember()
		if out, err := w.host.call("up", "-c", w.host.config()); err == nil || err.Error() != "exit status 1" || !strings.Contains(out, want) {
			t.Errorf("%s: %v, %s", tun, err, out)
		}
		same(tun)
	}
	refuses(`name = "eth0"`, "interface eth0 is there already and is no TUN (veth)")
	refuses("name = \"ps0\"\nroutes = \"main\"", "route 0.0.0.0/0 table 254: file exists")
	w.host.sh("mkdir -p /etc/resolv.conf.before-ps0/x")
	refuses(`name = "ps0"`, "/etc/resolv.conf.before-ps0")
	w.host.sh("mount -t tmpfs tmpfs /dev/net")
	refuses(`name = "ps0"`, "/dev/net/tun is not there")
}

// asNobody makes penstock up -c node.toml a program of user 65534, with a copy of the program and of the
// configuration and a folder of its own, and the capabilities caps.
func (w *world) asNobody(caps ...uintptr) *exec.Cmd {
	w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		w.t.Fatal(err)
	}
	w.host.sh("mkdir -p -m 700 /run/user && cp " + self + " /run/user/program && cp " + w.host.config() + " /run/user/ && chown -R 65534:65534 /run/user")
	cmd := exec.Command("/run/user/program", "up", "-c", "/run/user/node.toml")
	cmd.Args[0] = "penstock"
	cmd.Env, cmd.Dir = append(os.Environ(), "XDG_RUNTIME_DIR=/run/user"), "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: caps}
	return cmd
}

// TestWithoutCapability: a user who may not is told what is missing.
func TestWithoutCapability(t *testing.T) {
	w := newWorld(t)
	w.configure(`name = "ps0"`, "", "")
	same := w.remember()
	out, err := w.host.output(w.asNobody())
	if err == nil || !strings.Contains(out, "an interface cannot be made: it needs CAP_NET_ADMIN: run it as root, with AmbientCapabilities=CAP_NET_ADMIN in its unit") {
		t.Errorf("%v, %s", err, out)
	}
	w.host.sh("rm -rf /run/user")
	same("after a user who may not")
}

// TestNetAdminAlone: a user with CAP_NET_ADMIN has a full tunnel, is killed, and starts again.
func TestNetAdminAlone(t *testing.T) {
	w := fullTunnel(t)
	w.configure("name = \"ps0\"\ndns = false", "device = \"tun\"\n", "")
	same := w.remember()
	w.far.up()
	for _, s := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		cmd := w.asNobody(unix.CAP_NET_ADMIN)
		var log bytes.Buffer
		cmd.Stdout, cmd.Stderr = &log, &log
		w.host.in(func() { w.host.check(cmd.Start()) })
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		late := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
		for url, who := range map[string]string{"http://203.0.113.1/me": "10.66.0.1:", "http://[2001:db8:cafe::1]/me": "[fd66::1]:"} {
			got := ""
			for end := time.Now().Add(20 * time.Second); !strings.HasPrefix(got, who) && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				got, _ = w.host.run("curl", "-gsSf", "-m5", url)
			}
			if !strings.HasPrefix(got, who) {
				t.Errorf("%s sees %s, want %s", url, got, who)
			}
		}
		cmd.Process.Signal(s)
		err := <-ended
		late.Stop()
		if s == syscall.SIGTERM && (err != nil || !strings.Contains(log.String(), "took back what a node left that died")) {
			t.Errorf("%v: %v\n%s", s, err, log.String())
		}
		w.direct()
	}
	w.host.sh("rm -rf /run/user")
	same("at the end")
}
