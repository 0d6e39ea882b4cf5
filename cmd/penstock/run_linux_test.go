package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/penstock-vpn/penstock/netstack"
)

// ordinary is the user that the programs of these tests are: nobody, if the tests are root's.
const ordinary = 65534

// A runLab is a node at 10.66.0.2 and fd66::2 with services, and a configuration for penstock run at
// 10.66.0.1 and fd66::1.
type runLab struct {
	t    *testing.T
	dir  string // the ordinary user's
	bin  string
	peer *netstack.Node
}

const runTime = 30 * time.Second

// newRunLab skips the test where ordinary users may make no namespaces, unless PENSTOCK_REQUIRE_NETNS=1
// says that this is a failure.
func newRunLab(t *testing.T) *runLab {
	t.Helper()
	l := &runLab{t: t, dir: t.TempDir()}
	if err := os.Chmod(filepath.Dir(l.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	l.bin = filepath.Join(l.dir, "penstock")
	self, err := os.Executable()
	l.check(err)
	b, err := os.ReadFile(self)
	l.check(err)
	l.check(os.WriteFile(l.bin, b, 0o755))
	l.check(os.Mkdir(filepath.Join(l.dir, "run"), 0o700))

	here, err := netstack.GenerateKey()
	l.check(err)
	there, err := netstack.GenerateKey()
	l.check(err)
	l.peer, err = netstack.New(netstack.Config{
		PrivateKey: there, Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.66.0.2/32"), netip.MustParsePrefix("fd66::2/128")},
		Peers: []netstack.Peer{{Name: "run", PublicKey: here.Public(), AllowedIPs: []netip.Prefix{
			netip.MustParsePrefix("10.66.0.1/32"), netip.MustParsePrefix("fd66::1/128"),
		}}},
	})
	l.check(err)
	t.Cleanup(func() { l.peer.Close() })
	text, err := here.MarshalText()
	l.check(err)
	l.write("a.key", string(text)+"\n", 0o600)
	l.write("a.toml", fmt.Sprintf(`
[node]
private_key_file = "a.key"
address = ["10.66.0.1/32", "fd66::1/128"]
mtu = 1380
device = "tun"  # is for penstock up
[dns]
servers = ["10.66.0.2"]
search = ["vpn.test"]
[[peer]]
name = "b"
public_key = %q
endpoint = %q
allowed_ips = ["10.66.0.2/32", "fd66::2/128"]
`, there.Public(), l.peer.LocalAddrs()[0]), 0o600)
	l.write("notes.txt", "no program\n", 0o644)
	l.check(filepath.Walk(l.dir, func(path string, _ os.FileInfo, err error) error {
		if err == nil && os.Geteuid() == 0 {
			err = os.Chown(path, ordinary, ordinary)
		}
		return err
	}))
	if out, code := l.run(nil, "true"); code != 0 {
		if os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" && strings.Contains(out, "making the namespaces") {
			t.Skipf("SKIPPED: %s", out)
		}
		t.Fatalf("exit code %d: %s", code, out)
	}
	return l
}

func (l *runLab) check(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *runLab) write(name, text string, mode os.FileMode) {
	l.t.Helper()
	l.check(os.WriteFile(filepath.Join(l.dir, name), []byte(text), mode))
}

// command is penstock run as the ordinary user.
func (l *runLab) command(flags []string, program ...string) *exec.Cmd {
	args := append([]string{"run", "-c", "a.toml"}, flags...)
	cmd := exec.Command(l.bin, append(append(args, "--"), program...)...)
	cmd.Dir = l.dir
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+filepath.Join(l.dir, "run"), "HOME="+l.dir, "TMPDIR=/tmp")
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: ordinary, Gid: ordinary}
	}
	cmd.WaitDelay = runTime
	return cmd
}

// run runs a program to its end and gives what it has written, and its exit code.
func (l *runLab) run(flags []string, program ...string) (out string, code int) {
	l.t.Helper()
	cmd := l.command(flags, program...)
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	l.check(cmd.Start())
	late := time.AfterFunc(runTime, func() { cmd.Process.Kill() })
	defer late.Stop()
	cmd.Wait()
	return b.String(), cmd.ProcessState.ExitCode()
}

