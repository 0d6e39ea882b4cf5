package tunwrap

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// pair is two TUNs in namespaces of their own with a wire between them.
func pair(t *testing.T, o TUNOptions) (one, two *namespace, a, b *TUN, end func() error) {
	t.Helper()
	o.Name, o.MTU = "pen0", 1400
	one, two = newNamespace(t), newNamespace(t)
	a = one.openTUN(t, o, "10.9.0.1/24", "fd09::1/64")
	b = two.openTUN(t, o, "10.9.0.2/24", "fd09::2/64")
	return one, two, a, b, (&wire{mtu: o.MTU}).join(a, b)
}

// setsockopt sets an option of a connection.
func setsockopt(c syscall.Conn, level, name, value int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	if err := raw.Control(func(fd uintptr) { optErr = unix.SetsockoptInt(int(fd), level, name, value) }); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", optErr)
}

func getsockopt(c syscall.Conn, level, name int) (value int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) { value, optErr = unix.GetsockoptInt(int(fd), level, name) })
	return value, errors.Join(err, optErr)
}

// A socket that sends with UDP_SEGMENT and one that receives with UDP_GRO, and one without: the datagrams arrive
// as they were sent, and stayed together on the way.
func TestTUNCarriesUDPSuperpackets(t *testing.T) {
	for _, c := range []struct {
		name string
		o    TUNOptions
	}{{"all", TUNOptions{}}, {"no GSO", TUNOptions{NoGSO: true}}, {"no GRO", TUNOptions{NoGRO: true}}} {
		t.Run(c.name, func(t *testing.T) {
			leavesNothing(t)
			one, two, a, b, end := pair(t, c.o)
			uso, gro := a.Capabilities().USO.On, b.Capabilities().GROUDP.On
			if (uso || gro) && c.name == "all" && !(uso && gro) {
				t.Errorf("%+v", a.Capabilities())
			}
			for _, addr := range []string{"10.9.0.2", "fd09::2"} {
				for _, receiveGRO := range []bool{false, true} {
					if err := sendDatagrams(one, two, addr, receiveGRO, gro && receiveGRO); err != nil {
						t.Errorf("to %s, UDP_GRO %v: %v", addr, receiveGRO, err)
					}
				}
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			if d := a.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
			out, in := a.Stats().Outbound, b.Stats().Inbound
			if uso != (out.Superpackets >= 40) || gro != (in.Superpackets >= 40) {
				t.Errorf("USO %v: %+v, GRO %v: %+v", uso, out, gro, in)
			}
		})
	}
}

// sendDatagrams sends ten bursts of 20 datagrams of 1200 bytes and one of 77.
func sendDatagrams(from, to *namespace, addr string, receiveGRO, together bool) error {
	const size, full, last, bursts = 1200, 20, 77, 10
	var l *net.UDPConn
	err := to.do(func() (err error) {
		l, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)})
		if err == nil && receiveGRO {
			err = setsockopt(l, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
		}
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	var c *net.UDPConn
	err = from.do(func() (err error) {
		c, err = net.DialUDP("udp", nil, l.LocalAddr().(*net.UDPAddr))
		if err == nil {
			err = setsockopt(c, unix.IPPROTO_UDP, unix.UDP_SEGMENT, size)
		}
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	// The kernel makes the routes of an IPv6 address some time after the address.
	buf := make([]byte, 70000)
	for range 50 {
		c.Write([]byte{0})
		l.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		if _, err := l.Read(buf); err == nil {
			break
		}
	}
	l.SetReadDeadline(time.Now().Add(5 * time.Second))
	reads := 0
	for i := range bursts {
		data := payload(full*size + last)
		data[0] = byte(i)
		if _, err := c.Write(data); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		for rest := data; len(rest) > 0; {
			n, err := l.Read(buf)
			if err != nil {
				return fmt.Errorf("%d bytes of burst %d are missing: %w", len(rest), i, err)
			}
			if n == 1 {
				continue // a late one of those above
			}
			if n > len(rest) || !bytes.Equal(buf[:n], rest[:n]) || !receiveGRO && n != min(size, len(rest)) {
				return fmt.Errorf("burst %d: %d bytes that are not the next ones", i, n)
			}
			rest = rest[n:]
			reads++
		}
	}
	if together && reads != bursts {
		return fmt.Errorf("%d reads for %d bursts", reads, bursts)
	}
	return nil
}

// Superpackets that the kernel forwards, so that hdr_len is not the length of the headers, are split like
// those it makes.
func TestTUNReadsForwarded(t *testing.T) {
	leavesNothing(t)
	ns := newNamespace(t)
	in := ns.openTUN(t, TUNOptions{Name: "in", MTU: 2000}, "10.1.0.1/24", "fd01::1/64")
	out := ns.openTUN(t, TUNOptions{Name: "out", MTU: 2000}, "10.2.0.1/24", "fd02::1/64")
	ns.must(t, func() error {
		sysctl(t, "ipv4/ip_forward", "1")
		sysctl(t, "ipv6/conf/all/forwarding", "1")
		return nil
	})
	wrong, ecns, usos := 0, 0, 0
	bufs, sizes := buffers(128, 2000+headroom)
	for _, c := range kernelCases() {
		s := c.spec
		if c.want == 1 || s.udp && !out.Capabilities().USO.On {
			continue
		}
		if s.udp && c.want > maxUDPMembers {
			continue
		}
		for _, more := range []int{0, 100, 700} {
			for _, ecn := range []bool{false, true} {
				if ecn && (s.udp || s.flags&cwr == 0) {
					continue
				}
				g := s.gso(c.size)
				g.HdrLen, g.CsumStart = uint16(min(s.hdrLen()+more, s.hdrLen()+len(s.payload))), uint16(s.l4Offset())
				if ecn {
					g.Type |= GSOECN
				}
				var err error
				in.queues[0].raw.Control(func(fd uintptr) {
					_, err = unix.Write(int(fd), append(vnetBytes(g), s.partial()...))
				})
				if err != nil {
					t.Fatalf("%s: %v", c.name, err)
				}
				want := s
				want.ttl--
				var got [][]byte
				watchdog := time.AfterFunc(5*time.Second, func() { out.Close() })
				for len(got) < c.want {
					n, err := out.Read(bufs, sizes, headroom)
					if err != nil {
						t.Fatalf("%s: %d of %d segments: %v", c.name, len(got), c.want, err)
					}
					for i := range n {
						b := bufs[i][headroom : headroom+sizes[i]]
						if l, d := locate(b, len(b)); d == DropNone && bytes.HasSuffix(l.addresses(b), s.dst.AsSlice()) {
							got = append(got, bytes.Clone(b))
						}
					}
				}
				watchdog.Stop()
				h := out.readers[0].header.get()
				wrong += b2i(int(h.HdrLen) != s.hdrLen() && h.Type != GSONone)
				ecns += b2i(h.Type&GSOECN != 0)
				usos += b2i(h.Type == GSOUDPL4)
				if err := differ(got, want.plainSegments(c.size)); err != nil {
					t.Errorf("%s, %d more in hdr_len, ECN %v: %v", c.name, more, ecn, err)
				}
			}
		}
	}
	if wrong < 20 || ecns == 0 || out.Capabilities().USO.On && usos == 0 {
		t.Errorf("%d superpackets with a wrong hdr_len, %d with ECN, %d of UDP: the test tests nothing", wrong, ecns, usos)
	}
	if d := out.Drops(); d.Total() != 0 {
		t.Errorf("drops %v", d)
	}
}

// ethtool switches an offload of an interface.
func ethtool(name string, command, value uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	arg := struct{ cmd, data uint32 }{command, value}
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:], name)
	req.data = unsafe.Pointer(&arg)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return fmt.Errorf("ethtool %s %#x: %w", name, command, errno)
	}
	return nil
}

