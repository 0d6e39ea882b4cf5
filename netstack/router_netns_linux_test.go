package netstack

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// routerEnv makes this test binary a router, as an ordinary user: its value is the
// client's public key.
const routerEnv = "PENSTOCK_TEST_ROUTER"

// TestRouterProcess is no test: it is the router of TestRouterEndToEnd.
func TestRouterProcess(t *testing.T) {
	client := os.Getenv(routerEnv)
	if client == "" {
		return // it is the router of TestRouterEndToEnd
	}
	if os.Getuid() == 0 {
		t.Fatal("runs as root")
	}
	peer, err := ParsePublicKey(client)
	if err != nil {
		t.Fatal(err)
	}
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/24", "fd66::2/64"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("10.9.1.2:5182")},
		Peers:  []Peer{{Name: "client", PublicKey: peer, AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}},
		Router: &RouterConfig{Allow: prefixes("10.9.2.0/24", "10.9.3.0/24", "fd92::/64")},
	})
	fmt.Println(n.PublicKey())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		json.NewEncoder(os.Stdout).Encode(n.Status().Router)
	}
}

// A routerProcess is that test.
type routerProcess struct {
	t   *testing.T
	key PublicKey
	in  io.WriteCloser
	out *bufio.Reader
}

func (w *routerNet) router(client PublicKey) *routerProcess {
	t := w.t
	t.Helper()
	self, err := os.Executable()
	w.Check(err)
	// As a file that nobody may read, too.
	copied := "/tmp/penstock-router-test-" + fmt.Sprint(os.Getpid())
	text, err := os.ReadFile(self)
	w.Check(err)
	w.Check(os.WriteFile(copied, text, 0o755))
	t.Cleanup(func() { os.Remove(copied) })
	cmd := exec.Command(copied, "-test.run=^TestRouterProcess$", "-test.v=false")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), routerEnv+"="+client.String())
	cmd.Stderr = os.Stderr
	// Another user than root has no capabilities after exec(2).
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	in, err := cmd.StdinPipe()
	w.Check(err)
	out, err := cmd.StdoutPipe()
	w.Check(err)
	w.On(routerNS, func() { w.Check(cmd.Start()) })
	p := &routerProcess{t: t, in: in, out: bufio.NewReader(out)}
	t.Cleanup(func() {
		in.Close()
		rest, _ := io.ReadAll(p.out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("router: %v\n%s", err, rest)
		}
	})
	line, err := p.out.ReadString('\n')
	w.Check(err)
	p.key, err = ParsePublicKey(strings.TrimSpace(line))
	w.Check(err)
	return p
}

func (p *routerProcess) status() (s RouterStatus) {
	p.t.Helper()
	fmt.Fprintln(p.in)
	line, err := p.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &s)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