// needs skips for want of a program, unless all are required.
func needs(t *testing.T, names ...string) {
	t.Helper()
	required(t, names...)
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
}

// serveNames answers for www.vpn.test at the peer, over UDP.
func (l *runLab) serveNames() {
	c, err := l.peer.ListenPacket("udp", "10.66.0.2:53")
	l.check(err)
	l.t.Cleanup(func() { c.Close() })
	go func() {
		for b := make([]byte, 1500); ; {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			answer := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RCode: dnsmessage.RCodeNameError}, Questions: m.Questions}
			if q.Name.String() == "www.vpn.test." {
				answer.RCode = dnsmessage.RCodeSuccess
				if q.Type == dnsmessage.TypeA {
					answer.Answers = []dnsmessage.Resource{{
						Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60},
						Body:   &dnsmessage.AResource{A: [4]byte{10, 66, 0, 2}},
					}}
				}
			}
			if packed, err := answer.Pack(); err == nil {
				c.WriteTo(packed, from)
			}
		}
	}()
}

// serveWeb says hello over HTTP at the peer.
func (l *runLab) serveWeb() {
	web, err := l.peer.Listen("tcp", ":80")
	l.check(err)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello %s\n", r.RemoteAddr)
	})}
	go server.Serve(web)
	l.t.Cleanup(func() { server.Close() })
}

// What the program finds: its user without privileges, one interface, a network that works.
func TestRunInside(t *testing.T) {
	needs(t, "curl", "ping", "ip")
	l := newRunLab(t)
	l.serveNames()
	l.serveWeb()
	host, err := net.Listen("tcp", "127.0.0.1:0")
	l.check(err)
	defer host.Close()
	uid := strconv.Itoa(os.Geteuid())
	if uid == "0" {
		uid = strconv.Itoa(ordinary)
	}
	for _, c := range []struct {
		program string
		want    string // a regular expression
		code    int
	}{
		{"id -u", "^" + uid + "\n$", 0},
		{"grep -E Cap(Inh|Prm|Eff|Amb) /proc/self/status", `^(Cap...:\t0000000000000000\n){4}$`, 0},
		{"ip -o addr", `(?s)^1: lo .*127\.0\.0\.1.*2: penstock0 .*10\.66\.0\.1.*fd66::1[^\n]*\n$`, 0},
		{"ip -o link show penstock0", "UP,LOWER_UP> mtu 1380 ", 0},
		{"ip route", `^10\.66\.0\.2 dev penstock0 scope link`, 0},
		{"cat /etc/resolv.conf", "nameserver 10.66.0.2\nsearch vpn.test\n", 0},
		{"pwd", "^" + regexp.QuoteMeta(l.dir) + "\n$", 0},
		{"curl -sS -m 20 http://10.66.0.2/", `^hello 10\.66\.0\.1:`, 0},
		{"curl -sS -m 20 http://[fd66::2]/", `^hello \[fd66::1\]:`, 0},
		{"curl -sS -m 20 http://www.vpn.test/", `^hello 10\.66\.0\.1:`, 0},
		{"curl -sS -m 20 http://www/", `^hello 10\.66\.0\.1:`, 0},
		{"curl -sS -m 20 http://nowhere.vpn.test/", "Could not resolve", 6},
		{"curl -sS -m 20 http://192.0.2.1/", "(?i)(unreachable|connect)", 7},
		// Nothing of the host is there, its loopback neither.
		{"curl -sS -m 20 http://" + host.Addr().String() + "/", "(?i)(refused|connect)", 7},
		{"ping -c 2 -i 0.2 10.66.0.2", " 0% packet loss", 0},
		{"ping -c 2 -i 0.2 -s 3000 fd66::2", " 0% packet loss", 0},
		{"ping -c 1 127.0.0.1", " 0% packet loss", 0},
	} {
		out, code := l.run(nil, strings.Fields(c.program)...)
		if ok, err := regexp.MatchString(c.want, out); code != c.code || err != nil || !ok {
			t.Errorf("%s: exit code %d, want %d and %s:\n%s", c.program, code, c.code, c.want, out)
		}
	}
	if left := namesIn(t, "/tmp", "penstock-resolv-"); left != "" {
		t.Errorf("left behind: %s", left)
	}
}

