package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// A connectNet is two places joined by a cable: one with a VPN server and a web server behind it, and one with
// the client. The client's has /etc and /run of its own, so that nothing there is the machine's.
type connectNet struct {
	t              *testing.T
	dir            string // everybody may write to it
	penstock       string // this program, which everybody may execute
	client, server int    // processes that hold the places
}

const (
	connectServer  = "10.9.1.2"
	connectServer6 = "fd09:1::2"
	resolvOfHost   = "# of the host\nnameserver 192.0.2.53\nsearch lan\n"
	thePage        = "the page behind the VPN, for "
)

// newConnectNet skips the test where namespaces cannot be made, unless PENSTOCK_REQUIRE_NETNS=1 says that
// this is a failure.
func newConnectNet(t *testing.T) *connectNet {
	t.Helper()
	required(t, "nsenter", "unshare", "setpriv", "curl", "ip", "ping")
	if os.Getuid() != 0 {
		if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
			t.Fatal("namespaces for whole programs need root")
		}
		t.Skip("SKIPPED: namespaces for whole programs need root")
	}
	dir, err := os.MkdirTemp("", "penstock-connect")
	w := &connectNet{t: t, dir: dir, penstock: filepath.Join(dir, "penstock")}
	w.check(err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.ReadFile("/proc/self/exe")
	w.check(err)
	w.check(os.WriteFile(w.penstock, self, 0o755))
	w.check(os.Chmod(dir, 0o1777))
	w.check(os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(resolvOfHost), 0o644))
	w.server = w.hold("")
	w.client = w.hold(`
		for f in passwd group hosts nsswitch.conf; do [ ! -e /etc/$f ] || cp /etc/$f ` + dir + `/etc-$f; done
		mount -t tmpfs tmpfs /etc && mount -t tmpfs tmpfs /run
		for f in ` + dir + `/etc-*; do cp $f /etc/${f##*/etc-}; done
		cp ` + dir + `/resolv.conf /etc/resolv.conf`)
	w.root(w.client, "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", fmt.Sprint(w.server))
	for _, end := range []struct {
		pid      int
		v4, v6   string
		gateway4 string
	}{{w.client, "10.9.1.1", "fd09:1::1", connectServer}, {w.server, connectServer, connectServer6, ""}} {
		w.root(end.pid, "ip", "link", "set", "lo", "up")
		w.root(end.pid, "ip", "link", "set", "eth0", "up")
		w.root(end.pid, "ip", "addr", "add", end.v4+"/24", "dev", "eth0")
		w.root(end.pid, "ip", "addr", "add", end.v6+"/64", "dev", "eth0", "nodad")
		if end.gateway4 != "" {
			w.root(end.pid, "ip", "route", "add", "default", "via", end.gateway4)
		}
	}
	return w
}

func (w *connectNet) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// hold makes a place, sets it up, and keeps it until the test ends.
func (w *connectNet) hold(setup string) (pid int) {
	w.t.Helper()
	cmd := exec.Command("unshare", "--net", "--mount", "--propagation", "private", "sh", "-euc", setup+"\necho ready; exec sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	w.check(err)
	runtime.LockOSThread() // Pdeathsig is about the thread
	w.t.Cleanup(runtime.UnlockOSThread)
	w.check(cmd.Start())
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line := make([]byte, 6)
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "ready\n" {
		cmd.Wait()
		if os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
			w.t.Skipf("SKIPPED: no namespaces can be made here: %v %s", err, &stderr)
		}
		w.t.Fatalf("no namespaces: %v %s", err, &stderr)
	}
	return cmd.Process.Pid
}

// in runs do on this thread where the server is.
func (w *connectNet) inServer(do func()) {
	w.t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	w.check(err)
	defer home.Close()
	there, err := netns.GetFromPid(w.server)
	w.check(err)
	defer there.Close()
	w.check(netns.Set(there))
	defer func() { w.check(netns.Set(home)) }()
	do()
}

// web serves thePage at port 80 of all addresses in the server's place, with the client's address.
func (w *connectNet) web() {
	w.inServer(func() {
		l, err := net.Listen("tcp", "[::]:80")
		w.check(err)
		s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(rw, "%s%s\n", thePage, netip.MustParseAddrPort(r.RemoteAddr).Addr().Unmap())
		})}
		go s.Serve(l)
		w.t.Cleanup(func() { s.Close() })
	})
}

