package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A step is one change of the host with what it takes to undo it. Exactly one field is set.
//
// undo works on what it finds: the step may have been taken, or not, or been undone by somebody
// else already. It is no error when there is nothing to undo.
type step struct {
	Void bool `json:"void,omitempty"` // the step before was none

	Address    *netip.Prefix   `json:"address,omitempty"` // was added
	MTU        int             `json:"mtu,omitempty"`     // was this before
	Up         bool            `json:"up,omitempty"`      // the interface was set up
	Route      *route          `json:"route,omitempty"`
	Rule       *rule           `json:"rule,omitempty"`
	Sysctl     *sysctl         `json:"sysctl,omitempty"`
	Resolved   string          `json:"resolved,omitempty"` // resolvectl told systemd-resolved about the interface
	Resolvconf *resolvconfCall `json:"resolvconf,omitempty"`
	File       *resolvFile     `json:"file,omitempty"`
}

// A route through the interface, or one that ends the search in its table.
type route struct {
	To     netip.Prefix `json:"to"`
	Table  int          `json:"table"`
	Throw  bool         `json:"throw,omitempty"`
	Source netip.Addr   `json:"source,omitzero"`
}

// A sysctl is a file below /proc/sys.
type sysctl struct {
	Path string `json:"path"`
	Old  string `json:"old"`
	New  string `json:"new"`
}

func (s *step) String() string {
	switch {
	case s.Address != nil:
		return "address " + s.Address.String()
	case s.MTU != 0:
		return "MTU"
	case s.Up:
		return "interface up"
	case s.Route != nil:
		return s.Route.String()
	case s.Rule != nil:
		return s.Rule.String()
	case s.Sysctl != nil:
		return s.Sysctl.Path + " = " + s.Sysctl.New
	case s.Resolved != "":
		return "systemd-resolved"
	case s.Resolvconf != nil:
		return "resolvconf " + s.Resolvconf.Record
	case s.File != nil:
		return s.File.Path
	}
	return "nothing"
}

func (r *route) String() string {
	if r.Throw {
		return fmt.Sprintf("route throw %v table %d", r.To, r.Table)
	}
	return fmt.Sprintf("route %v table %d", r.To, r.Table)
}

func (r *rule) String() string {
	s := fmt.Sprintf("rule %d:", r.Priority)
	if r.NotMark != 0 {
		s += fmt.Sprintf(" not fwmark %#x", r.NotMark)
	}
	s += fmt.Sprintf(" lookup %d", r.Table)
	if r.Suppress >= 0 {
		s += fmt.Sprintf(" suppress_prefixlength %d", r.Suppress)
	}
	return s
}

func (s *step) undo(h *host) error {
	switch {
	case s.Rule != nil:
		return gone(h.changeRule(unix.RTM_DELRULE, 0, s.Rule))
	case s.Sysctl != nil:
		return s.Sysctl.undo()
	case s.Route != nil && s.Route.Throw:
		return gone(h.nl.RouteDel(h.route(s.Route)))
	case s.Resolved != "":
		return h.revertResolved(s.Resolved)
	case s.Resolvconf != nil:
		return s.Resolvconf.undo(h)
	case s.File != nil:
		return s.File.undo()
	case h.link() == nil:
		return nil // the rest went with the interface
	case s.Route != nil:
		return gone(h.nl.RouteDel(h.route(s.Route)))
	case s.Address != nil:
		return gone(h.nl.AddrDel(h.link(), &netlink.Addr{IPNet: ipNet(*s.Address)}))
	case s.MTU != 0:
		return gone(h.nl.LinkSetMTU(h.link(), s.MTU))
	case s.Up:
		return gone(h.nl.LinkSetDown(h.link()))
	}
	return nil
}

// gone makes it no error that there is nothing to remove.
func gone(err error) error {
	for _, nothing := range []error{syscall.ENOENT, syscall.ESRCH, syscall.EADDRNOTAVAIL, syscall.ENODEV} {
		if errors.Is(err, nothing) {
			return nil
		}
	}
	return err
}

func (h *host) route(r *route) *netlink.Route {
	n := &netlink.Route{Dst: ipNet(r.To), Table: r.Table, Protocol: unix.RTPROT_STATIC, Family: family(r.To.Addr().Is6())}
	switch {
	case r.Throw:
		n.Type = unix.RTN_THROW
	default:
		n.LinkIndex, n.Scope = h.index, netlink.SCOPE_LINK
		if r.To.Addr().Is6() {
			n.Scope = netlink.SCOPE_UNIVERSE // which is all that IPv6 has
		} else if r.Source.IsValid() {
			n.Src = r.Source.AsSlice()
		}
	}
	return n
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func family(v6 bool) int {
	if v6 {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

const sysctls = "/proc/sys/"

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctls, path))
	return strings.TrimSpace(string(b)), err
}

func writeSysctl(path, value string) error {
	return os.WriteFile(filepath.Join(sysctls, path), []byte(value), 0)
}

// undo leaves alone what somebody else has set since.
func (s *sysctl) undo() error {
	now, err := readSysctl(s.Path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now != s.New {
		return nil
	}
	if err != nil {
		return err
	}
	return writeSysctl(s.Path, s.Old)
}