func namesIn(t *testing.T, dir, prefix string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, prefix+"*"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

// Exit codes are the program's, or a shell's.
func TestRunExitCodes(t *testing.T) {
	l := newRunLab(t)
	for _, c := range []struct {
		flags   []string
		program []string
		code    int
		out     string
	}{
		{nil, []string{"sh", "-c", "exit 7"}, 7, ""},
		{nil, []string{"sh", "-c", "kill -TERM $$"}, 143, ""},
		{nil, []string{"sh", "-c", "kill -KILL $$"}, 137, ""},
		{nil, []string{"sh", "-c", "echo out; echo err >&2"}, 0, "out\nerr\n"},
		{nil, []string{"no-such-program"}, 127, "no-such-program: not found in PATH"},
		{nil, []string{"/no/such/program"}, 127, "no such file"},
		{nil, []string{"./notes.txt"}, 126, "permission denied"},
		{nil, []string{"/"}, 126, "directory"},
		{[]string{"--no-such-flag"}, []string{"true"}, 125, "unknown flag"},
		{[]string{"-c", "no-such.toml"}, []string{"true"}, 125, "no-such.toml"},
		{[]string{"-c", "notes.txt"}, []string{"true"}, 125, "notes.txt"},
		{[]string{"--publish", "0:80"}, []string{"true"}, 125, "expected [ADDRESS:]PORT[:PORT]"},
		{[]string{"--publish", "192.0.2.1:8080:80"}, []string{"true"}, 125, "cannot assign"},
		{[]string{"--log-level", "loud"}, []string{"true"}, 125, "--log-level"},
		{nil, nil, 125, "which program?"},
	} {
		out, code := l.run(c.flags, c.program...)
		if code != c.code || !strings.Contains(out, c.out) {
			t.Errorf("%v %v: exit code %d, want %d: %s", c.flags, c.program, code, c.code, out)
		}
	}
	l.check(os.Chmod(filepath.Join(l.dir, "notes.txt"), 0o755))
	if out, code := l.run(nil, "./notes.txt"); code != 126 || !strings.Contains(out, "exec format") {
		t.Errorf("no program but executable: %d: %s", code, out)
	}
	if out, code := l.run(nil, l.bin, "sandbox-helper"); code != 125 || !strings.Contains(out, "not for the command line") {
		t.Errorf("the helper by hand: %d: %s", code, out)
	}
}

// A live is a program under penstock run.
type live struct {
	l      *runLab
	cmd    *exec.Cmd
	out    *bufferedLines
	stdin  io.WriteCloser
	ended  chan struct{}
	helper int
}

// bufferedLines is what a program has written so far.
type bufferedLines struct{ lines chan string }

func (b *bufferedLines) await(t *testing.T, want string) string {
	t.Helper()
	late := time.After(runTime)
	var seen []string
	for {
		select {
		case line, ok := <-b.lines:
			if strings.Contains(line, want) && ok {
				return line
			}
			if seen = append(seen, line); !ok {
				t.Fatalf("%q never came, but %q", want, seen)
			}
		case <-late:
			t.Fatalf("%q never came, but %q", want, seen)
		}
	}
}

func linesOf(r io.Reader) *bufferedLines {
	b := &bufferedLines{make(chan string, 1000)}
	go func() {
		defer close(b.lines)
		var line []byte
		for one := make([]byte, 1); ; {
			if _, err := r.Read(one); err != nil {
				return
			}
			if line = append(line, one[0]); one[0] == '\n' {
				b.lines <- string(line)
				line = nil
			}
		}
	}()
	return b
}

// begin starts a program and waits for the line "ready" of it.
func (l *runLab) begin(flags []string, program ...string) *live {
	l.t.Helper()
	p := &live{l: l, cmd: l.command(flags, program...), ended: make(chan struct{})}
	r, w, err := os.Pipe()
	l.check(err)
	p.cmd.Stdout, p.cmd.Stderr = w, w
	p.cmd.SysProcAttr.Setpgid = true // a job of its own
	p.stdin, err = p.cmd.StdinPipe()
	l.check(err)
	l.check(p.cmd.Start())
	w.Close()
	p.out = linesOf(r)
	go func() {
		p.cmd.Wait()
		close(p.ended)
	}()
	l.t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		r.Close()
	})
	p.out.await(l.t, "ready")
	for _, pid := range childrenOf(p.cmd.Process.Pid) {
		p.helper = pid
	}
	return p
}

