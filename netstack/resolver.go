package netstack

import (
	"context"
	"net"
	"sync/atomic"
)

// Resolver looks names up as Dial does: by the name servers of Config.DNS, through the
// VPN, or by Config.Resolver, or by the system. The servers take turns, so that the retry
// after a lost answer asks the next one. As everywhere in Go, the search domains and
// the hosts file of the machine apply.
func (n *Node) Resolver() *net.Resolver { return n.resolver }

func (n *Node) newResolver() *net.Resolver {
	switch {
	case n.cfg.Resolver != nil:
		return n.cfg.Resolver
	case len(n.cfg.DNS) == 0:
		return net.DefaultResolver
	}
	var turn atomic.Uint32
	return &net.Resolver{
		PreferGo: true, // the system's library would not ask our servers
		// The address that Go has found in the system's configuration is not wanted.
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			server := n.cfg.DNS[int(turn.Add(1)-1)%len(n.cfg.DNS)]
			return n.Dial(ctx, network, server.String())
		},
	}
}
