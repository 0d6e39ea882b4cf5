package netstack

import (
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/penstock-vpn/penstock/transport"
)

// tunNet is routerNet with a node with an interface of the kernel at each end of the first link:
// a at 10.66.0.1 and fd66::1, b at 10.66.0.2 and fd66::2, which routes to the target.
func tunNet(t *testing.T, change func(w *routerNet, a, b *Config)) (w *routerNet, a, b *Node) {
	t.Helper()
	w = newRouterNet(t)
	ca := Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/32", "fd66::1/128"), TUN: new(TUNConfig),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("10.9.1.1:5182")},
	}
	cb := Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/32", "fd66::2/128"), TUN: &TUNConfig{Name: "vpn", Queues: 2},
		Listen: []netip.AddrPort{netip.MustParseAddrPort("10.9.1.2:5182")},
		Router: &RouterConfig{Allow: prefixes("10.9.2.0/24", "fd92::/64")},
	}
	ca.Peers = []Peer{{
		Name: "b", PublicKey: cb.PrivateKey.Public(), Endpoint: "10.9.1.2:5182",
		AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128", "10.9.2.0/24", "fd92::/64"),
	}}
	cb.Peers = []Peer{{Name: "a", PublicKey: ca.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}}
	if change != nil {
		change(w, &ca, &cb)
	}
	node := func(ns int, c Config, name string, routes []netip.Prefix) (n *Node) {
		w.On(ns, func() {
			n = start(t, c)
			w.Up(name, c.Addresses[0].String(), c.Addresses[1].String())
			l, err := netlink.LinkByName(name)
			w.Check(err)
			if l.Attrs().MTU != n.Status().MTU {
				t.Errorf("the interface's MTU is %d, the node's %d", l.Attrs().MTU, n.Status().MTU)
			}
			for _, r := range routes {
				_, dst, err := net.ParseCIDR(r.String())
				w.Check(err)
				w.Check(netlink.RouteAdd(&netlink.Route{Dst: dst, LinkIndex: l.Attrs().Index}))
			}
		})
		return n
	}
	b = node(routerNS, cb, "vpn", cb.Peers[0].AllowedIPs)
	a = node(clientNS, ca, "penstock0", ca.Peers[0].AllowedIPs)
	for n, peer := range map[*Node]*Node{a: b, b: a} {
		w.Check(n.WaitEstablished(within(t, patience), peer.PublicKey()))
	}
	return w, a, b
}

// dial is the kernel's of namespace i.
func (w *routerNet) dial(i int, to string) (c net.Conn, err error) {
	w.On(i, func() { c, err = net.DialTimeout("tcp", to, patience) })
	return c, err
}

// greeter is a service of the kernel's in namespace i.
func (w *routerNet) greeter(i int, at, name string) {
	w.t.Helper()
	w.On(i, func() {
		l, err := net.Listen("tcp", at)
		w.Check(err)
		w.t.Cleanup(func() { l.Close() })
		greet(l, name)
	})
}

// Kernel, stack and router of one node, each at its work, for the kernel and for the stack of
// another.
func TestTUNKernel(t *testing.T) {
	w, a, b := tunNet(t, nil)
	w.greeter(routerNS, ":22", "kernel")
	w.greeter(routerNS, ":81", "kernel") // behind the stack's
	w.greeter(clientNS, ":7", "a")
	l, err := b.Listen("tcp", ":81")
	w.Check(err)
	greet(l, "stack")

	for to, want := range map[string]string{
		"10.66.0.2:22": "kernel", "[fd66::2]:22": "kernel",
		"10.66.0.2:81": "stack", "[fd66::2]:81": "stack",
	} {
		c, err := w.dial(clientNS, to)
		if got := greeting(t, c, err); got != want {
			t.Errorf("a's kernel to %s: %q", to, got)
		}
		c, err = a.Dial(within(t, patience), "tcp", to)
		if got := greeting(t, c, err); got != want {
			t.Errorf("a's stack to %s: %q", to, got)
		}
	}
	for _, to := range []string{"10.66.0.1:7", "[fd66::1]:7"} {
		c, err := w.dial(routerNS, to)
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("b's kernel to %s: %q", to, got)
		}
		c, err = b.Dial(within(t, patience), "tcp", to)
		if got := greeting(t, c, err); got != "a" {
			t.Errorf("b's stack to %s: %q", to, got)
		}
	}
	for _, host := range []string{"10.66.0.1", "fd66::1"} {
		for seq := range 2 {
			if _, err := b.Ping(within(t, patience), netip.MustParseAddr(host), PingOptions{Size: 56, Sequence: uint16(seq)}); err != nil {
				t.Errorf("b's stack pings a's kernel at %s: %v", host, err)
			}
		}
	}
	for _, host := range []string{"10.66.0.2", "fd66::2"} {
		if out, err := w.run(clientNS, "ping", "-c", "3", "-i", "0.05", "-s", "3000", "-W", "5", host); err != nil || !strings.Contains(out, " 0% packet loss") {
			t.Errorf("a's kernel pings %s: %v\n%s", host, err, out)
		}
	}
	sa, sb := a.Status().TUN, b.Status().TUN
	if sa.Name != "penstock0" || sb.Name != "vpn" || sb.Capabilities.Queues != 2 || !sb.Capabilities.TSO.On || sb.PortConflict != "" {
		t.Errorf("%+v\n%+v", sa, sb)
	}
	if sb.ToKernel == 0 || sb.ToStack == 0 || sb.Inbound.Packets == 0 || sb.Outbound.Packets == 0 {
		t.Errorf("%+v", sb)
	}
}

