package netstack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// oracleNet is routerNet with a tunnel between router and target, and nothing else:
//
//	behind ── 10.9.1.0/24 ── a ── 10.9.2.0/24, tunnel 10.66.0.1 to .2 ── b
//
// What behind sends through a's interface has another origin than a, so its superpackets look
// different (hdr_len is what of them lies in one piece, not the headers). a has every offload; b
// has none, so that each packet is seen at b's interface by itself with its whole checksum. The
// devices towards the wire, and from a to behind, finish checksums and split in software,
// before a capture sees them: what the kernel makes of a's coalesced superpackets is seen
// at behind.
type oracleNet struct {
	*routerNet
	a, b *Node
}

const behindNS, aNS, bNS = clientNS, routerNS, targetNS

func newOracleNet(t *testing.T) *oracleNet {
	w := &oracleNet{routerNet: newRouterNet(t)}
	cfg := func(i int) Config {
		return Config{
			PrivateKey: newKey(t), Addresses: prefixes(fmt.Sprintf("10.66.0.%d/32", i), fmt.Sprintf("fd66::%d/128", i)),
			Listen: []netip.AddrPort{netip.MustParseAddrPort(fmt.Sprintf("10.9.2.%d:5182", i))}, TUN: &TUNConfig{Name: "vpn"},
		}
	}
	ca, cb := cfg(1), cfg(2)
	cb.TUN.NoGSO, cb.TUN.NoGRO = true, true
	ca.Peers = []Peer{{Name: "b", PublicKey: cb.PrivateKey.Public(), Endpoint: "10.9.2.2:5182", AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128")}}
	cb.Peers = []Peer{{Name: "a", PublicKey: ca.PrivateKey.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128", "10.9.1.0/24", "fd91::/64")}}
	node := func(ns int, c Config) (n *Node) {
		w.On(ns, func() {
			n = start(t, c)
			w.Up("vpn", c.Addresses[0].String(), c.Addresses[1].String())
			for _, p := range c.Peers[0].AllowedIPs {
				w.route(p.String(), "", "vpn")
			}
		})
		return n
	}
	w.b = node(bNS, cb)
	w.a = node(aNS, ca)
	w.Check(w.a.WaitEstablished(within(t, patience), w.b.PublicKey()))
	w.Check(w.b.WaitEstablished(within(t, patience), w.a.PublicKey()))
	w.On(behindNS, func() {
		w.route("10.66.0.2/32", "10.9.1.2", "right")
		w.route("fd66::2/128", "fd91::2", "right")
	})
	w.On(aNS, func() {
		w.Sysctl("net/ipv4/ip_forward", "1")
		w.Sysctl("net/ipv6/conf/all/forwarding", "1")
		w.plain("left")
		w.plain("right")
	})
	w.On(bNS, func() { w.plain("left") })
	return w
}

func (w *oracleNet) route(to, via, device string) {
	w.t.Helper()
	l, err := netlink.LinkByName(device)
	w.Check(err)
	_, dst, err := net.ParseCIDR(to)
	w.Check(err)
	r := &netlink.Route{Dst: dst, LinkIndex: l.Attrs().Index}
	if via != "" {
		r.Gw = net.ParseIP(via)
	}
	w.Check(netlink.RouteReplace(r))
}

// plain has the kernel finish checksums and split superpackets before it gives them to a device.
func (w *oracleNet) plain(device string) {
	w.t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	w.Check(err)
	defer unix.Close(fd)
	for _, knob := range []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO} {
		value := struct{ cmd, data uint32 }{knob, 0} // struct ethtool_value
		request := struct {                          // struct ifreq
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}{data: unsafe.Pointer(&value)}
		copy(request.name[:], device)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request))); errno != 0 {
			w.t.Fatalf("ethtool %#x of %s: %v", knob, device, errno)
		}
	}
}

