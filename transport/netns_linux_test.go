package transport

import (
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A vethPair is two network namespaces joined by a veth pair. A socket belongs to the
// namespace of the thread that makes it, and stays there.
type vethPair struct {
	t    *testing.T
	home netns.NsHandle
	ends [2]vethEnd
}

// vethEnd 0 has 10.9.9.1/24, fd99::1/64 and fe80::1/64 on v0; end 1 has ::2 on v1.
type vethEnd struct {
	ns            netns.NsHandle
	link          netlink.Link
	v4, v6, local netip.Addr // local is the link-local one, with its zone
}

// newVethPair skips the test where namespaces cannot be made, unless
// PENSTOCK_REQUIRE_NETNS=1 says that this is a failure.
func newVethPair(t *testing.T) *vethPair {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	w := &vethPair{t: t, home: home}
	for i := range w.ends {
		w.ends[i].ns = netns.None()
	}
	t.Cleanup(w.close)
	for i := range w.ends {
		ns, err := netns.New()
		if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
			t.Skipf("SKIPPED: no network namespace can be made here: %v", err)
		}
		w.check(err)
		w.ends[i].ns = ns
	}
	// The thread is in the namespace of end 1 now.
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "v1"
	w.check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "v0", PeerNamespace: netlink.NsFd(w.ends[0].ns)}))
	for i, name := range []string{"v0", "v1"} {
		w.in(i, func() {
			end := &w.ends[i]
			w.up("lo")
			end.link = w.up(name)
			host := byte(i + 1)
			end.v4 = w.address(end.link, netip.AddrFrom4([4]byte{10, 9, 9, host}), 24)
			end.v6 = w.address(end.link, netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 15: host}), 64)
			end.local = w.address(end.link, netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: host}), 64).WithZone(name)
		})
	}
	return w
}

func (w *vethPair) close() {
	for _, end := range w.ends {
		if end.ns.IsOpen() {
			end.ns.Close()
		}
	}
	if err := netns.Set(w.home); err != nil {
		return // the thread stays locked and dies with the goroutine
	}
	w.home.Close()
	runtime.UnlockOSThread()
}

func (w *vethPair) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// in runs f in the namespace of an end.
func (w *vethPair) in(end int, f func()) {
	w.t.Helper()
	runtime.LockOSThread() // subtests have threads of their own
	w.check(netns.Set(w.ends[end].ns))
	defer func() {
		w.check(netns.Set(w.home)) // fails: the thread stays locked and dies with the goroutine
		runtime.UnlockOSThread()
	}()
	f()
}

func (w *vethPair) listen(end int, addr string, opts SocketOptions) (s *UDPSocket) {
	w.t.Helper()
	w.in(end, func() { s = testSocket(w.t, addr, opts) })
	return s
}

func (w *vethPair) up(name string) netlink.Link {
	w.t.Helper()
	link, err := netlink.LinkByName(name)
	w.check(err)
	w.check(netlink.LinkSetUp(link))
	return link
}

// address adds an address without duplicate detection, and waits until packets to it are taken: for IPv6 the kernel
// adds the local route later, in a work queue (addrconf_dad_work), but answers neighbours at once.
func (w *vethPair) address(link netlink.Link, a netip.Addr, bits int) netip.Addr {
	w.t.Helper()
	n := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
	w.check(netlink.AddrAdd(link, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}))
	local := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: hostRoute(a)}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, local, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		w.check(err)
		if len(routes) > 0 {
			return a
		}
		if time.Now().After(end) {
			w.t.Fatalf("%v is never there", a)
		}
	}
}