// user is whose a process is.
type user int

const (
	asRoot   user = 0
	asNobody user = 65534
)

// command is a program in a place.
func (w *connectNet) command(pid int, as user, args ...string) *exec.Cmd {
	full := []string{"-t", fmt.Sprint(pid), "-n", "-m", "--"}
	if as != asRoot {
		full = append(full, "setpriv", fmt.Sprintf("--reuid=%d", as), fmt.Sprintf("--regid=%d", as), "--clear-groups", "--")
	}
	cmd := exec.Command("nsenter", append(full, args...)...)
	cmd.Dir = w.dir
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=" + w.dir, "HOME=" + w.dir}
	return cmd
}

// root runs a program to its end, which must be good.
func (w *connectNet) root(pid int, args ...string) string {
	w.t.Helper()
	out, err := w.command(pid, asRoot, args...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// An ended is what a program has left.
type ended struct {
	stdout, stderr string
	code           int
}

// run runs the client's program to its end.
func (w *connectNet) run(as user, stdin string, args ...string) (r ended) {
	w.t.Helper()
	p := w.start(as, stdin, args...)
	r.code = p.wait(30 * time.Second)
	r.stdout, r.stderr = p.stdout.String(), p.stderr.String()
	return r
}

// A text is output that grows.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *text) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *text) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// A started is a program that runs.
type started struct {
	w              *connectNet
	cmd            *exec.Cmd
	stdout, stderr text
	exited         chan struct{}
}

// start starts a program where the client is; "penstock" is this one.
func (w *connectNet) start(as user, stdin string, args ...string) *started {
	w.t.Helper()
	return w.startIn(w.client, as, stdin, args...)
}

// startIn starts a program in a place.
func (w *connectNet) startIn(pid int, as user, stdin string, args ...string) *started {
	w.t.Helper()
	if args[0] == "penstock" {
		args = append([]string{w.penstock}, args[1:]...)
	}
	p := &started{w: w, cmd: w.command(pid, as, args...), exited: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = strings.NewReader(stdin), &p.stdout, &p.stderr
	p.cmd.WaitDelay = 2 * time.Second
	w.check(p.cmd.Start())
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	w.t.Cleanup(func() {
		p.end(syscall.SIGTERM)
		if w.t.Failed() {
			w.t.Logf("%v:\n%s%s", args, &p.stdout, &p.stderr)
		}
	})
	return p
}

// wait waits for the program to end by itself, and returns its exit code.
func (p *started) wait(patience time.Duration) int {
	p.w.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.w.t.Fatalf("%v has not ended within %v\n%s%s", p.cmd.Args, patience, &p.stdout, &p.stderr)
	}
	return p.cmd.ProcessState.ExitCode()
}

// end ends the program by a signal and returns its exit code, -1 if it had to be killed.
func (p *started) end(s syscall.Signal) int {
	p.cmd.Process.Signal(s)
	select {
	case <-p.exited:
	case <-time.After(15 * time.Second):
		p.cmd.Process.Kill()
		<-p.exited
	}
	return p.cmd.ProcessState.ExitCode()
}

// await waits until the program's log has a text.
func (p *started) await(what string) {
	p.w.t.Helper()
	for end := time.Now().Add(20 * time.Second); !strings.Contains(p.stderr.String(), what); time.Sleep(10 * time.Millisecond) {
		select {
		case <-p.exited:
			p.w.t.Fatalf("%v has ended without %q\n%s%s", p.cmd.Args, what, &p.stdout, &p.stderr)
		default:
		}
		if time.Now().After(end) {
			p.w.t.Fatalf("%v never says %q\n%s%s", p.cmd.Args, what, &p.stdout, &p.stderr)
		}
	}
}

// fetch gets the page and returns the address that the web server has seen.
func (w *connectNet) fetch(curl ...string) (from string, err error) {
	w.t.Helper()
	cmd := w.command(w.client, asNobody, append([]string{"curl", "-sS", "-g", "--max-time", "10", "--retry", "2", "--retry-connrefused"}, curl...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("curl %v: %w: %s", curl, err, out)
	}
	from, ok := strings.CutPrefix(strings.TrimSpace(string(out)), thePage)
	if !ok {
		return "", errors.New("another page: " + string(out))
	}
	return from, nil
}