// TestRouterEndToEnd: programs of the system behind a node reach programs of the system
// behind a router that runs as nobody.
func TestRouterEndToEnd(t *testing.T) {
	w := newRouterNet(t)
	w.On(routerNS, func() { w.Sysctl("net/ipv4/ping_group_range", "0 2147483647") })
	key := newKey(t)
	r := w.router(key.Public())
	var a *Node
	w.On(clientNS, func() {
		a = start(t, Config{
			PrivateKey: key, Addresses: prefixes("10.66.0.1/24", "fd66::1/64"),
			Listen: []netip.AddrPort{netip.MustParseAddrPort("10.9.1.1:5182")},
			Peers:  []Peer{{Name: "router", PublicKey: r.key, Endpoint: "10.9.1.2:5182", AllowedIPs: prefixes("0.0.0.0/0", "::/0")}},
		})
		w.Check(a.WaitEstablished(within(t, patience), r.key))
		for _, f := range [][3]string{
			{"tcp", "127.0.0.1:5201", "10.9.2.2:5201"}, {"udp", "127.0.0.1:5201", "10.9.2.2:5201"},
			{"tcp", "127.0.0.1:5206", "[fd92::2]:5201"}, {"udp", "127.0.0.1:5206", "[fd92::2]:5201"},
			{"tcp", "127.0.0.1:8080", "10.9.2.2:80"}, {"tcp", "127.0.0.1:8086", "[fd92::2]:80"},
			{"tcp", "127.0.0.1:5300", "10.9.2.2:53"}, {"udp", "127.0.0.1:5300", "10.9.2.2:53"},
			{"udp", "127.0.0.1:5306", "[fd92::2]:53"},
		} {
			_, err := a.Forward(f[0], f[1], f[2])
			w.Check(err)
		}
	})
	t.Run("http", func(t *testing.T) {
		var l net.Listener
		w.On(targetNS, func() {
			var err error
			l, err = net.Listen("tcp", ":80")
			w.Check(err)
		})
		page := strings.Repeat("a page of the target\n", 50_000)
		s := http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, q *http.Request) {
			fmt.Fprintf(rw, "%s\n%s", q.RemoteAddr, page)
		})}
		go s.Serve(l)
		defer s.Close()
		for url, nat := range map[string]string{"http://127.0.0.1:8080/": "10.9.2.1:", "http://127.0.0.1:8086/": "[fd92::1]:"} {
			out, err := w.run(clientNS, "curl", "-sS", url)
			// The target sees the router, not the client.
			if err != nil || !strings.HasPrefix(out, nat) || !strings.HasSuffix(out, page) {
				t.Errorf("%s: %d bytes, %v, beginning %.40q", url, len(out), err, out)
			}
		}
	})
	t.Run("iperf3", func(t *testing.T) {
		program(t, "iperf3")
		w.start(targetNS, "iperf3", "-s")
		w.await(targetNS, "tcp", 5201)
		for _, port := range []string{"5201", "5206"} {
			runs := [][]string{{}, {"-R"}, {"-u", "-b", "20M", "-l", "1200"}, {"-u", "-b", "20M", "-l", "1200", "-R"}}
			if port == "5206" {
				runs = runs[:2]
			}
			for _, args := range runs {
				var got struct {
					Error string
					End   struct {
						Received struct {
							Bits float64 `json:"bits_per_second"`
						} `json:"sum_received"`
					}
				}
				var err error
				for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
					var out string
					out, err = w.run(clientNS, "iperf3", append([]string{"-c", "127.0.0.1", "-p", port, "-t", "1", "-J"}, args...)...)
					got.Error = ""
					json.Unmarshal([]byte(out), &got)
					if !strings.Contains(got.Error, "server is busy") { // with the end of the last test
						break
					}
				}
				if err != nil || got.Error != "" || got.End.Received.Bits < 1e6 {
					t.Errorf("port %s, %v: %v, %s", port, args, err, got.Error)
				}
				t.Logf("port %s, %v: %.0f Mbit/s", port, args, got.End.Received.Bits/1e6)
			}
		}
	})
	t.Run("dns", func(t *testing.T) {
		program(t, "dnsmasq")
		program(t, "dig")
		w.start(targetNS, "dnsmasq", "-k", "--user=root", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--pid-file=",
			"--address=/printer.test/192.0.2.77", "--address=/printer.test/2001:db8::77")
		w.await(targetNS, "udp", 53)
		w.await(targetNS, "tcp", 53)
		for _, q := range [][]string{
			{"-p", "5300", "A"}, {"-p", "5300", "AAAA"}, {"-p", "5300", "+tcp", "A"}, {"-p", "5306", "A"},
		} {
			out, err := w.run(clientNS, "dig", append([]string{"@127.0.0.1", "+short", "+time=3", "printer.test"}, q...)...)
			want := "192.0.2.77"
			if q[len(q)-1] == "AAAA" {
				want = "2001:db8::77"
			}
			if err != nil || strings.TrimSpace(out) != want {
				t.Errorf("%v: %v, %q, want %s", q, err, out, want)
			}
		}
	})
	t.Run("refusals", func(t *testing.T) {
		for to, why := range map[string]string{
			"10.9.2.2:81": "refused", "[fd92::2]:81": "refused", // nobody listens
			"10.9.2.77:80": "no route to host", // nobody is there: ARP says so
			"10.9.2.1:80":  "no route to host", // the router's own address
			"10.9.1.1:80":  "no route to host", // not allowed
			"127.0.0.1:80": "",
		} {
			began := time.Now()
			c, err := a.Dial(within(t, patience), "tcp", to)
			if err == nil {
				c.Close()
				t.Errorf("%s was reached", to)
				continue
			}
			if !strings.Contains(err.Error(), why) {
				t.Errorf("%s: %v after %v, want %q", to, err, time.Since(began), why)
			}
		}
	})
	s := r.status()
	t.Logf("%+v", s)
	if s.TCP.BytesToTarget == 0 || s.TCP.BytesToClient == 0 || s.UDP.DatagramsToTarget == 0 || s.UDP.DatagramsToClient == 0 ||
		s.Echo4 != "unprivileged sockets" || s.Echo6 != "unprivileged sockets" {
		t.Errorf("%+v", s)
	}
}

