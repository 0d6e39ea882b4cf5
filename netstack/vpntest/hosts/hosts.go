//go:build linux

package hosts

import (
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Hosts are network namespaces, numbered from 0, that exist until the test ends. Each has a loopback interface.
type Hosts struct {
	t    testing.TB
	home netns.NsHandle
	ns   []netns.NsHandle
}

// New makes n hosts. The calling goroutine keeps its thread until the test ends.
func New(t testing.TB, n int) *Hosts {
	t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	h := &Hosts{t: t, home: home}
	t.Cleanup(h.close)
	for range n {
		ns, err := netns.New() // and the thread is in it
		if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
			t.Skipf("SKIPPED: no network namespace can be made here: %v", err)
		}
		h.Check(err)
		h.ns = append(h.ns, ns)
		h.Up("lo")
	}
	h.Check(netns.Set(home))
	return h
}

func (h *Hosts) close() {
	for _, ns := range h.ns {
		ns.Close()
	}
	if err := netns.Set(h.home); err != nil {
		return // the thread stays locked and dies with the goroutine
	}
	h.home.Close()
	runtime.UnlockOSThread()
}

// Check ends the test if err is one.
func (h *Hosts) Check(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// Enter puts the calling goroutine on a host until it calls leave. It is for goroutines that
// are not the test's; the test's own use On.
func (h *Hosts) Enter(host int) (leave func(), err error) {
	runtime.LockOSThread()
	if err := netns.Set(h.ns[host]); err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	return func() {
		if netns.Set(h.home) == nil {
			runtime.UnlockOSThread() // else the thread dies with the goroutine
		}
	}, nil
}

// On calls do on a host: the sockets that it makes and the processes that it starts stay there.
func (h *Hosts) On(host int, do func()) {
	h.t.Helper()
	leave, err := h.Enter(host)
	h.Check(err)
	defer leave()
	do()
}

// A Port is an end of a link: an interface of a host with its addresses and their prefix lengths, such as "10.9.1.1/24".
type Port struct {
	Host  int
	Name  string
	Addrs []string
}

// Join makes a link, a veth of MTU 1500. When it returns, both ends carry packets.
func (h *Hosts) Join(a, b Port) {
	h.t.Helper()
	h.On(a.Host, func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = a.Name
		h.Check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: b.Name, PeerNamespace: netlink.NsFd(h.ns[b.Host])}))
	})
	for _, p := range []Port{a, b} {
		h.On(p.Host, func() { h.Up(p.Name, p.Addrs...) })
	}
}

// Up sets an interface up, of the host on which the caller is, and gives it addresses. IPv6 addresses are used without detection of
// duplicates. Up waits until packets to them are taken: the kernel adds the local route of an IPv6 address later, in a work queue
// (addrconf_dad_work), but answers neighbours at once.
func (h *Hosts) Up(name string, addrs ...string) {
	h.t.Helper()
	link, err := netlink.LinkByName(name)
	h.Check(err)
	h.Check(netlink.LinkSetUp(link))
	for _, text := range addrs {
		addr, err := netlink.ParseAddr(text)
		h.Check(err)
		addr.Flags = unix.IFA_F_NODAD
		h.Check(netlink.AddrAdd(link, addr))
		h.awaitLocal(addr.IP)
	}
}

func (h *Hosts) awaitLocal(ip net.IP) {
	h.t.Helper()
	if v4 := ip.To4(); v4 != nil {
		ip = v4
	}
	bits := 8 * len(ip)
	local := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, local, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		h.Check(err)
		if len(routes) > 0 {
			return
		}
		if time.Now().After(end) {
			h.t.Fatalf("%v is never an address of this host", ip)
		}
	}
}

// Sysctl sets a value below /proc/sys, of the host on which the caller is.
func (h *Hosts) Sysctl(name, value string) {
	h.t.Helper()
	h.Check(os.WriteFile("/proc/sys/"+name, []byte(value), 0))
}
