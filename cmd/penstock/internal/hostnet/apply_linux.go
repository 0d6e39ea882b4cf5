package hostnet

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenNone = 1

// State is a host that Apply has changed.
type State struct {
	host    *host
	journal *journal
	table   int // of the routes; 0: none

	close  sync.Once
	mu     sync.Mutex // guards SetMTU against Close
	closed bool
	err    error // of Close
}

// Apply changes the host for an interface that is there. An error in any step undoes the ones before.
// It is to be called, and so is Close, where the interface's network namespace is the current one.
func Apply(c Config) (*State, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Folder == "" {
		c.Folder = Folder(os.TempDir())
	}
	if err := os.MkdirAll(c.Folder, 0o755); err != nil {
		return nil, explained(err)
	}
	unlock, err := lockFolder(c.Folder)
	if err != nil {
		return nil, explained(err)
	}
	defer unlock()
	s, err := begin(&c)
	if err != nil {
		return nil, explained(err)
	}
	if err := s.all(&c); err != nil {
		return nil, explained(errors.Join(err, s.Close()))
	}
	c.Logger.Info("interface", "name", c.Interface, "addresses", c.Addresses, "table", s.table, "steps", len(s.journal.steps))
	return s, nil
}

// begin opens what a State is made of.
func begin(c *Config) (*State, error) {
	link, err := netlink.LinkByName(c.Interface)
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", c.Interface, err)
	}
	ns, err := thisNetNS()
	if err != nil {
		return nil, err
	}
	j, err := newJournal(c.Folder, c.Interface, ns)
	if err != nil {
		return nil, err
	}
	h, err := openHost(c.Interface, link.Attrs().Index)
	if err != nil {
		j.file.Close()
		return nil, err
	}
	s := &State{host: h, journal: j}
	if len(j.steps) > 0 { // Recover has not been called, or could not take them back
		h.close()
		j.file.Close()
		return nil, fmt.Errorf("%s has steps of a dead process that were not taken back", j.path)
	}
	j.owner = owner{PID: os.Getpid(), Owner: c.Owner, Interface: c.Interface, Index: h.index, NetNS: ns}
	err = errors.Join(j.file.Truncate(0), j.rewind(), j.line(j.owner))
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// testStep, in a test, can make a step fail that has been taken.
var testStep func(*step) error

// take writes a step down and takes it.
func (s *State) take(st step, do func() error) error {
	if err := s.journal.add(st); err != nil {
		return err
	}
	err := do()
	if testStep != nil {
		err = errors.Join(err, testStep(&st))
	}
	if errors.Is(err, syscall.EEXIST) {
		// Somebody else's, which Close must not remove.
		return errors.Join(fmt.Errorf("%v: %w", &st, err), s.journal.void())
	}
	if err != nil {
		return fmt.Errorf("%v: %w", &st, err)
	}
	return nil
}

func (s *State) all(c *Config) error {
	if err := s.link(c); err != nil {
		return err
	}
	if err := s.routes(c); err != nil {
		return err
	}
	return s.dns(&c.DNS, c.Logger)
}

// link gives the interface its addresses and MTU and sets it up.
func (s *State) link(c *Config) error {
	h := s.host
	link, err := h.nl.LinkByIndex(h.index)
	if err != nil {
		return err
	}
	wants6 := slices.ContainsFunc(c.Addresses, func(p netip.Prefix) bool { return p.Addr().Is6() })
	if wants6 {
		if err := enableIPv6(c.Interface); err != nil {
			return err
		}
	}
	if link.Attrs().Flags&unix.IFF_UP == 0 {
		// A link-local address would send router solicitations and multicast reports to the peers. It
		// does no harm otherwise, where this is refused.
		_ = h.nl.LinkSetIP6AddrGenMode(link, addrGenNone)
	}
	if mtu := link.Attrs().MTU; c.MTU != 0 && mtu != c.MTU {
		if err := s.take(step{MTU: mtu}, func() error { return h.nl.LinkSetMTU(link, c.MTU) }); err != nil {
			return err
		}
	}
	there, err := h.nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list the addresses: %w", err)
	}
	for _, p := range c.Addresses {
		if slices.ContainsFunc(there, func(a netlink.Addr) bool { return a.IPNet.String() == ipNet(p).String() }) {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if c.Table != TableNone {
			a.Flags |= unix.IFA_F_NOPREFIXROUTE // the network's route is ours to make, where the others are
		}
		if p.Addr().Is6() {
			a.Flags |= unix.IFA_F_NODAD // nobody could answer
		} else {
			a.Broadcast = []byte{0, 0, 0, 0} // none: there are no broadcasts here
		}
		if err := s.take(step{Address: &p}, func() error { return h.nl.AddrAdd(link, a) }); err != nil {
			return err
		}
	}
	if link.Attrs().Flags&unix.IFF_UP != 0 {
		return nil
	}
	return s.take(step{Up: true}, func() error { return h.nl.LinkSetUp(link) })
}