// The host of the TUN is a router: packets come from another interface, where they were coalesced by
// the kernel, and superpackets of ours leave through it.
func TestTUNRoutes(t *testing.T) {
	leavesNothing(t)
	client := newNamespace(t)
	router, server, a, b, end := pair(t, TUNOptions{})
	tid := 0
	router.must(t, func() error { tid = unix.Gettid(); return nil })
	client.must(t, func() error {
		veth := netlink.NewVeth(netlink.NewLinkAttrs())
		veth.Name, veth.PeerName, veth.PeerNamespace = "c0", "r0", netlink.NsPid(tid)
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		// It sends packets of the MTU, which the router's side puts together.
		if err := errors.Join(ethtool("c0", unix.ETHTOOL_STSO, 0), ethtool("c0", unix.ETHTOOL_SGSO, 0)); err != nil {
			return err
		}
		return setUp("c0", "10.8.0.1/24", "fd08::1/64")
	})
	router.must(t, func() error {
		sysctl(t, "ipv4/ip_forward", "1")
		sysctl(t, "ipv6/conf/all/forwarding", "1")
		return errors.Join(ethtool("r0", unix.ETHTOOL_SGRO, 1), setUp("r0", "10.8.0.2/24", "fd08::2/64"))
	})
	client.must(t, func() error {
		return errors.Join(addRoute("c0", "10.9.0.0/24", "10.8.0.2"), addRoute("c0", "fd09::/64", "fd08::2"))
	})
	server.must(t, func() error {
		return errors.Join(addRoute("pen0", "10.8.0.0/24", ""), addRoute("pen0", "fd08::/64", ""))
	})
	for _, addrs := range [][2]string{{"10.8.0.1", "10.9.0.2"}, {"fd08::1", "fd09::2"}} {
		if err := sendOver(client, server, addrs[1], 4<<20); err != nil {
			t.Error("to", addrs[1], err)
		}
		if err := sendOver(server, client, addrs[0], 4<<20); err != nil {
			t.Error("to", addrs[0], err)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	out, in := a.Stats().Outbound, a.Stats().Inbound
	if out.Superpackets < 20 || in.Superpackets < 20 || b.Stats().Outbound.Superpackets < 20 {
		t.Errorf("%+v %+v", out, in)
	}
	if d := a.Drops(); d.Total() != 0 {
		t.Errorf("drops %v", d)
	}
}

func addRoute(dev, to, via string) error {
	link, err := netlink.LinkByName(dev)
	if err != nil {
		return err
	}
	dst, err := netlink.ParseIPNet(to)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: net.ParseIP(via)})
}

