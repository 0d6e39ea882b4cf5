package netstack

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/penstock-vpn/penstock/transport"
)

// AddSession makes the far end of an OpenConnect session a member of the VPN: packets to its AllowedIPs go
// to it, and the router serves it as it serves a peer. It goes when it has ended; see
// [transport.SessionEvents].Closed. Rules of Config.ACL can name its group. It takes cfg.Link.Stream, also when it fails. It is not in the way of static
// peers, but their prefixes must differ.
func (n *Node) AddSession(cfg transport.SessionConfig, group string) (*transport.Session, error) {
	m := &member{name: cfg.Name, group: group, allowed: slices.Clone(cfg.AllowedIPs)}
	closed := cfg.Events.Closed
	entered := make(chan struct{}) // closed when the session may be forgotten
	cfg.Events.Closed = func(reason error) {
		<-entered
		n.leave(m)
		if closed != nil {
			closed(reason)
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	defer close(entered)
	if n.isClosed() {
		if cfg.Link.Stream != nil {
			cfg.Link.Stream.Close()
		}
		return nil, net.ErrClosed
	}
	// First, so that no packet of its comes before the router knows it.
	n.enterLocked(m)
	s, err := n.transport.AddSession(cfg)
	if err != nil {
		n.leaveLocked(m)
		n.applyAllowed() // it stood in the place of whoever has its prefixes
		return nil, fmt.Errorf("netstack: %w", err)
	}
	return s, nil
}

// A member is a session as node and router know it.
type member struct {
	name    string
	group   string // for the packet filter
	allowed []netip.Prefix
	routed  *routerPeer // nil without a router
}

func (n *Node) leave(m *member) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leaveLocked(m)
}

func (n *Node) enterLocked(m *member) {
	t := n.allowed.Load()
	for _, p := range m.allowed {
		t = t.InsertPersist(p.Masked())
	}
	n.allowed.Store(t)
	if n.router != nil {
		m.routed = n.router.enterMember(m.name, m.allowed)
	}
	n.members[m] = struct{}{}
	n.followMembers()
}

// heldLocked tells whether a member has p. A session that has ended is told of later than its addresses are free in the
// transport, when another may have them: the next of the same client, with another MTU.
func (n *Node) heldLocked(p netip.Prefix) bool {
	for m := range n.members {
		if slices.Contains(m.allowed, p) {
			return true
		}
	}
	return false
}

func (n *Node) leaveLocked(m *member) {
	if _, known := n.members[m]; !known {
		return
	}
	delete(n.members, m)
	n.followMembers()
	t := n.allowed.Load()
	for _, p := range m.allowed {
		if !n.heldLocked(p) {
			t = t.DeletePersist(p.Masked())
		}
	}
	n.allowed.Store(t)
	if n.router != nil {
		n.router.leaveMember(m.routed)
	}
}