// enableIPv6 makes the interface take IPv6 addresses, which it does not where the machine's default is
// against it, as in many containers. It is forgotten with the interface.
func enableIPv6(name string) error {
	path := "net/ipv6/conf/" + name + "/disable_ipv6"
	v, err := readSysctl(path)
	if errors.Is(err, os.ErrNotExist) {
		return errors.New("this system has no IPv6, but the node has an IPv6 address")
	}
	if err == nil && v != "0" {
		err = writeSysctl(path, "0")
	}
	if err != nil {
		return fmt.Errorf("IPv6 is switched off for new interfaces and cannot be switched on for this one: %w", err)
	}
	return nil
}

// routes makes the routes and, for a table of our own, its rules.
func (s *State) routes(c *Config) error {
	prefixes := c.prefixes()
	if c.Table == TableNone || len(prefixes) == 0 {
		return nil
	}
	h := s.host
	prefixes = slices.DeleteFunc(prefixes, func(p netip.Prefix) bool {
		if p.Addr().Is4() {
			return false
		}
		v, err := readSysctl("net/ipv6/conf/" + c.Interface + "/disable_ipv6")
		off := err != nil || v != "0"
		if off {
			c.Logger.Warn("no route: IPv6 is off on the interface", "prefix", p)
		}
		return off
	})
	s.table = c.Table
	if c.Table == TableAuto {
		if c.FwMark == 0 {
			return errors.New("routes in a table of their own need a mark")
		}
		var err error
		if s.table, err = h.freeTable(); err != nil {
			return err
		}
		if err := s.looseReversePath(c); err != nil {
			return err
		}
	}
	for _, p := range prefixes {
		r := &route{To: p, Table: s.table, Source: c.source(p)}
		if err := s.take(step{Route: r}, func() error { return h.nl.RouteAdd(h.route(r)) }); err != nil {
			return err
		}
	}
	for _, p := range c.Exclude {
		r := &route{To: p.Masked(), Table: s.table, Throw: true}
		if err := s.take(step{Route: r}, func() error { return h.nl.RouteAdd(h.route(r)) }); err != nil {
			return err
		}
	}
	if c.Table != TableAuto {
		return nil
	}
	for _, r := range rules(s.table, c.FwMark, prefixes) {
		err := s.take(step{Rule: &r}, func() error {
			return h.changeRule(unix.RTM_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, &r)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// looseReversePath lets datagrams of the peers in where the interface's routes would have strict
// filtering drop them: the way back to a peer is by the mark, which what comes from it has not
// (src_valid_mark is of use only with a firewall that restores marks). The highest of the
// values for an interface and for all counts, and 2 is loose.
func (s *State) looseReversePath(c *Config) error {
	if !c.catchesEndpoint() {
		return nil
	}
	const all = "net/ipv4/conf/all/rp_filter"
	v, err := readSysctl(all)
	if err != nil {
		return err
	}
	strict := v == "1"
	links, err := s.host.nl.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("list the interfaces: %w", err)
	}
	for _, l := range links {
		its, err := readSysctl("net/ipv4/conf/" + l.Attrs().Name + "/rp_filter")
		strict = strict || err == nil && its == "1" && l.Attrs().Index != s.host.index
	}
	if !strict || v == "2" {
		return nil
	}
	err = s.take(step{Sysctl: &sysctl{Path: all, Old: v, New: "2"}}, func() error { return writeSysctl(all, "2") })
	if err != nil {
		return fmt.Errorf("%w (strict reverse path filtering would drop what the peers send)", err)
	}
	return nil
}

// SetMTU follows a change of the path.
func (s *State) SetMTU(mtu int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	link := s.host.link()
	if s.closed || link == nil {
		return os.ErrClosed
	}
	return explained(s.host.nl.LinkSetMTU(link, mtu))
}

// Table is the routing table that has the routes, 0 if there are none.
func (s *State) Table() int { return s.table }

// Close takes everything back, in reverse order. It goes on when a part fails and returns all
// errors; what is left is in the journal for the next Recover. A second Close returns the same.
func (s *State) Close() error {
	s.close.Do(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed = true
		s.err = s.journal.takeBack(s.host)
		s.host.close()
	})
	return s.err
}

// explained adds what a refusal means.
func explained(err error) error {
	if errors.Is(err, fsPermission) && !capable() && !strings.Contains(err.Error(), needsCap) {
		return fmt.Errorf("%w: %s", err, needsCap)
	}
	return err
}