// TestRouterPing: echo requests, traceroute and packets too big, by raw packets, through
// a router that runs as nobody.
func TestRouterPing(t *testing.T) {
	w := newRouterNet(t)
	w.On(routerNS, func() { w.Sysctl("net/ipv4/ping_group_range", "0 2147483647") })
	key := newKey(t)
	r := w.router(key.Public())
	var c *rawClient
	w.On(clientNS, func() {
		c = newRawClient(t, key, r.key, netip.MustParseAddrPort("10.9.1.1:5182"), "10.9.1.2:5182")
	})
	addr := netip.MustParseAddr
	data := randomBytes(64)
	for _, dst := range []string{"10.9.2.2", "fd92::2"} {
		for seq := range uint16(3) {
			m, ok := c.askICMP(t, 5*time.Second, echoRequest(addr(dst), 64, false, 4711, seq, data))
			if !ok || m.kind != echoTypes(addr(dst).Is6())[1] || m.from != addr(dst) || m.ident != 4711 || m.seq != seq || !bytes.Equal(m.body, data) {
				t.Errorf("ping %s: %v, %+v", dst, ok, m)
			}
		}
	}
	// Fragments, both ways: the reply is too big for the tunnel as well.
	big := randomBytes(3000)
	whole := echoRequest(addr("10.9.2.2"), 64, false, 4712, 1, big)
	frags := fragments4(whole, 1200)
	reply := c.ask(within(t, patience), func(p []byte) bool { return p[0]>>4 == 4 && p[9] == 1 && p[6]&0x20 != 0 }, frags...)
	if reply == nil {
		t.Error("no fragments of a reply to a ping of 3,000 bytes")
	}
	// Nothing answers in the name of a target that does not.
	w.On(targetNS, func() { w.Sysctl("net/ipv4/icmp_echo_ignore_all", "1") })
	if m, ok := c.askICMP(t, 300*time.Millisecond, echoRequest(addr("10.9.2.2"), 64, false, 4713, 1, nil)); ok {
		t.Errorf("a target that ignores pings: %+v", m)
	}
	w.On(targetNS, func() { w.Sysctl("net/ipv4/icmp_echo_ignore_all", "0") })

	for _, x := range []struct {
		name       string
		packet     []byte
		from       string
		kind, code uint8
	}{
		{"first hop", echoRequest(addr("10.9.3.3"), 1, false, 4714, 1, nil), "10.66.0.2", 11, 0},
		{"second hop", echoRequest(addr("10.9.3.3"), 2, false, 4714, 2, nil), "10.9.2.2", 11, 0},
		{"second hop, UDP", udpPacket(netip.MustParseAddrPort("10.9.3.3:33435"), 2, false, []byte("probe")), "10.9.2.2", 11, 0},
		{"last hop, UDP", udpPacket(netip.MustParseAddrPort("10.9.2.2:33436"), 2, false, []byte("probe")), "10.9.2.2", 3, 3},
		{"last hop, UDP and IPv6", udpPacket(netip.MustParseAddrPort("[fd92::2]:33436"), 2, false, []byte("probe")), "fd92::2", 1, 4},
		{"nobody there", echoRequest(addr("10.9.2.99"), 64, false, 4715, 1, nil), "10.66.0.2", 3, 1},
		{"router's own address", echoRequest(addr("10.9.2.1"), 64, false, 4715, 1, nil), "10.66.0.2", 3, 13},
		{"not allowed", echoRequest(addr("10.9.1.1"), 64, false, 4715, 1, nil), "10.66.0.2", 3, 13},
	} {
		m, ok := c.askICMP(t, 8*time.Second, x.packet)
		if !ok || m.kind != x.kind || m.code != x.code || !sameDestination(m.body, x.packet) {
			t.Errorf("%s: %v, %+v, want type %d code %d", x.name, ok, m, x.kind, x.code)
		} else if x.kind != 3 || x.code != 1 { // who says so of an address without a host is for the host to say
			if m.from != addr(x.from) {
				t.Errorf("%s: from %v, want %s", x.name, m.from, x.from)
			}
		}
	}

	// A narrow network behind the router.
	for ns, name := range map[int]string{routerNS: "right", targetNS: "left"} {
		w.On(ns, func() {
			l, err := netlink.LinkByName(name)
			w.Check(err)
			w.Check(netlink.LinkSetMTU(l, 1280))
		})
	}
	for name, p := range map[string][]byte{
		"UDP":  udpPacket(netip.MustParseAddrPort("10.9.2.2:4444"), 64, true, make([]byte, 1330)),
		"ping": echoRequest(addr("10.9.2.2"), 64, true, 4716, 1, make([]byte, 1330)),
	} {
		if m, ok := c.askICMP(t, 5*time.Second, p); !ok || m.kind != 3 || m.code != 4 || m.mtu != 1280 {
			t.Errorf("%s that does not fit: %v, %+v", name, ok, m)
		}
	}
	// The same may be fragmented.
	if m, ok := c.askICMP(t, 5*time.Second, echoRequest(addr("10.9.2.2"), 64, false, 4717, 1, make([]byte, 1330))); !ok || m.kind != 0 || len(m.body) != 1330 {
		t.Errorf("a ping that may be fragmented: %v, type %d code %d", ok, m.kind, m.code)
	}
}

