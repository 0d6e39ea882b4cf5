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

	"github.com/penstock-vpn/penstock/linkep"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// nicID is the stack's only interface.
const nicID tcpip.NICID = 1

// DefaultQueueBytes bounds the outbound queue; see [Config.QueueBytes].
const DefaultQueueBytes = linkep.DefaultQueueBytes

// Buffers, in bytes. The stack tunes TCP's from the default to the maximum.
var (
	// A receive buffer of 6 MiB, Linux's maximum for long (tcp_rmem), is a window of half that,
	// as the stack keeps the other half for overhead: 1 Gbit/s at 25 ms, 250 Mbit/s at 100
	// ms; gVisor's own maximum is 4 MiB. More is for paths that need it: eight flows with
	// windows of 8 MiB overran the 8 MiB of the receiving UDP socket and spent a third
	// more processor time on what was lost (measured).
	defaultTCPReceive = BufferSizes{Default: 1 << 20, Max: 6 << 20}
	// The send buffer is tuned to twice the congestion window.
	defaultTCPSend = BufferSizes{Default: 1 << 20, Max: 6 << 20}
	// gVisor's 32 KiB for UDP are 27 datagrams of 1,200 bytes: less than one coalesced
	// receive of the tunnel, so every burst would lose some.
	defaultUDPReceive = BufferSizes{Default: 2 << 20, Max: maxBuffer}
	// A sender waits when its buffer is queued to the tunnel: enough for several batches.
	defaultUDPSend = BufferSizes{Default: 512 << 10, Max: maxBuffer}
)

const (
	// gsoReserve is what the stack keeps free of GSOMaxSize: it makes superpackets with
	// that much less payload (sender.sendData, gVisor 20260905).
	gsoReserve = header.TCPTotalHeaderMaximumSize + 1
	// fullHeaders are IPv6, TCP and its timestamps: what a full packet has least payload with.
	fullHeaders = header.IPv6MinimumSize + header.TCPMinimumSize + 12
)

// superpacketSize is the GSOMaxSize at which a superpacket becomes one run of the
// transport and not a little more: 45 records at MTU 1400. At 64 KiB it would be 45 and 4, and
// cost a tenth more processor time (medians of 7 alternating runs on a loaded machine,
// 1.87 to 2.05 cpu-s/GB, November 2026).
func superpacketSize(mtu int) uint32 {
	return uint32(transport.RunPackets(mtu)*(mtu-fullHeaders) + gsoReserve)
}

// batchPackets is how many packets the transport is given at a time: two runs, so that one
// system call sends what the queue hands out at once, and no third is begun in vain.
func batchPackets(mtu int) int { return 2 * transport.RunPackets(mtu) }

// newStack makes the stack of c on link. The caller destroys it.
func newStack(c *Config, link *linkep.Endpoint) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			// Without options IPv6 neither probes for duplicates of an address, which would
			// keep it unusable for a second, nor listens to router advertisements.
			ipv6.NewProtocol,
		},
		TransportProtocols: []stack.TransportProtocolFactory{
			tcp.NewProtocol, newUDPProtocol, icmp.NewProtocol4, icmp.NewProtocol6,
		},
		// The node's own addresses are reached inside the stack, not by a peer.
		HandleLocal: true,
	})
	err := setOptions(s, c)
	if err == nil && c.TUN != nil {
		// The rest are the kernel's; see tunwrap.Fork.
		if terr := s.SetPortRange(tunwrap.StackPorts, 65535); terr != nil {
			err = fmt.Errorf("set the range of ports: %s", terr)
		}
	}
	if err == nil {
		err = addNIC(s, c, link)
	}
	if err != nil {
		s.Destroy()
		return nil, fmt.Errorf("netstack: %w", err)
	}
	return s, nil
}

