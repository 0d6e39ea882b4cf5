package netstack

import (
	"net/netip"
	"syscall"
)

// reachable tells whether packets to a go anywhere: to the node itself or to a peer. If
// not, the error is what the system's stack would say.
func (n *Node) reachable(a netip.Addr) error {
	a = a.Unmap()
	switch {
	case !a.IsValid(), a.IsUnspecified(), a.IsMulticast():
		return syscall.ENETUNREACH
	case a.Is4() && !n.v4, a.Is6() && !n.v6:
		return syscall.ENETUNREACH
	case n.own[a], n.allowed.Load().Contains(a.WithZone("")):
		return nil
	}
	return syscall.ENETUNREACH
}
