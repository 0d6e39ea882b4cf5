package netstack

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// routerNet is three network namespaces in a row:
//
//	client ── 10.9.1.0/24, fd91::/64 ── router ── 10.9.2.0/24, fd92::/64 ── target
//
// The address on the left of each link ends in 1, that on the right in 2. Router and
// target send what is for 10.9.3.0/24 to each other.
type routerNet struct {
	t    *testing.T
	home netns.NsHandle
	ns   [3]netns.NsHandle
}

const clientNS, routerNS, targetNS = 0, 1, 2

// newRouterNet skips the test where namespaces cannot be made, unless
// PENSTOCK_REQUIRE_NETNS=1 says that this is a failure.
func newRouterNet(t *testing.T) *routerNet {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	w := &routerNet{t: t, home: home, ns: [3]netns.NsHandle{netns.None(), netns.None(), netns.None()}}
	t.Cleanup(w.close)
	for i := range w.ns {
		ns, err := netns.New()
		if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
			t.Skipf("SKIPPED: no network namespace can be made here: %v", err)
		}
		w.check(err)
		w.ns[i] = ns
	}
	for i := range w.ns {
		w.in(i, func() { w.up("lo") })
	}
	for i := range 2 {
		w.in(i, func() {
			attrs := netlink.NewLinkAttrs()
			attrs.Name = "right"
			w.check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "left", PeerNamespace: netlink.NsFd(w.ns[i+1])}))
			w.address("right", fmt.Sprintf("10.9.%d.1/24", i+1), fmt.Sprintf("fd9%d::1/64", i+1))
		})
		w.in(i+1, func() { w.address("left", fmt.Sprintf("10.9.%d.2/24", i+1), fmt.Sprintf("fd9%d::2/64", i+1)) })
	}
	w.in(routerNS, func() {
		_, behind, _ := net.ParseCIDR("10.9.3.0/24")
		w.check(netlink.RouteAdd(&netlink.Route{Dst: behind, Gw: net.ParseIP("10.9.2.2")}))
	})
	w.in(targetNS, func() {
		_, back, _ := net.ParseCIDR("10.9.3.0/24")
		w.check(netlink.RouteAdd(&netlink.Route{Dst: back, Gw: net.ParseIP("10.9.2.1")})) // in a circle
		w.sysctl("net/ipv4/ip_forward", "1")
		w.sysctl("net/ipv4/icmp_ratelimit", "0")
	})
	return w
}

// in runs do on this thread in namespace i. Sockets made and processes started there stay
// there.
func (w *routerNet) in(i int, do func()) {
	w.t.Helper()
	runtime.LockOSThread() // subtests have threads of their own
	w.check(netns.Set(w.ns[i]))
	defer func() {
		w.check(netns.Set(w.home))
		runtime.UnlockOSThread()
	}()
	do()
}

func (w *routerNet) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *routerNet) close() {
	netns.Set(w.home)
	for _, ns := range w.ns {
		if ns.IsOpen() {
			ns.Close()
		}
	}
	w.home.Close()
	runtime.UnlockOSThread()
}

func (w *routerNet) up(name string) netlink.Link {
	w.t.Helper()
	l, err := netlink.LinkByName(name)
	w.check(err)
	w.check(netlink.LinkSetUp(l))
	return l
}

func (w *routerNet) address(link string, addrs ...string) {
	w.t.Helper()
	l := w.up(link)
	for _, a := range addrs {
		parsed, err := netlink.ParseAddr(a)
		w.check(err)
		parsed.Flags = syscall.IFA_F_NODAD
		w.check(netlink.AddrAdd(l, parsed))
	}
}

func (w *routerNet) sysctl(name, value string) {
	w.t.Helper()
	w.check(os.WriteFile("/proc/sys/"+name, []byte(value), 0))
}

// program looks for a program of the system; without it the test is skipped, loudly.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
		t.Skipf("SKIPPED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// start runs a program in namespace i until the test ends.
func (w *routerNet) start(i int, name string, args ...string) {
	w.t.Helper()
	cmd := exec.Command(program(w.t, name), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	w.in(i, func() { w.check(cmd.Start()) })
	w.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if w.t.Failed() {
			w.t.Logf("%s: %s", name, out.String())
		}
	})
}

// await waits until somebody in namespace i listens on a port.
func (w *routerNet) await(i int, network string, port uint16) {
	w.t.Helper()
	at := fmt.Sprintf(":%04X", port)
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		found := false
		w.in(i, func() {
			for _, family := range []string{network, network + "6"} { // proc_pid_net(5)
				table, err := os.ReadFile("/proc/thread-self/net/" + family)
				w.check(err)
				for line := range strings.Lines(string(table)) {
					f := strings.Fields(line)
					// TCP_LISTEN; a UDP socket that is not connected is in TCP_CLOSE.
					found = found || len(f) > 3 && strings.HasSuffix(f[1], at) && (f[3] == "0A" || f[3] == "07")
				}
			}
		})
		if found {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("nobody listens on %s port %d", network, port)
		}
	}
}

// run runs a program in namespace i and gives its output.
func (w *routerNet) run(i int, name string, args ...string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(w.t, name), args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	var err error
	w.in(i, func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}
