package netstack

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/penstock-vpn/penstock/netstack/vpntest/hosts"
)

// routerNet is three network namespaces in a row:
//
//	client ── 10.9.1.0/24, fd91::/64 ── router ── 10.9.2.0/24, fd92::/64 ── target
//
// The address on the left of each link ends in 1, that on the right in 2. Router and
// target send what is for 10.9.3.0/24 to each other.
type routerNet struct {
	*hosts.Hosts
	t *testing.T
}

const clientNS, routerNS, targetNS = 0, 1, 2

// newRouterNet skips the test where namespaces cannot be made.
func newRouterNet(t *testing.T) *routerNet {
	t.Helper()
	w := &routerNet{hosts.New(t, 3), t}
	for i := range 2 {
		port := func(host int, name string, last int) hosts.Port {
			return hosts.Port{Host: host, Name: name, Addrs: []string{fmt.Sprintf("10.9.%d.%d/24", i+1, last), fmt.Sprintf("fd9%d::%d/64", i+1, last)}}
		}
		w.Join(port(i, "right", 1), port(i+1, "left", 2))
	}
	circle := func(host int, via string) {
		w.On(host, func() {
			_, dst, _ := net.ParseCIDR("10.9.3.0/24")
			w.Check(netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}))
		})
	}
	circle(routerNS, "10.9.2.2")
	circle(targetNS, "10.9.2.1")
	w.On(targetNS, func() {
		w.Sysctl("net/ipv4/ip_forward", "1")
		w.Sysctl("net/ipv4/icmp_ratelimit", "0")
	})
	return w
}

// flow is a RouterConfig.Flow whose sockets are on a host: the router's goroutines run where they happen to.
func (w *routerNet) flow(host int) func(context.Context, Flow) (net.Conn, error) {
	return func(_ context.Context, f Flow) (net.Conn, error) {
		leave, err := w.Enter(host)
		if err != nil {
			return nil, err
		}
		defer leave()
		return net.Dial(f.Network, f.Dst.String())
	}
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
	w.On(i, func() { w.Check(cmd.Start()) })
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
		w.On(i, func() {
			for _, family := range []string{network, network + "6"} { // proc_pid_net(5)
				table, err := os.ReadFile("/proc/thread-self/net/" + family)
				w.Check(err)
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
	w.On(i, func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}