// A program whose packet does not fit the path is told, or its packet arrives in fragments.
func TestTUNTooBig(t *testing.T) {
	leavesNothing(t)
	const path = 1300
	one, two := newNamespace(t), newNamespace(t)
	a := one.openTUN(t, TUNOptions{Name: "pen0", MTU: 1400}, "10.9.0.1/24", "fd09::1/64")
	b := two.openTUN(t, TUNOptions{Name: "pen0", MTU: 1400}, "10.9.0.2/24", "fd09::2/64")
	w := &wire{mtu: 1400}
	w.check = func(p []byte) error {
		if len(p) > path {
			a.TooBig(p, path)
			return errTooBig
		}
		return nil // fragments, which the oracle does not take
	}
	end := w.join(a, b)
	for i, addr := range []string{"10.9.0.2", "fd09::2"} {
		var l, c *net.UDPConn
		two.must(t, func() (err error) { l, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(addr)}); return err })
		one.must(t, func() (err error) { c, err = net.DialUDP("udp", nil, l.LocalAddr().(*net.UDPAddr)); return err })
		defer l.Close()
		defer c.Close()
		l.SetReadDeadline(time.Now().Add(5 * time.Second))
		level, name := []int{unix.IPPROTO_IP, unix.IPPROTO_IPV6}[i], []int{unix.IP_MTU, unix.IPV6_MTU}[i]
		data := payload(1350)
		if _, err := c.Write(data); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			mtu, err := getsockopt(c, level, name)
			if err == nil && mtu == path {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("the kernel thinks the path to %s carries %d bytes (%v), want %d", addr, mtu, err, path)
			}
		}
		// Now the kernel fragments by itself. The first write reports the error of before.
		if _, err := c.Write(data); err != nil {
			_, err = c.Write(data)
			if err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 2000)
		if n, err := l.Read(buf); err != nil || !bytes.Equal(buf[:n], data) {
			t.Errorf("%s: %d bytes, %v", addr, n, err)
		}
		if i == 1 {
			continue
		}
		// Without DF it is ours to fragment.
		if err := setsockopt(c, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_INTERFACE); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(data); err != nil {
			t.Fatal(err)
		}
		if n, err := l.Read(buf); err != nil || !bytes.Equal(buf[:n], data) {
			t.Errorf("fragments: %d bytes, %v", n, err)
		}
		if s := a.Stats(); s.Fragments != 2 {
			t.Errorf("%+v", s)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	// NAT is undone in what the kernel is told: its own address is quoted.
	if s := a.Stats(); s.TooBig != 2 {
		t.Errorf("%+v", s)
	}
}

