package netstack

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// TUNConfig gives a [Node] an interface of the kernel beside its own stack. Both have the
// node's addresses:
//
//   - The stack gets what peers send to a port that Listen, ListenPacket or Publish has opened,
//     answers to what Dial and Ping have sent, and with Config.Router everything that is not to
//     an address of the node.
//   - The kernel gets everything else: its programs answer as on any interface.
//
// The stack makes its connections from ports 61000 to 65535, which are lost to the kernel's
// programs on this interface. Linux's own range ends before it unless
// net.ipv4.ip_local_port_range says otherwise; then set net.ipv4.ip_local_reserved_ports to
// 61000-65535.
//
// Neither reaches the other by an address of the node: what the kernel sends there stays in the kernel,
// and what Dial sends there in the stack.
//
// The Node opens the interface and moves packets. Addresses and routes are for the caller to
// set, who needs the same privileges as for opening it (CAP_NET_ADMIN on Linux).
type TUNConfig struct {
	// Name of the interface; a %d in it is replaced by a number. Empty: penstock%d.
	Name string
	// Queues of the interface, each read by a goroutine; 0 means one.
	Queues int
	// FD, if greater than 0, is the open file of an interface that exists, with IFF_NO_PI. The
	// Node takes it: it is closed with it, and when New fails.
	FD int
	// NoVnetHdr, NoGSO and NoGRO give up superpackets altogether, from the kernel and to
	// the kernel. It is many times slower; they are there to compare and to get around mistakes of
	// kernels.
	NoVnetHdr, NoGSO, NoGRO bool
	// MTUChanged is told the largest packet that peers' paths carry whenever that changes, for
	// the interface's MTU; never if Config.MTU is set. It must not call Close. nil: the Node sets
	// the MTU itself, unless the interface came with FD and so may be in another network
	// namespace.
	MTUChanged func(mtu int)

	open func(tunwrap.TUNOptions) (kernelTUN, error) // for tests; nil: openTUN
}

// TUNStatus is about the kernel's interface.
type TUNStatus struct {
	Name string `json:"name"`
	// Capabilities are what the kernel does for the interface.
	Capabilities tunwrap.TUNCapabilities `json:"capabilities"`
	// ToKernel and ToStack are inbound packets, by who has got them.
	ToKernel uint64         `json:"to_kernel"`
	ToStack  uint64         `json:"to_stack"`
	Outbound OutboundStatus `json:"outbound"` // from the kernel
	Inbound  InboundStatus  `json:"inbound"`  // to the kernel
	// Drops are packets given up between kernel and tunnel, by reason.
	Drops map[string]uint64 `json:"drops"`
	// PortConflict says why programs of the system may lose connections through the VPN.
	PortConflict string `json:"port_conflict,omitempty"`
}

// kernelTUN is a [tunwrap.TUN], or what stands in for it in a test.
type kernelTUN interface {
	transport.Device
	streams() []transport.Reader // beyond that of the Device
	SetNAT([]tunwrap.NATRule) error
	SetFilter(*tunwrap.Filter)
	TooBig(packet []byte, mtu int)
	SetMTU(int) error
	Close() error
	status() TUNStatus
}

// startTUN opens the kernel's interface and the fork before it. n.wrapper and n.filter exist.
func (n *Node) startTUN() error {
	c := n.cfg.TUN
	open := c.open
	if open == nil {
		open = openTUN
	}
	name := c.Name
	if name == "" {
		name = "penstock%d"
	}
	dev, err := open(tunwrap.TUNOptions{
		Name: name, MTU: n.innerMTU(), Queues: c.Queues, FD: c.FD,
		NoVnetHdr: c.NoVnetHdr, NoGSO: c.NoGSO, NoGRO: c.NoGRO,
		BatchSize: batchPackets(n.innerMTU()), Logger: n.log,
	})
	if err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	n.tun = dev
	n.tun.SetFilter(n.filter)
	n.fork = tunwrap.NewFork(tunwrap.ForkOptions{
		Stack: n.wrapper, Kernel: n.tun, Addresses: n.ownAddrs(), OthersToStack: n.router != nil,
	})
	if c.FD == 0 {
		n.portConflict = portConflict()
		if n.portConflict != "" {
			n.log.Warn("programs of this system may lose connections through the VPN", "reason", n.portConflict)
		}
	}
	return nil
}

// A forkedDevice is the [transport.Device] of a node with two stacks: outbound it is the stack's
// half, the kernel's are further Readers.
type forkedDevice struct {
	*tunwrap.Wrapper
	fork *tunwrap.Fork
}

func (d forkedDevice) Write(bufs [][]byte, offset int) (int, error) {
	return d.fork.Write(bufs, offset)
}