// TestTUNOracle has tcpdump watch the wire, an interface and a network behind one while the
// kernel's TCP and UDP run through a tunnel, with superpackets and forwarded ones too; tshark finds nothing
// wrong in any packet.
func TestTUNOracle(t *testing.T) {
	w := newOracleNet(t)
	dir := t.TempDir()
	captures := []*capture{
		w.capture(dir, "wire", bNS, "left", "", "udp port 5182"),
		w.capture(dir, "interface", bNS, "vpn", "", ""),
		w.capture(dir, "behind", behindNS, "right", "in", "tcp or udp"),
	}
	from := map[int][2]string{behindNS: {"10.9.1.1", "fd91::1"}, aNS: {"10.66.0.1", "fd66::1"}}
	to := [2]string{"10.66.0.2", "fd66::2"}
	for ns, addrs := range from {
		for family, addr := range addrs {
			w.bulk(ns, bNS, to[family])
			w.bulk(bNS, ns, addr)
			w.runs(ns, bNS, to[family])
			w.runs(bNS, ns, addr)
		}
	}
	mtu := w.b.Status().MTU
	for _, c := range captures {
		c.stop()
	}
	captures[0].judge(1500, map[string]int{"udp": 10000}, "-d", "udp.port==5182,dtls")
	captures[1].judge(mtu, map[string]int{"tcp": 10000, "udp": 2000})
	captures[2].judge(mtu, map[string]int{"tcp": 2000, "udp": 500})

	// What was watched is what was meant: superpackets of TCP and UDP from and to the kernel.
	s := w.a.Status().TUN
	if !s.Capabilities.TSO.On || !s.Capabilities.GROTCP.On || s.Outbound.Superpackets < 100 || s.Inbound.Superpackets < 100 {
		t.Errorf("a's interface: %+v, out %+v, in %+v", s.Capabilities, s.Outbound, s.Inbound)
	}
	if got := w.b.Status().TUN; got.Outbound.Superpackets != 0 || got.Inbound.Superpackets != 0 {
		t.Errorf("b's interface has superpackets: %+v, %+v", got.Outbound, got.Inbound)
	}
}

const oracleBytes = 3 << 20

// bulk carries TCP data from one namespace to an address of another.
func (w *oracleNet) bulk(from, to int, addr string) {
	w.t.Helper()
	data := make([]byte, oracleBytes)
	rand.NewChaCha8([32]byte{byte(from), byte(to), addr[0]}).Read(data)
	var l net.Listener
	var c net.Conn
	var err error
	w.On(to, func() { l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")) })
	w.Check(err)
	defer l.Close()
	received := make(chan error, 1)
	go func() {
		received <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(patience))
			got, err := io.ReadAll(c)
			if err == nil && !bytes.Equal(got, data) {
				err = fmt.Errorf("%d bytes arrived, not those %d sent", len(got), len(data))
			}
			return err
		}()
	}()
	w.On(from, func() { c, err = net.DialTimeout("tcp", l.Addr().String(), patience) })
	w.Check(err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = c.Write(data)
	w.Check(err)
	w.Check(c.(*net.TCPConn).CloseWrite())
	if err := <-received; err != nil {
		w.t.Errorf("TCP to %s: %v", addr, err)
	}
}

// runs carries UDP in runs of one system call each (UDP_SEGMENT), with a shorter datagram at the
// end, from one namespace to an address of another. What is lost is sent again; all that
// arrives is as it was sent.
func (w *oracleNet) runs(from, to int, addr string) {
	w.t.Helper()
	const size, full, tail, sends = 1200, 18, 77, 24
	var in, out *net.UDPConn
	var err error
	w.On(to, func() {
		in, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 0)))
	})
	w.Check(err)
	defer in.Close()
	w.Check(in.SetReadBuffer(1 << 20))
	w.On(from, func() { out, err = net.DialUDP("udp", nil, in.LocalAddr().(*net.UDPAddr)) })
	w.Check(err)
	defer out.Close()
	raw, err := out.SyscallConn()
	w.Check(err)
	w.Check(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_SEGMENT, size) }))
	w.Check(err)
	run := make([]byte, full*size+tail)
	random := rand.NewChaCha8([32]byte{1})
	buf := make([]byte, 2*size)
	lost := 0
	for send := range uint32(sends) {
		random.Read(run)
		for i := range uint32(full + 1) {
			binary.BigEndian.PutUint32(run[i*size:], send)
			binary.BigEndian.PutUint32(run[i*size+4:], i)
		}
		_, err := out.Write(run)
		w.Check(err)
		for got := 0; got < full+1; {
			in.SetReadDeadline(time.Now().Add(time.Second))
			n, err := in.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				lost += full + 1 - got
				break
			}
			w.Check(err)
			if n < 8 || binary.BigEndian.Uint32(buf) != send {
				continue
			}
			at := int(binary.BigEndian.Uint32(buf[4:])) * size
			if want := run[min(at, len(run)):min(at+size, len(run))]; !bytes.Equal(buf[:n], want) {
				w.t.Fatalf("UDP to %s: a datagram of %d bytes is not the one sent, of %d", addr, n, len(want))
			}
			got++
		}
	}
	if lost > sends*(full+1)/10 {
		w.t.Errorf("UDP to %s: %d of %d datagrams are lost", addr, lost, sends*(full+1))
	}
}

// A capture is a tcpdump under way, then its file.
type capture struct {
	w    *oracleNet
	name string
	file string
	cmd  *exec.Cmd
	out  *lockedBuffer
}

