package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	tunFile  = "/dev/net/tun"
	needsCap = "it needs CAP_NET_ADMIN: run it as root, with AmbientCapabilities=CAP_NET_ADMIN in its unit, or after setcap cap_net_admin+ep"
)

var fsPermission = fs.ErrPermission

// Check finds out, before the interface is opened, why Apply or the opening would fail.
// c.Interface may have %d in it.
func Check(c Config) error {
	link, err := netlink.LinkByName(c.Interface)
	if err != nil {
		link = nil
	}
	if link != nil {
		t, isTUN := link.(*netlink.Tuntap)
		switch {
		case !isTUN || t.Mode != netlink.TUNTAP_MODE_TUN:
			return fmt.Errorf("interface %s is there already and is no TUN (%s): choose another name", c.Interface, link.Type())
		case t.NonPersist:
			return fmt.Errorf("interface %s is there already, of another program: choose another name", c.Interface)
		}
	}
	switch _, err := os.Stat(tunFile); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not there: load the module (modprobe tun), or give the container the device (--device %s)", tunFile, tunFile)
	case err != nil:
		return err
	}
	if link == nil && !capable() {
		return errors.New("an interface cannot be made: " + needsCap)
	}
	if c.Table != TableAuto {
		return nil
	}
	h, err := openHost("", 0)
	if err != nil {
		return err
	}
	defer h.close()
	for _, v6 := range []bool{false, true} {
		if !slices.ContainsFunc(c.prefixes(), func(p netip.Prefix) bool { return p.Addr().Is6() == v6 }) {
			continue
		}
		if v6 {
			if _, err := readSysctl("net/ipv6/conf/all/disable_ipv6"); err != nil {
				continue // without IPv6 there are no routes to rule
			}
		}
		if _, err := h.ruleList(v6); err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return nil
}

// capable tells whether the process has CAP_NET_ADMIN.
func capable() bool {
	b, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return true // the kernel will tell
	}
	_, rest, _ := strings.Cut(string(b), "\nCapEff:")
	line, _, _ := strings.Cut(rest, "\n")
	set, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
	return err != nil || set&(1<<unix.CAP_NET_ADMIN) != 0
}
