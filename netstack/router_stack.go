package netstack

import (
	"fmt"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// newRouterStack makes a stack that takes every address for its own. The caller
// destroys it.
func newRouterStack(c *Config, link *routerLink) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			// Loopback targets are for the policy to refuse.
			ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: true}),
			ipv6.NewProtocolWithOptions(ipv6.Options{AllowExternalLoopbackTraffic: true}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, newUDPProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
	})
	fail := func(err error) (*stack.Stack, error) {
		s.Destroy()
		return nil, fmt.Errorf("netstack: router: %w", err)
	}
	if err := setOptions(s, c); err != nil {
		return fail(err)
	}
	if terr := s.CreateNICWithOptions(nicID, routerPort{link}, stack.NICOptions{Name: "router"}); terr != nil {
		return fail(fmt.Errorf("create interface: %s", terr))
	}
	// Every packet is for this stack, and it may send from every address.
	if terr := s.SetPromiscuousMode(nicID, true); terr != nil {
		return fail(fmt.Errorf("promiscuous: %s", terr))
	}
	if terr := s.SetSpoofing(nicID, true); terr != nil {
		return fail(fmt.Errorf("spoofing: %s", terr))
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return s, nil
}
