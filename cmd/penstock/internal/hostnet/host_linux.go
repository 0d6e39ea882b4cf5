package hostnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// netlinkTimeout bounds one question to the kernel, which answers in microseconds.
const netlinkTimeout = 5 * time.Second

// A host is the network namespace that is changed, bound when it is opened, and the interface in it.
type host struct {
	nl    *netlink.Handle
	rules map[int]*nl.SocketHandle
	name  string
	index int // of the interface
}

func openHost(name string, index int) (*host, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
		h.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	s, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	wait := unix.NsecToTimeval(netlinkTimeout.Nanoseconds())
	if err := errors.Join(s.SetSendTimeout(&wait), s.SetReceiveTimeout(&wait)); err != nil {
		h.Close()
		s.Close()
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &host{nl: h, rules: map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}, name: name, index: index}, nil
}

func (h *host) close() {
	h.nl.Close()
	h.rules[unix.NETLINK_ROUTE].Close()
}

// link is the interface, nil when it is gone. One that merely has its name is another.
func (h *host) link() netlink.Link {
	l, err := h.nl.LinkByIndex(h.index)
	if err != nil || l.Attrs().Name != h.name {
		return nil
	}
	return l
}

// changeRule adds or deletes a rule. The library sends suppress_prefixlength for the tables below
// 256 only.
func (h *host) changeRule(what, flags int, r *rule) error {
	req := nl.NewNetlinkRequest(what, flags|unix.NLM_F_ACK)
	req.Sockets = h.rules
	msg := nl.NewRtMsg()
	msg.Family, msg.Table, msg.Type = uint8(family(r.V6)), unix.RT_TABLE_UNSPEC, nl.FR_ACT_TO_TBL
	req.AddData(msg)
	attr := func(kind int, v uint32) {
		req.AddData(nl.NewRtAttr(kind, binary.NativeEndian.AppendUint32(nil, v)))
	}
	attr(nl.FRA_PRIORITY, uint32(r.Priority))
	attr(nl.FRA_TABLE, uint32(r.Table))
	if r.NotMark != 0 {
		msg.Flags |= netlink.FibRuleInvert
		attr(nl.FRA_FWMARK, r.NotMark)
	}
	if r.Suppress >= 0 {
		attr(nl.FRA_SUPPRESS_PREFIXLEN, uint32(r.Suppress))
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// ruleList are the rules of a family.
func (h *host) ruleList(v6 bool) ([]netlink.Rule, error) {
	rs, err := h.nl.RuleList(family(v6))
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return nil, fmt.Errorf("%s: this kernel has no policy routing (CONFIG_IP_MULTIPLE_TABLES): "+
			`routes = "main" does without it, if no endpoint is within the routes`, familyName(v6))
	}
	return rs, err
}

func familyName(v6 bool) string {
	if v6 {
		return "IPv6"
	}
	return "IPv4"
}

// freeTable finds a table that nobody uses: no route, no rule.
func (h *host) freeTable() (int, error) {
	used := map[int]bool{}
	for _, v6 := range []bool{false, true} {
		rs, err := h.nl.RuleList(family(v6))
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			continue // a family without rules
		}
		for _, r := range rs {
			used[r.Table] = true
			if at := r.Priority - firstPriority; at >= 0 && at < 2*slots*129 {
				used[firstTable+at%slots] = true // the place among the rules is taken
			}
		}
		err = h.nl.RouteListFilteredIter(family(v6), &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			used[r.Table] = true
			return true
		})
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return 0, fmt.Errorf("list the routes of %s: %w", familyName(v6), err)
		}
	}
	for t := firstTable; t < firstTable+slots; t++ {
		if !used[t] {
			return t, nil
		}
	}
	return 0, fmt.Errorf("the routing tables %d to %d are all in use", firstTable, firstTable+slots-1)
}