// NAT in both directions, with superpackets whole.
func TestTUNTranslates(t *testing.T) {
	leavesNothing(t)
	one, two := newNamespace(t), newNamespace(t)
	a := one.openTUN(t, TUNOptions{Name: "pen0", MTU: 1400}, "10.9.0.1/24", "fd09::1/64")
	b := two.openTUN(t, TUNOptions{Name: "pen0", MTU: 1400}, "10.9.0.2/24", "fd09::2/64")
	two.must(t, func() error {
		return errors.Join(addRoute("pen0", "172.31.0.0/24", ""), addRoute("pen0", "2001:db8:5::/64", ""))
	})
	if err := a.SetNAT([]NATRule{rule("10.9.0.1", "172.31.0.7", "10.9.0.0/24"), rule("fd09::1", "2001:db8:5::7", "fd09::/64")}); err != nil {
		t.Fatal(err)
	}
	outside := []netip.Addr{netip.MustParseAddr("172.31.0.7"), netip.MustParseAddr("2001:db8:5::7")}
	w := &wire{mtu: 1400}
	w.check = func(p []byte) error {
		l, _ := locate(p, len(p))
		for _, o := range outside {
			if bytes.Contains(l.addresses(p), o.AsSlice()) {
				return valid(p)
			}
		}
		if l.proto == protoTCP {
			return errors.New("not translated")
		}
		return nil
	}
	end := w.join(a, b)
	for _, addr := range []string{"10.9.0.2", "fd09::2"} {
		if err := sendOver(one, two, addr, 2<<20); err != nil {
			t.Error(err)
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	if a.Stats().Outbound.Superpackets < 20 || b.Stats().Inbound.Superpackets < 20 {
		t.Errorf("%+v %+v", a.Stats(), b.Stats())
	}
	if err := a.SetNAT([]NATRule{{Peer: []netip.Prefix{{}}}}); !errors.Is(err, ErrNATRule) {
		t.Error(err)
	}
}

// The filter sees superpackets whole, in both directions.
func TestTUNFilters(t *testing.T) {
	leavesNothing(t)
	one, two, a, _, end := pair(t, TUNOptions{})
	ports := []PortRange{{First: 1, Last: 65535}}
	f, err := NewFilter(FilterOptions{Rules: []FilterRule{{Protocol: "tcp", Direction: Outbound, Ports: ports}}})
	if err != nil {
		t.Fatal(err)
	}
	a.SetFilter(f)
	if err := sendOver(one, two, "10.9.0.2", 2<<20); err != nil {
		t.Error(err)
	}
	if a.Stats().Outbound.Superpackets < 10 {
		t.Errorf("%+v", a.Stats())
	}
	// The other way a connection may not begin.
	var l net.Listener
	one.must(t, func() (err error) { l, err = net.Listen("tcp", "10.9.0.1:0"); return err })
	defer l.Close()
	before := a.Drops()[DropFilter]
	err = two.do(func() error {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil || a.Drops()[DropFilter] == before {
		t.Error("it passed:", err, a.Drops())
	}
	// Nor does anything but TCP leave.
	before = a.Drops()[DropFilter]
	one.must(t, func() error {
		c, err := net.Dial("udp", "10.9.0.2:9")
		if err == nil {
			_, err = c.Write(payload(9))
			c.Close()
		}
		return err
	})
	for i := 0; a.Drops()[DropFilter] == before; i++ {
		if i > 500 {
			t.Fatal("UDP has passed")
		}
		time.Sleep(10 * time.Millisecond)
	}
	a.SetFilter(nil)
	if err := sendOver(two, one, "10.9.0.1", 1<<20); err != nil {
		t.Error(err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}
}
