package tunwrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNetns runs f on a thread of its own in a new network namespace, which goes away with the
// thread. Without the privilege it skips the test, or fails it if PENSTOCK_REQUIRE_NETNS=1.
func inNetns(t *testing.T, f func()) {
	t.Helper()
	refuse := t.Skipf
	if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
		refuse = t.Fatalf
	}
	why := make(chan error)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread must not serve other goroutines afterwards.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			var fd int
			if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
				unix.Close(fd)
			}
		}
		why <- err
		if err == nil {
			f()
		}
	}()
	if err := <-why; err != nil {
		refuse("THE KERNEL IS NOT ASKED: a network namespace with a TUN needs root: %v", err)
	}
	<-done
}

// openTUN makes a TUN interface with addresses, up. flags are added to IFF_TUN|IFF_NO_PI.
func openTUN(t *testing.T, name string, flags uint16, offload int, addrs ...string) int {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	req, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal("TUNSETIFF", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload); err != nil {
		t.Fatal("TUNSETOFFLOAD", err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		p, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		p.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, p); err != nil {
			t.Fatal(a, err)
		}
	}
	// Room for the largest segment and for the most segments at once.
	if err := errors.Join(netlink.LinkSetMTU(link, 2000), netlink.LinkSetTxQLen(link, 2000)); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
	return fd
}

func sysctl(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// vnetBytes is struct virtio_net_hdr (linux/virtio_net.h) in the byte order of this machine.
func vnetBytes(g GSO) []byte {
	b := make([]byte, 10)
	if g.NeedsCsum {
		b[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	}
	b[1] = uint8(g.Type)
	binary.NativeEndian.PutUint16(b[2:], g.HdrLen)
	binary.NativeEndian.PutUint16(b[4:], g.GSOSize)
	binary.NativeEndian.PutUint16(b[6:], g.CsumStart)
	binary.NativeEndian.PutUint16(b[8:], g.CsumOffset)
	return b
}

// receive reads n packets to dst from the TUN, leaving out what the kernel says of its own accord
// (router solicitations, group membership).
func receive(fd int, dst netip.Addr, n int) (packets [][]byte, err error) {
	buf := make([]byte, 70000)
	for len(packets) < n {
		k, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((3 * time.Second).Milliseconds()))
			if err == nil && ready == 0 {
				return packets, fmt.Errorf("the kernel gives %d packets, want %d", len(packets), n)
			}
			continue
		}
		if err != nil {
			return packets, err
		}
		l, d := locate(buf[:k], k)
		if a := l.addresses(buf); d == DropNone && bytes.Equal(a[len(a)/2:], dst.AsSlice()) {
			packets = append(packets, bytes.Clone(buf[:k]))
		}
	}
	return packets, nil
}

// kernelCases are superpackets that a Linux router forwards without a change but the TTL.
func kernelCases() []segmentCase {
	padHop := []byte{6, 0, 1, 4, 0, 0, 0, 0}
	padChain := append([]byte{60, 0, 1, 4, 0, 0, 0, 0}, 6, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	var cs []segmentCase
	for _, c := range segmentCases() {
		s := &c.spec
		switch {
		case c.want == 1 && !s.udp && len(s.payload) == 0:
			continue // not a superpacket for the kernel
		case !s.v6 && len(s.ipExtra) == len(ip4Options):
			s.ipExtra = []byte{1, 1, 1, 1} // a record route would be filled in
		case s.v6 && !s.udp && len(s.ipExtra) == len(hopByHop):
			s.ipExtra = padHop // a router alert goes to the router
		case s.v6 && !s.udp && len(s.ipExtra) > 0:
			s.ipExtra = padChain
		}
		if s.ttl == 0 {
			s.ttl = 64
		}
		s.src = netip.MustParseAddr([]string{"10.1.0.2", "fd01::2"}[b2i(s.v6)])
		s.dst = netip.MustParseAddr([]string{"10.2.0.2", "fd02::2"}[b2i(s.v6)])
		cs = append(cs, c)
	}
	return cs
}

// The kernel is the oracle: a superpacket written to one TUN is forwarded to another that has no
// offload, so that the kernel must split it. Its segments must be ours, byte for byte.
func TestKernelSegments(t *testing.T) {
	inNetns(t, func() {
		in := openTUN(t, "in", unix.IFF_VNET_HDR, 0, "10.1.0.1/24", "fd01::1/64")
		out := openTUN(t, "out", 0, 0, "10.2.0.1/24", "fd02::1/64")
		sysctl(t, "ipv4/ip_forward", "1")
		sysctl(t, "ipv6/conf/all/forwarding", "1")
		for _, c := range kernelCases() {
			for _, ecn := range []bool{false, true} {
				if ecn && (c.spec.udp || c.spec.flags&cwr == 0) {
					continue
				}
				if err := askKernel(t, in, out, c, ecn); err != nil {
					t.Errorf("%s (ECN %v): %v", c.name, ecn, err)
				}
			}
		}
	})
}

func askKernel(t *testing.T, in, out int, c segmentCase, ecn bool) error {
	for err := error(nil); err == nil; { // what an earlier failure has left
		_, err = unix.Read(out, make([]byte, 70000))
	}
	s := c.spec
	g := s.gso(c.size)
	g.HdrLen, g.CsumStart = uint16(s.hdrLen()), uint16(s.l4Offset())
	if ecn {
		g.Type |= GSOECN
	}
	if c.want == 1 { // Linux takes a single segment only as a packet without GSO
		g.Type, g.GSOSize = GSONone, 0
	}
	if _, err := unix.Write(in, append(vnetBytes(g), s.partial()...)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	kernel, err := receive(out, s.dst, c.want)
	if err != nil {
		return err
	}
	s.ttl-- // it has been forwarded
	ours := split(t, s.partial(), s.gso(c.size), nil, nil)
	if err := differ(ours, kernel); err != nil {
		return fmt.Errorf("ours against the kernel's: %w", err)
	}
	if c.want == 1 {
		b := s.partial()
		g := s.gso(0)
		g.Type = GSONone
		if d := finish(b, &g, nil); d != DropNone || !bytes.Equal(b, kernel[0]) {
			return fmt.Errorf("finished: %v, %x", d, b)
		}
	}
	// And back: what the kernel has split, coalesced, is what it was given.
	if s.udp || s.flags&(fin|urg) != 0 || c.want == 1 || !s.v6 && len(s.ipExtra) > 0 {
		return nil
	}
	var co coalescer
	got := coalesced(t, &co, kernel)
	if len(got) != 1 || !bytes.Equal(got[0].b, s.partial()) {
		return fmt.Errorf("coalesced into %d packets, the first %x", len(got), got[0].b[:min(120, len(got[0].b))])
	}
	return nil
}
