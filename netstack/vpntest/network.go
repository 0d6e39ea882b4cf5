package vpntest

import (
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport"
)

// A Network is an in-memory wire that can be changed while it runs. It is an [Option] of
// Pair and Mesh.
//
//	nw := vpntest.NewNetwork(t, vpntest.Wire{Latency: 10 * time.Millisecond})
//	a, b := vpntest.Pair(t, nw)
//	nw.SetLoss(0.5)
//	nw.Partition(a, b)
//	nw.Heal()
//	nw.Rebind(a)
//
// All its methods may be called from any goroutine. A changed wire applies to datagrams
// sent from then on; what is under way arrives.
type Network struct {
	t    testing.TB
	seed uint64

	mu    sync.Mutex
	wire  Wire
	conns map[netip.AddrPort]*conn
	made  int               // conns so far, for addresses and seeds
	host  int               // hosts so far
	cut   map[[2]*conn]bool // both orders
	arena []datagram        // of send
}

// NewNetwork makes a network. It fails the test if w makes no sense.
func NewNetwork(t testing.TB, w Wire) *Network {
	t.Helper()
	if err := w.validate(); err != nil {
		t.Fatal(err)
	}
	return &Network{
		t: t, seed: w.Seed, wire: w,
		conns: make(map[netip.AddrPort]*conn), cut: make(map[[2]*conn]bool),
	}
}

// Listen attaches a socket at a new address. Whoever takes it closes it: a node that gets
// it in Config.Conns does.
func (n *Network) Listen() transport.PacketConn {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := &conn{
		net: n, up: newUplink(n.seed, n.made),
		wake: make(chan struct{}, 1), timer: time.NewTimer(time.Hour),
	}
	n.made++
	n.moveLocked(c)
	return c
}

// moveLocked gives c an address of its own: the next in 198.18.0.0/15, which is set aside for tests
// (RFC 2544 C.2.2).
func (n *Network) moveLocked(c *conn) {
	n.host++
	delete(n.conns, c.addr)
	c.addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(n.host >> 8), byte(n.host)}), 5182)
	n.conns[c.addr] = c
}

func (n *Network) remove(c *conn) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.conns, c.addr)
	for pair := range n.cut {
		if pair[0] == c || pair[1] == c {
			delete(n.cut, pair)
		}
	}
}

// send carries a run of from. It borrows the run.
func (n *Network) send(from *conn, r transport.Run) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conns[from.addr] != from {
		return net.ErrClosed
	}
	to := n.conns[r.Remote]
	if to == nil || n.cut[[2]*conn{from, to}] {
		return nil // nobody there: gone, as with UDP
	}
	now := time.Now()
	ds := n.arena[:0]
	for _, s := range r.Segments {
		at, twice, ok := from.up.send(&n.wire, len(s), now)
		if !ok {
			continue
		}
		for range 1 + btoi(twice) {
			d := newDatagram(s)
			d.at, d.from, d.to = at, from.addr, to.addr.Addr()
			ds = append(ds, d)
		}
	}
	to.deliver(ds)
	clear(ds)
	n.arena = ds[:0]
	return nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Wire returns how datagrams are treated now.
func (n *Network) Wire() Wire {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.wire
}

// SetWire changes how datagrams are treated.
func (n *Network) SetWire(w Wire) {
	n.t.Helper()
	if err := w.validate(); err != nil {
		n.t.Fatal(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.wire = w
}

// SetLoss changes the chance that a datagram vanishes and nothing else.
func (n *Network) SetLoss(p float64) {
	n.t.Helper()
	w := n.Wire()
	w.Loss = p
	n.SetWire(w)
}

// Partition stops all datagrams between a and b, in both directions, until Heal.
func (n *Network) Partition(a, b *netstack.Node) {
	n.t.Helper()
	ca, cb := n.connOf(a), n.connOf(b)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[[2]*conn{ca, cb}], n.cut[[2]*conn{cb, ca}] = true, true
}

// Heal undoes every Partition.
func (n *Network) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
}

// Rebind moves a node to a new address, as when a laptop changes networks or a NAT forgets a
// mapping: what it sends comes from there, what goes to the old address is lost. Nobody is
// told. It returns the new address.
func (n *Network) Rebind(node *netstack.Node) netip.AddrPort {
	n.t.Helper()
	c := n.connOf(node)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.moveLocked(c)
	return c.addr
}

// connOf finds the socket of a node.
func (n *Network) connOf(node *netstack.Node) *conn {
	n.t.Helper()
	addrs := node.LocalAddrs()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		if c := n.conns[a]; c != nil {
			return c
		}
	}
	n.t.Fatalf("vpntest: node %v is not on this network, or closed", addrs)
	return nil
}