// setOptions sets what gVisor's defaults do not fit, each for the reason it
// carries.
func setOptions(s *stack.Stack, c *Config) error {
	// Selective acknowledgements: without them one lost superpacket, 45 segments, is
	// recovered one segment a round trip.
	sack := tcpip.TCPSACKEnabled(!c.TCP.NoSACK)
	// RACK (RFC 8985) is off. In gVisor 20260905 it takes a delay of a millisecond for a loss, and
	// after a timeout it halves the window over and over for segments that were lost
	// before. Measured: 10 transfers over 20 Mbit/s, 50 ms and a queue of 100 ms reached 2
	// to 16 Mbit/s with it, one in three stalling for seconds, and 15 to 17 without; eight
	// flows over loopback with the socket buffers of an unprivileged user 0.2 Gbit/s with
	// it, 2.7 without. What it is good at, reordering, it does little better: 2.2 against
	// 1.7 Mbit/s with 5 % late.
	recovery := tcpip.TCPRecovery(0)
	if c.TCP.RACK {
		recovery = tcpip.TCPRACKLossDetection
	}
	// CUBIC regains a large window after a loss in seconds where Reno takes minutes; it is
	// also what the other side of most paths uses.
	cc := tcpip.CongestionControlOption("cubic")
	if c.TCP.CongestionControl != "" {
		cc = tcpip.CongestionControlOption(c.TCP.CongestionControl)
	}
	send, receive := c.TCP.Send.or(defaultTCPSend), c.TCP.Receive.or(defaultTCPReceive)
	sendRange := tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: send.Default, Max: send.Max}
	receiveRange := tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: receive.Default, Max: receive.Max}
	// The receive window grows with what the program reads in a round trip.
	moderate := tcpip.TCPModerateReceiveBufferOption(true)
	// Small writes leave at once (no Nagle), as Go programs expect of the net package.
	delay := tcpip.TCPDelayEnabled(false)
	for _, o := range []tcpip.SettableTransportProtocolOption{
		&sack, &recovery, &cc, &sendRange, &receiveRange, &moderate, &delay,
	} {
		if terr := s.SetTransportProtocolOption(tcp.ProtocolNumber, o); terr != nil {
			return fmt.Errorf("set %T: %s", o, terr)
		}
	}
	usend := BufferSizes{c.UDP.Send, maxBuffer}.or(defaultUDPSend)
	ureceive := BufferSizes{c.UDP.Receive, maxBuffer}.or(defaultUDPReceive)
	if c.UDP.Send == 0 {
		usend = defaultUDPSend
	}
	if c.UDP.Receive == 0 {
		ureceive = defaultUDPReceive
	}
	for _, o := range []any{
		tcpip.SendBufferSizeOption{Min: minBuffer, Default: usend.Default, Max: usend.Max},
		tcpip.ReceiveBufferSizeOption{Min: minBuffer, Default: ureceive.Default, Max: ureceive.Max},
	} {
		if terr := s.SetOption(o); terr != nil {
			return fmt.Errorf("set %T: %s", o, terr)
		}
	}
	ttl := tcpip.DefaultTTLOption(64)
	for _, p := range []tcpip.NetworkProtocolNumber{ipv4.ProtocolNumber, ipv6.ProtocolNumber} {
		if terr := s.SetNetworkProtocolOption(p, &ttl); terr != nil {
			return fmt.Errorf("set TTL: %s", terr)
		}
	}
	return nil
}

// addNIC puts link, the node's addresses and a default route for each of their
// families into s.
func addNIC(s *stack.Stack, c *Config, link *linkep.Endpoint) error {
	if terr := s.CreateNICWithOptions(nicID, link, stack.NICOptions{Name: "penstock"}); terr != nil {
		return fmt.Errorf("create interface: %s", terr)
	}
	for _, p := range c.Addresses {
		// Always a host prefix: a subnet would bring broadcast addresses, and a tunnel has
		// none.
		pa := tcpip.ProtocolAddress{
			Protocol:          protocolOf(p.Addr()),
			AddressWithPrefix: stackAddr(p.Addr()).WithPrefix(),
		}
		if terr := s.AddProtocolAddress(nicID, pa, stack.AddressProperties{}); terr != nil {
			return fmt.Errorf("add address %v: %s", p.Addr(), terr)
		}
	}
	// Which addresses really leave is for Node.reachable to say: it asks a prefix table, where
	// the stack would walk a list with an entry for every prefix of every peer.
	var routes []tcpip.Route
	v4, v6 := c.families()
	if v4 {
		routes = append(routes, tcpip.Route{Destination: header.IPv4EmptySubnet, NIC: nicID})
	}
	if v6 {
		routes = append(routes, tcpip.Route{Destination: header.IPv6EmptySubnet, NIC: nicID})
	}
	s.SetRouteTable(routes)
	return nil
}