// What is behind the node is its router's, TCP, UDP and ping, while its kernel has the node's own
// address. The router's sockets are made where its goroutines happen to run, so a Flow hook makes
// them where they belong.
func TestTUNKernelRouter(t *testing.T) {
	w, _, b := tunNet(t, func(w *routerNet, _, cb *Config) {
		cb.Router = &RouterConfig{Flow: w.flow(routerNS)}
	})
	w.greeter(targetNS, ":80", "target")
	w.greeter(routerNS, ":80", "kernel")
	for to, want := range map[string]string{"10.9.2.2:80": "target", "[fd92::2]:80": "target", "10.66.0.2:80": "kernel"} {
		c, err := w.dial(clientNS, to)
		if got := greeting(t, c, err); got != want {
			t.Errorf("%s: %q", to, got)
		}
	}
	if s := b.Status(); s.Router == nil || s.TUN.ToKernel == 0 || s.TUN.ToStack == 0 {
		t.Errorf("%+v", s.TUN)
	}
}

// Bulk between the kernels, and beside it to the published service, is carried in superpackets.
func TestTUNKernelBulk(t *testing.T) {
	w, _, b := tunNet(t, nil)
	w.start(routerNS, "iperf3", "-s", "-p", "5201")
	w.await(routerNS, "tcp", 5201)
	sink, err := b.Listen("tcp", ":9")
	w.Check(err)
	go func() {
		for {
			c, err := sink.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(io.Discard, c) }()
		}
	}()
	c, err := w.dial(clientNS, "10.66.0.2:9")
	w.Check(err)
	defer c.Close()
	stop := make(chan struct{})
	written := make(chan int)
	go func() {
		total := 0
		for b := make([]byte, 64<<10); ; {
			select {
			case <-stop:
				written <- total
				return
			default:
			}
			n, err := c.Write(b)
			if total += n; err != nil {
				written <- -1
				return
			}
		}
	}()
	for name, args := range map[string][]string{
		"IPv4":             {"-c", "10.66.0.2"},
		"IPv4, from there": {"-c", "10.66.0.2", "-R"},
		"IPv6, two flows":  {"-c", "fd66::2", "-P", "2"},
		"UDP":              {"-c", "fd66::2", "-u", "-b", "50M", "-l", "1300"},
	} {
		args = append(args, "-p", "5201", "-t", "1", "-J")
		out, err := w.run(clientNS, "iperf3", args...)
		// The server may be busy with the end of the last test.
		for tries := 0; strings.Contains(out, `"error"`) && tries < 20; tries++ {
			time.Sleep(200 * time.Millisecond)
			out, err = w.run(clientNS, "iperf3", args...)
		}
		var report struct {
			End struct {
				Sum         struct{ Bytes float64 }
				SumReceived struct {
					Bytes float64
					BPS   float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			}
		}
		if err == nil {
			err = json.Unmarshal([]byte(out), &report)
		}
		if got := max(report.End.SumReceived.Bytes, report.End.Sum.Bytes); err != nil || got < 1<<20 {
			t.Errorf("%s: %.0f bytes, %v\n%s", name, got, err, out)
		}
		t.Logf("%s: %.2f Gbit/s", name, report.End.SumReceived.BPS/1e9)
	}
	close(stop)
	if n := <-written; n < 1<<20 {
		t.Errorf("%d bytes to the stack beside it", n)
	}
	if s := b.Status().TUN; s.Inbound.Superpackets == 0 || s.Outbound.Superpackets == 0 {
		t.Errorf("no superpackets: %+v", s)
	}
}