// end waits for the end and gives the exit code.
func (p *live) end() int {
	p.l.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(runTime):
		p.l.t.Fatal("it does not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

// childrenOf and namespaceOf read /proc.
func childrenOf(pid int) (all []int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, s := range stats {
		b, err := os.ReadFile(s)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) > 1 && f[1] == strconv.Itoa(pid) {
			child, _ := strconv.Atoi(filepath.Base(filepath.Dir(s)))
			all = append(all, child)
		}
	}
	return all
}

func namespaceOf(pid int) string {
	ns, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	return ns
}

// inNamespace are the processes in a network namespace.
func inNamespace(ns string) (all []string) {
	links, _ := filepath.Glob("/proc/[0-9]*/ns/net")
	for _, link := range links {
		if got, err := os.Readlink(link); err == nil && got == ns {
			all = append(all, link)
		}
	}
	return all
}

// emptied waits until no process is left in a namespace.
func emptied(t *testing.T, ns string) {
	t.Helper()
	if ns == "" || ns == namespaceOf(os.Getpid()) {
		t.Fatalf("namespace %q", ns)
	}
	for end := time.Now().Add(runTime); ; time.Sleep(10 * time.Millisecond) {
		left := inNamespace(ns)
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %v", left)
		}
	}
}

// Signals for penstock run, or for its whole job, reach the program, once; one that has left the job, too.
func TestRunSignals(t *testing.T) {
	l := newRunLab(t)
	for sig, name := range map[syscall.Signal]string{unix.SIGTERM: "TERM", unix.SIGINT: "INT", unix.SIGHUP: "HUP", unix.SIGUSR1: "USR1"} {
		program := []string{"sh", "-c", `trap 'echo got; n=$((n+1))' ` + name + `; sleep 0.1; echo ready; while [ -z "$n" ]; do sleep 0.05; done; sleep 0.3; exit $((40+n))`}
		for to, program := range map[string][]string{"run": program, "the job": program, "the job that it has left": append([]string{"setsid"}, program...)} {
			p := l.begin(nil, program...)
			pid := p.cmd.Process.Pid
			if to != "run" {
				pid = -pid
			}
			l.check(unix.Kill(pid, sig))
			p.out.await(t, "got")
			if code := p.end(); code != 41 {
				t.Errorf("%v to %s: exit code %d, want 41", sig, to, code)
			}
		}
	}
	// What it does not handle it dies of.
	p := l.begin(nil, "sh", "-c", "echo ready; exec sleep 1000")
	l.check(p.cmd.Process.Signal(unix.SIGTERM))
	if code := p.end(); code != 143 {
		t.Errorf("exit code %d, want 143", code)
	}
}

// ^C while the node starts is for the program that is about to be.
func TestRunEarlySignal(t *testing.T) {
	l := newRunLab(t)
	for pause := time.Duration(0); pause < 30*time.Millisecond; pause += time.Millisecond {
		cmd := l.command(nil, "sleep", "1")
		cmd.SysProcAttr.Setpgid = true
		l.check(cmd.Start())
		time.Sleep(pause)
		l.check(unix.Kill(-cmd.Process.Pid, unix.SIGINT))
		if err := cmd.Wait(); err == nil {
			t.Errorf("interrupted after %v it goes on", pause)
		}
	}
}