// TestRouterNoPing: without ping sockets and privileges the client is told, and so is the
// operator.
func TestRouterNoPing(t *testing.T) {
	w := newRouterNet(t)
	w.On(routerNS, func() { w.Sysctl("net/ipv4/ping_group_range", "1 0") })
	key := newKey(t)
	r := w.router(key.Public())
	var c *rawClient
	w.On(clientNS, func() {
		c = newRawClient(t, key, r.key, netip.MustParseAddrPort("10.9.1.1:5182"), "10.9.1.2:5182")
	})
	m, ok := c.askICMP(t, 5*time.Second, echoRequest(netip.MustParseAddr("10.9.2.2"), 64, false, 4711, 1, nil))
	if !ok || m.kind != 3 || m.code != 13 || m.from != netip.MustParseAddr("10.66.0.2") {
		t.Errorf("%v, %+v, want administratively prohibited from the router", ok, m)
	}
	s := r.status()
	if !strings.Contains(s.Echo4, "ping_group_range") || !strings.Contains(s.Echo6, "CAP_NET_RAW") || s.Refused[refusedNoEcho.Error()] != 1 {
		t.Errorf("%+v", s)
	}
}

// fragments4 cuts an IPv4 packet without options into pieces of size bytes at most.
func fragments4(p []byte, size int) (all [][]byte) {
	payload := p[20:]
	for at := 0; at < len(payload); {
		n := min((size-20)&^7, len(payload)-at)
		h := ipPacket(netip.AddrFrom4([4]byte(p[16:20])), 1, p[8], false, payload[at:at+n])
		word := at / 8
		if at+n < len(payload) {
			word |= 0x2000
		}
		h[6], h[7] = byte(word>>8), byte(word)
		h[10], h[11] = 0, 0
		sum := ^headerSum(h[:20])
		h[10], h[11] = byte(sum>>8), byte(sum)
		all = append(all, h)
		at += n
	}
	return all
}

func headerSum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// TestRouterPathMTU: the path between the nodes narrows while a connection through the
// router is open. The router's stack, which sends from the target's address, hears of
// it and goes on with smaller segments.
func TestRouterPathMTU(t *testing.T) {
	w := newRouterNet(t)
	key := newKey(t)
	r := w.router(key.Public())
	var a *Node
	var l net.Listener
	w.On(clientNS, func() {
		a = start(t, Config{
			PrivateKey: key, Addresses: prefixes("10.66.0.1/24", "fd66::1/64"),
			Listen: []netip.AddrPort{netip.MustParseAddrPort("10.9.1.1:5182")},
			Peers:  []Peer{{Name: "router", PublicKey: r.key, Endpoint: "10.9.1.2:5182", AllowedIPs: prefixes("0.0.0.0/0", "::/0")}},
		})
		w.Check(a.WaitEstablished(within(t, patience), r.key))
	})
	w.On(targetNS, func() {
		var err error
		l, err = net.Listen("tcp", ":80")
		w.Check(err)
	})
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for one := make([]byte, 1); ; {
					if _, err := c.Read(one); err != nil {
						return
					}
					c.Write(make([]byte, int(one[0])<<10))
				}
			}()
		}
	}()
	var conns []net.Conn
	for _, to := range []string{"10.9.2.2:80", "[fd92::2]:80"} {
		c, err := a.Dial(within(t, patience), "tcp", to)
		w.Check(err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		conns = append(conns, c)
	}
	fetch := func(kib byte) {
		for _, c := range conns {
			c.Write([]byte{kib})
			if n, err := io.CopyN(io.Discard, c, int64(kib)<<10); err != nil {
				t.Fatalf("%v: %d bytes, %v", c.RemoteAddr(), n, err)
			}
		}
	}
	fetch(255)
	// IPv6 needs 1,280 inside; 1,400 outside leave 1,334 or so.
	for ns, name := range map[int]string{clientNS: "right", routerNS: "left"} {
		w.On(ns, func() {
			l, err := netlink.LinkByName(name)
			w.Check(err)
			w.Check(netlink.LinkSetMTU(l, 1400))
		})
	}
	// Little, since the stack recovers what was under way a segment at a time.
	fetch(20)
}