// The kernel's connections go on over a path that narrows, IPv6's and IPv4's.
func TestTUNKernelPathMTU(t *testing.T) {
	w, _, b := tunNet(t, func(w *routerNet, _, cb *Config) {
		// The node would set it in the namespace that it runs in, which is another here.
		cb.TUN.MTUChanged = func(mtu int) {
			w.On(routerNS, func() {
				l, err := netlink.LinkByName("vpn")
				if err == nil {
					err = netlink.LinkSetMTU(l, mtu)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
	})
	var serving sync.WaitGroup
	defer serving.Wait()
	w.On(routerNS, func() {
		l, err := net.Listen("tcp", ":80")
		w.Check(err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for range 2 {
				c, err := l.Accept()
				if err != nil {
					return
				}
				serving.Go(func() {
					defer c.Close()
					c.SetDeadline(time.Now().Add(2 * patience))
					for one := make([]byte, 1); ; {
						if _, err := c.Read(one); err != nil {
							return
						}
						c.Write(make([]byte, int(one[0])<<10))
					}
				})
			}
		}()
	})
	var conns []net.Conn
	for _, to := range []string{"10.66.0.2:80", "[fd66::2]:80"} {
		c, err := w.dial(clientNS, to)
		w.Check(err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		conns = append(conns, c)
	}
	fetch := func(kib byte) {
		t.Helper()
		for _, c := range conns {
			c.Write([]byte{kib})
			if n, err := io.CopyN(io.Discard, c, int64(kib)<<10); err != nil {
				t.Fatalf("%v: %d bytes, %v", c.RemoteAddr(), n, err)
			}
		}
	}
	fetch(255)
	for ns, name := range map[int]string{clientNS: "right", routerNS: "left"} {
		w.On(ns, func() {
			l, err := netlink.LinkByName(name)
			w.Check(err)
			w.Check(netlink.LinkSetMTU(l, 1400))
		})
	}
	fetch(200)
	mtu := b.Status().MTU
	if mtu >= transport.DefaultInnerMTU || mtu < minMTU6 {
		t.Errorf("the node's MTU is %d", mtu)
	}
	w.On(routerNS, func() {
		l, err := netlink.LinkByName("vpn")
		w.Check(err)
		if l.Attrs().MTU != mtu {
			t.Errorf("the interface's MTU is %d, the node's %d", l.Attrs().MTU, mtu)
		}
	})
}

// A kernel whose own ports reach into the stack's is reported.
func TestPortsOverlap(t *testing.T) {
	for _, c := range []struct {
		ports, reserved string
		conflict        bool
	}{
		{"32768\t60999\n", "\n", false},
		{"1024\t65535\n", "\n", true},
		{"1024\t65535\n", "61000-65535\n", false},
		{"1024\t65535\n", "8080,61000-65535\n", false},
		{"1024\t65535\n", "61000-65000\n", true},
		{"62000 62010\n", "61990-62010\n", false},
		{"", "", false},
	} {
		if got := portsOverlap(c.ports, c.reserved); (got != "") != c.conflict {
			t.Errorf("%q, reserved %q: %q", c.ports, c.reserved, got)
		}
	}
	w := newRouterNet(t)
	w.On(clientNS, func() {
		w.Sysctl("net/ipv4/ip_local_port_range", "10000 65535")
		n := start(t, Config{PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/32"), TUN: new(TUNConfig)})
		if got := n.Status().TUN.PortConflict; !strings.Contains(got, "10000 to 65535") {
			t.Errorf("%q", got)
		}
	})
}

// A file that was meant for the node is closed when the node is not made.
func TestTUNFileClosed(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fd, err := syscall.Dup(int(w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{TUN: &TUNConfig{FD: fd}}); err == nil {
		t.Fatal("a node of nothing")
	}
	if err := syscall.Close(fd); err == nil {
		t.Error("the file was left open")
	}
}
