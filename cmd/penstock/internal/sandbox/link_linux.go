package sandbox

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A link is the interface of the namespace.
type link struct{ netlink.Link }

func (l *link) setMTU(mtu int) error { return netlink.LinkSetMTU(l.Link, mtu) }

// makeLink makes the namespace's loopback and its interface, with addresses and routes. tun is the
// open file of it, which the caller takes.
func makeLink(c *Config) (l *link, tun int, f *failure) {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return nil, -1, failed("bringing the loopback up", err)
	}
	if tun, err = openTUN(); err != nil {
		return nil, -1, failed("opening the interface", err)
	}
	found, err := netlink.LinkByName(Interface)
	if err == nil {
		l = &link{found}
		err = l.configure(c)
	}
	if err != nil {
		unix.Close(tun)
		return nil, -1, failed("configuring the interface", err)
	}
	return l, tun, nil
}

func openTUN() (int, error) {
	fd, err := unix.Open(devTUN, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: devTUN, Err: err}
	}
	req, err := unix.NewIfreq(Interface)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (l *link) configure(c *Config) error {
	// No link-local address: there is no link to speak of, and nobody to solicit. A kernel without
	// IPv6 does not have the switch.
	_ = sysctl("net/ipv6/conf/"+Interface+"/addr_gen_mode", "1")
	_ = sysctl("net/ipv6/conf/"+Interface+"/disable_ipv6", "0") // as some hosts have it for new interfaces
	if c.MTU > 0 {
		if err := l.setMTU(c.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", c.MTU, err)
		}
	}
	for _, p := range c.Addresses {
		a := &netlink.Addr{IPNet: network(netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD // the tunnel has no neighbours to ask
		}
		if err := netlink.AddrAdd(l.Link, a); err != nil {
			return fmt.Errorf("address %v: %w", p.Addr(), err)
		}
	}
	if err := netlink.LinkSetUp(l.Link); err != nil {
		return err
	}
	for _, p := range ofFamilies(c.Routes, c.Addresses) {
		r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: network(p.Masked()), Scope: netlink.SCOPE_LINK}
		if p.Addr().Is6() {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("route %v: %w", p, err)
		}
	}
	return nil
}

func network(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// ofFamilies leaves the routes of the families that addresses have: for the others the kernel has
// no source.
func ofFamilies(routes, addresses []netip.Prefix) (out []netip.Prefix) {
	has := map[bool]bool{}
	for _, a := range addresses {
		has[a.Addr().Is4()] = true
	}
	for _, r := range routes {
		if has[r.Addr().Is4()] {
			out = append(out, r)
		}
	}
	return out
}