// device is what the transport drives.
func (n *Node) device() (d transport.Device, readers []transport.Reader) {
	for _, q := range n.link.Queues()[1:] { // the first is the wrapper's own
		readers = append(readers, n.wrapper.NewReader(q))
	}
	if n.tun == nil {
		return n.wrapper, readers
	}
	return forkedDevice{n.wrapper, n.fork}, append(append(readers, n.tun), n.tun.streams()...)
}

// tooBig tells the sender of an outbound packet; see [transport.Config].
func (n *Node) tooBig(packet []byte, mtu int) {
	if n.tun != nil && !n.fork.FromStack(packet) {
		n.tun.TooBig(packet, mtu)
		return
	}
	n.wrapper.TooBig(packet, mtu)
}

// tunEarlyDrop is how many bytes for the kernel may wait in a socket, as the most that one receive
// takes is 1 MiB. Measured with one flow of the kernel's TCP, CUBIC, between two TUN nodes on two busy
// cores (November 2026): a ping beside it takes 1.0 ms at the median with it and 5.3 ms without, 0.3 ms alone; Gbit/s
// and processor time are the same within the noise. 700,000 bytes cost a fifth of the throughput.
const tunEarlyDrop = 950_000

// earlyDrop is for what goes to the kernel: senders that are stacks of ours share what a socket
// holds (share.go).
func (n *Node) earlyDrop() int {
	if n.tun == nil {
		return 0
	}
	return tunEarlyDrop
}

// interfaceMTU passes on what pathMTUChanged was told.
func (n *Node) interfaceMTU(mtu int) {
	c := n.cfg.TUN
	switch {
	case c == nil:
	case n.isClosed(): // the interface may be gone
	case c.MTUChanged != nil:
		c.MTUChanged(mtu)
	case c.FD == 0:
		if err := n.tun.SetMTU(mtu); err != nil {
			n.log.Warn("cannot set the interface's MTU", "mtu", mtu, "error", err)
		}
	}
}

// claim makes packets to a port, or with an identifier, the stack's until release is called.
// at is one address of the node, or an unspecified one: 0.0.0.0 for those of IPv4, [::] for those of
// IPv6 and, with dual, also of IPv4.
func (n *Node) claim(what tunwrap.Claimed, at netip.AddrPort, dual bool) (release func()) {
	if n.fork == nil {
		return func() {}
	}
	addrs := []netip.Addr{at.Addr()}
	if at.Addr().IsUnspecified() {
		addrs = slices.DeleteFunc(n.ownAddrs(), func(a netip.Addr) bool {
			return a.Is4() != at.Addr().Is4() && !dual
		})
	}
	return n.fork.Claim(what, at.Port(), addrs...)
}

// releaseUnused calls release, of a TCP port, when no connection uses the port any more. It does
// not wait.
func (n *Node) releaseUnused(port uint16, release func()) {
	if n.fork == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.isClosed() {
		return
	}
	n.lingering.Go(func() {
		tick := time.NewTicker(portPoll)
		defer tick.Stop()
		for n.portInUse(port) {
			select {
			case <-tick.C:
			case <-n.ctx.Done():
				return
			}
		}
		release()
	})
}

// portPoll is how often a port that nobody listens on any more is looked at: seldom, as all
// endpoints of the stack are.
const portPoll = 250 * time.Millisecond

// portInUse tells whether a connection of the stack has a local TCP port. In TIME-WAIT there is
// nothing left to lose.
func (n *Node) portInUse(port uint16) bool {
	for _, e := range n.stack.RegisteredEndpoints() {
		e, ok := e.(*tcp.Endpoint)
		if !ok {
			continue
		}
		switch e.EndpointState() {
		case tcp.StateTimeWait, tcp.StateClose, tcp.StateError, tcp.StateInitial:
			continue
		}
		if info, ok := e.Info().(*stack.TransportEndpointInfo); ok && info.ID.LocalPort == port {
			return true
		}
	}
	return false
}

// takeFD closes the file that was meant for a node which is not made.
func (c *TUNConfig) takeFD() {
	if c != nil && c.FD > 0 {
		os.NewFile(uintptr(c.FD), "tun").Close()
	}
}

func (c *TUNConfig) validate(bad complain) {
	if c.Queues < 0 || c.Queues > maxQueues {
		bad("TUN.Queues", fmt.Sprint(c.Queues), fmt.Sprintf("0 to %d", maxQueues))
	}
	if c.FD > 0 && c.Queues > 1 {
		bad("TUN.Queues", fmt.Sprint(c.Queues), "0 or 1 when FD is set: one file is one queue")
	}
	if c.FD < 0 {
		bad("TUN.FD", fmt.Sprint(c.FD), "the number of an open file")
	}
	if len(c.Name) > maxInterfaceName {
		bad("TUN.Name", c.Name, fmt.Sprintf("at most %d characters", maxInterfaceName))
	}
}

const (
	maxQueues        = 256 // MAX_TAP_QUEUES of Linux, which bounds TUN too
	maxInterfaceName = 15  // IFNAMSIZ of Linux with its NUL
)