// capture watches a device of namespace i: both ways, or one (tcpdump's -Q).
func (w *oracleNet) capture(dir, name string, i int, device, way, filter string) *capture {
	w.t.Helper()
	c := &capture{w: w, name: name, file: filepath.Join(dir, name+".pcap"), out: new(lockedBuffer)}
	args := []string{"-i", device, "-w", c.file, "-U", "-Z", "root", "-B", "32768", "-s", "0", "-n"}
	if way != "" {
		args = append(args, "-Q", way)
	}
	c.cmd = exec.Command(program(w.t, "tcpdump"), append(args, filter)...)
	c.cmd.Stdout, c.cmd.Stderr = c.out, c.out
	w.On(i, func() { w.Check(c.cmd.Start()) })
	w.t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			c.cmd.Process.Kill()
			c.cmd.Wait()
		}
	})
	for end := time.Now().Add(patience); !strings.Contains(c.out.String(), "listening on"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("tcpdump does not start: %s", c.out.String())
		}
	}
	return c
}

var droppedByKernel = regexp.MustCompile(`(\d+) packets? dropped by kernel`)

// stop ends the capture, with all that it has seen written.
func (c *capture) stop() {
	c.w.t.Helper()
	time.Sleep(100 * time.Millisecond) // the ring's last block
	c.w.Check(c.cmd.Process.Signal(syscall.SIGINT))
	c.w.Check(c.cmd.Wait())
	if m := droppedByKernel.FindStringSubmatch(c.out.String()); m == nil || m[1] != "0" {
		c.w.t.Logf("%s: the capture is not whole: %s", c.name, c.out.String())
	}
}

// judge has tshark look at every packet: none is malformed, has a wrong checksum or is larger than
// size bytes with its IP header. Of each protocol at least so many packets have a checksum that was
// verified and is good.
func (c *capture) judge(size int, atLeast map[string]int, args ...string) {
	t := c.w.t
	t.Helper()
	const statusBad, statusGood = "0", "1" // proto_checksum_enum_e
	fields := []string{"frame.number", "ip.len", "ipv6.plen", "_ws.malformed", "ip.checksum.status", "icmp.checksum.status",
		"icmpv6.checksum.status", "tcp.checksum.status", "udp.checksum.status", "tcp.checksum", "tcp.checksum_calculated",
		"_ws.col.Protocol", "_ws.col.Info"}
	largest, faults, good := 0, 0, map[string]int{}
	for _, line := range c.tshark(fields, args...) {
		f := strings.Split(line, "\t")
		if len(f) < len(fields) {
			t.Fatalf("%s: tshark prints %q", c.name, line)
		}
		var fault []string
		total, _ := strconv.Atoi(f[1])
		if payload, err := strconv.Atoi(f[2]); err == nil {
			total = 40 + payload
		}
		if largest = max(largest, total); total > size {
			fault = append(fault, fmt.Sprintf("%d bytes", total))
		}
		if f[3] != "" {
			fault = append(fault, "malformed")
		}
		for i, status := range f[4:9] {
			// Where the kernel finishes a checksum that comes to 0 it writes 0xFFFF for every protocol (skb_checksum_help,
			// CSUM_MANGLED_0). To one's complement they are the same number; tshark wants UDP alone to do so.
			mangled := fields[4+i] == "tcp.checksum.status" && f[9] == "0xffff" && f[10] == "0x0000"
			if status == statusBad && !mangled {
				fault = append(fault, fields[4+i])
			}
		}
		if f[5] == "" && f[6] == "" { // an ICMP error quotes another packet
			for i, p := range []string{"tcp", "udp"} {
				if f[7+i] == statusGood {
					good[p]++
				}
			}
		}
		if len(fault) > 0 {
			if faults++; faults <= 20 {
				t.Errorf("%s: %v: %s", c.name, fault, line)
			}
		}
	}
	for p, want := range atLeast {
		if good[p] < want {
			t.Errorf("%s: %d packets of %s with a checksum that tshark has verified, want %d", c.name, good[p], p, want)
		}
	}
	// The measure must be able to fail: full packets were seen.
	if largest < size-60 {
		t.Errorf("%s: the largest packet has %d bytes, the MTU is %d", c.name, largest, size)
	}
	t.Logf("%s: good checksums %v, largest packet %d, faults %d", c.name, good, largest, faults)
}

// tshark gives these fields of every packet, separated by tabs.
func (c *capture) tshark(fields []string, args ...string) []string {
	c.w.t.Helper()
	args = append([]string{"-r", c.file, "-n", "-T", "fields", "-E", "occurrence=f",
		"-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE",
		"-o", "tcp.desegment_tcp_streams:FALSE", "-o", "ip.defragment:FALSE"}, args...)
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.CommandContext(within(c.w.t, time.Minute), program(c.w.t, "tshark"), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		c.w.t.Fatalf("%s: tshark: %v\n%s", c.name, err, stderr.String())
	}
	return strings.Split(strings.TrimRight(string(out), "\n"), "\n")
}

// A lockedBuffer takes what a program prints while the test reads it.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