// The program reads the standard input to its end.
func TestRunInput(t *testing.T) {
	l := newRunLab(t)
	p := l.begin(nil, "sh", "-c", "echo ready; wc -c")
	p.stdin.Write(make([]byte, 1<<16))
	p.stdin.Close()
	p.out.await(t, "65536")
	if code := p.end(); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// At a terminal: ^Z stops the job and fg continues it, and ^C reaches the program once.
func TestRunTerminal(t *testing.T) {
	needs(t, "bash")
	l := newRunLab(t)
	master, slave := terminal(t)
	cmd := l.command(nil)
	cmd.Path, cmd.Args = program(t, "bash"), []string{"bash", "--norc", "-i"}
	cmd.Env = append(cmd.Env, "PS1=", "HISTFILE=", "TERM=dumb")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	l.check(cmd.Start())
	slave.Close()
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		master.Close()
	})
	out := linesOf(master)
	say := func(s string) {
		_, err := master.WriteString(s)
		l.check(err)
	}
	// The terminal echoes what is typed, so what is waited for is spelled otherwise there.
	l.write("job.sh", `trap 'echo interrupt''ed; n=$((n+1))' INT
echo read''y
while [ -z "$n" ]; do sleep 0.05; done
sleep 0.5
exit $((40+n))
`, 0o644)
	say(l.bin + " run -c a.toml -- sh job.sh; echo co''de=$?\n")
	out.await(t, "ready")
	say("\x1a")
	out.await(t, "Stopped")
	say("echo she''ll\n")
	out.await(t, "shell")
	say("fg; echo co''de=$?\n")
	time.Sleep(300 * time.Millisecond)
	say("\x03")
	out.await(t, "interrupted")
	if line := out.await(t, "code="); !strings.Contains(line, "code=41") {
		t.Errorf("%q, want code=41", line)
	}
}

// Where no shell could continue the job, as with ssh -t, ^Z stops nobody.
func TestRunTerminalWithoutShell(t *testing.T) {
	l := newRunLab(t)
	master, slave := terminal(t)
	cmd := l.command(nil, "sh", "-c", "echo ready; read line; echo has $line")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Setctty = true, true
	l.check(cmd.Start())
	slave.Close()
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		master.Close()
	})
	out := linesOf(master)
	out.await(t, "ready")
	_, err := master.WriteString("\x1a")
	l.check(err)
	time.Sleep(300 * time.Millisecond)
	_, err = master.WriteString("hello\n")
	l.check(err)
	out.await(t, "has hello")
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("it was stopped")
	}
}

// terminal makes a pseudo-terminal (pts(4)).
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fail := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	fail(err)
	fail(unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	fail(err)
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	fail(err)
	if os.Geteuid() == 0 {
		fail(slave.Chown(ordinary, ordinary))
	}
	return master, slave
}

// Nothing outlives the program, penstock or the helper, however they end: no process, so no
// namespace.
func TestRunNothingLeft(t *testing.T) {
	l := newRunLab(t)
	// One child in the background, one that has left the session and ignores SIGTERM.
	const program = `sleep 1000 & setsid sh -c 'trap "" TERM; while :; do sleep 0.1; done' & sleep 0.2; echo ready; `
	for name, end := range map[string]struct {
		script string
		do     func(p *live)
		code   int
	}{
		"the program ends":   {program + "exit 5", func(*live) {}, 5},
		"penstock is killed": {program + "exec sleep 1000", func(p *live) { p.cmd.Process.Kill() }, -1},
		"the helper is killed": {program + "exec sleep 1000", func(p *live) {
			if p.helper == 0 {
				t.Fatal("no helper")
			}
			l.check(unix.Kill(p.helper, unix.SIGKILL))
		}, 125},
		"a signal": {program + "exec sleep 1000", func(p *live) { p.cmd.Process.Signal(unix.SIGTERM) }, 143},
	} {
		p := l.begin(nil, "sh", "-c", "sleep 0.3; "+end.script)
		ns := namespaceOf(p.helper)
		if ns == "" && name == "the program ends" {
			p.end()
			continue // it was too quick to look at
		}
		end.do(p)
		if code := p.end(); code != end.code {
			t.Errorf("%s: exit code %d, want %d", name, code, end.code)
		}
		emptied(t, ns)
	}
}

// Peers reach the program at the node's address, the host does by --publish.
func TestRunPublish(t *testing.T) {
	needs(t, "iperf3")
	l := newRunLab(t)
	port := freePort(t)
	p := l.begin([]string{"--publish", fmt.Sprintf("%d:5300", port)}, "sh", "-c", "echo ready; exec iperf3 -s -p 5300")
	ctx := t.Context()
	var err error
	for end := time.Now().Add(runTime); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		var c net.Conn
		if c, err = l.peer.Dial(ctx, "tcp", "10.66.0.1:5300"); err == nil {
			c.Close()
			break
		}
	}
	l.check(err)
	time.Sleep(200 * time.Millisecond) // iperf3 to forget that visit
	out, err := exec.Command("iperf3", "-c", "127.0.0.1", "-p", strconv.Itoa(port), "-t", "1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "receiver") {
		t.Errorf("%v: %s", err, out)
	}
	p.cmd.Process.Signal(unix.SIGTERM)
	p.end()
	if c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		c.Close()
		t.Error("the port is still open")
	}
	// A port that is taken.
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	l.check(err)
	defer taken.Close()
	out2, code := l.run([]string{"-p", fmt.Sprintf("%d:80", taken.Addr().(*net.TCPAddr).Port)}, "true")
	if code != 125 || !strings.Contains(out2, "address already in use") {
		t.Errorf("%d: %s", code, out2)
	}
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// Bulk from the program to a peer, in superpackets.
func TestRunBulk(t *testing.T) {
	needs(t, "iperf3")
	l := newRunLab(t)
	port := freePort(t)
	server := exec.Command("iperf3", "-s", "-B", "127.0.0.1", "-p", strconv.Itoa(port))
	l.check(server.Start())
	defer func() { server.Process.Kill(); server.Wait() }()
	_, err := l.peer.Publish("tcp", ":5201", fmt.Sprintf("127.0.0.1:%d", port))
	l.check(err)
	time.Sleep(300 * time.Millisecond)
	for _, reverse := range []string{"-4", "-R"} {
		out, code := l.run(nil, "iperf3", "-c", "10.66.0.2", "-t", "1", reverse)
		if code != 0 || !strings.Contains(out, "receiver") {
			t.Errorf("%d: %s", code, out)
		}
		t.Log(regexp.MustCompile(`.*receiver`).FindString(out))
	}
}

// Capabilities of penstock's file are neither in the way nor passed on.
func TestRunFileCapabilities(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root gives a file capabilities")
	}
	l := newRunLab(t)
	for _, set := range []uint32{1 << unix.CAP_NET_ADMIN, 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_SYS_ADMIN} {
		attr := make([]byte, 20) // struct vfs_ns_cap_data of linux/capability.h, revision 2
		binary.LittleEndian.PutUint32(attr, 0x02000000|1)
		binary.LittleEndian.PutUint32(attr[4:], set)
		l.check(unix.Setxattr(l.bin, "security.capability", attr, 0))
		if out, code := l.run(nil, "grep", "CapEff", "/proc/self/status"); code != 0 || !strings.Contains(out, "CapEff:\t0000000000000000") {
			t.Errorf("%#x: exit code %d: %s", set, code, out)
		}
	}
}

// Only one run, or up, at a time has a configuration; status tells about it.
func TestRunStatus(t *testing.T) {
	l := newRunLab(t)
	p := l.begin(nil, "sh", "-c", "echo ready; exec sleep 1000")
	if out, code := l.run(nil, "true"); code != 125 {
		t.Errorf("a second one: %d: %s", code, out)
	}
	status := exec.Command(l.bin, "status", "-c", "a.toml")
	status.Dir, status.Env, status.SysProcAttr = p.cmd.Dir, p.cmd.Env, p.cmd.SysProcAttr
	out, err := status.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "interface penstock0") {
		t.Errorf("%v: %s", err, out)
	}
	down := exec.Command(l.bin, "down", "-c", "a.toml")
	down.Dir, down.Env, down.SysProcAttr = p.cmd.Dir, p.cmd.Env, p.cmd.SysProcAttr
	if out, err := down.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if code := p.end(); code != 143 {
		t.Errorf("down: exit code %d, want 143", code)
	}
}

// Where namespaces are forbidden, the message names the switch.
func TestRunForbidden(t *testing.T) {
	needs(t, "unshare", "setpriv")
	l := newRunLab(t)
	for limit, drop := range map[string]string{
		"user": "setpriv --bounding-set=-all --inh-caps=-all", // without privileges a user namespace is needed
		"net":  "",
	} {
		cmd := l.command(nil, "true")
		cmd.Path, cmd.Args = program(t, "unshare"), []string{"unshare", "--user", "--map-root-user", "sh", "-c", fmt.Sprintf(
			"echo 0 > /proc/sys/user/max_%s_namespaces && exec %s %s run -c a.toml -- true", limit, drop, l.bin)}
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != 125 || !strings.Contains(string(out), "user.max_"+limit+"_namespaces is 0") {
			t.Errorf("%s: %v: %s", limit, err, out)
		}
	}
}

func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
