package vpntest

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport"
)

// An Option changes what Pair and Mesh make: a [Wire], a [*Network], [Loopback], or the
// result of [Configure] or [Unconnected].
type Option interface{ apply(*mesh) }

type optionFunc func(*mesh)

func (f optionFunc) apply(m *mesh) { f(m) }

func (w Wire) apply(m *mesh)     { m.listen = NewNetwork(m.t, w).listen }
func (n *Network) apply(m *mesh) { m.listen = n.listen }

func (n *Network) listen() (transport.PacketConn, error) { return n.Listen(), nil }

// Loopback joins the nodes by UDP sockets on 127.0.0.1, with whatever offloads the
// kernel has.
var Loopback Option = optionFunc(func(m *mesh) {
	m.listen = func() (transport.PacketConn, error) {
		return transport.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), transport.SocketOptions{})
	}
})

// Configure edits the configuration of node i, counted from 0, before it starts.
func Configure(edit func(i int, c *netstack.Config)) Option {
	return optionFunc(func(m *mesh) { m.edits = append(m.edits, edit) })
}

// Unconnected returns without waiting for the nodes to connect; see [WaitEstablished].
var Unconnected Option = optionFunc(func(m *mesh) { m.wait = false })

type mesh struct {
	t      testing.TB
	listen func() (transport.PacketConn, error)
	edits  []func(int, *netstack.Config)
	wait   bool
}

// Pair returns two connected nodes, at 10.66.0.1 and fd66::1 and at 10.66.0.2 and fd66::2.
func Pair(t testing.TB, opts ...Option) (a, b *netstack.Node) {
	t.Helper()
	nodes := Mesh(t, 2, opts...)
	return nodes[0], nodes[1]
}

// Mesh returns n nodes, each connected with every other. The i-th, counted from 1, is at
// 10.66.x.i and fd66::i (x is 0 up to 255 nodes) and named "node i"; see [Addr4] and [Addr6].
func Mesh(t testing.TB, n int, opts ...Option) []*netstack.Node {
	t.Helper()
	m := &mesh{t: t, wait: true}
	Wire{}.apply(m)
	for _, o := range opts {
		o.apply(m)
	}
	configs := m.configs(n)
	var nodes []*netstack.Node
	for i, c := range configs {
		node, err := netstack.New(c)
		if err != nil {
			for _, later := range configs[i+1:] {
				closeConns(later.Conns)
			}
			t.Fatalf("vpntest: node %d: %v", i+1, err)
		}
		t.Cleanup(func() {
			if err := node.Close(); err != nil {
				t.Errorf("vpntest: close node %d: %v", i+1, err)
			}
		})
		nodes = append(nodes, node)
	}
	if m.wait {
		WaitEstablished(t, nodes...)
	}
	return nodes
}

// Addr4 is the IPv4 address of the i-th node, counted from 0.
func Addr4(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 66, byte((i + 1) >> 8), byte(i + 1)})
}

// Addr6 is the IPv6 address of the i-th node, counted from 0.
func Addr6(i int) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x66, 14: byte((i + 1) >> 8), 15: byte(i + 1)})
}

func hostPrefixes(i int) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(Addr4(i), 32), netip.PrefixFrom(Addr6(i), 128)}
}

// configs makes the configurations, sockets included, of n nodes that all know each other.
func (m *mesh) configs(n int) []netstack.Config {
	m.t.Helper()
	if n < 1 || n > 10000 {
		m.t.Fatalf("vpntest: %d nodes, expected 1 to 10000", n)
	}
	configs := make([]netstack.Config, n)
	for i := range configs {
		key, err := netstack.GenerateKey()
		if err != nil {
			m.t.Fatal(err)
		}
		conn, err := m.listen()
		if err != nil {
			for _, c := range configs[:i] {
				closeConns(c.Conns)
			}
			m.t.Fatalf("vpntest: %v", err)
		}
		configs[i] = netstack.Config{
			PrivateKey: key, Addresses: hostPrefixes(i), Conns: []transport.PacketConn{conn},
		}
	}
	for i := range configs {
		for j := range configs {
			if i != j {
				configs[i].Peers = append(configs[i].Peers, netstack.Peer{
					Name:       fmt.Sprintf("node %d", j+1),
					PublicKey:  configs[j].PrivateKey.Public(),
					Endpoint:   configs[j].Conns[0].LocalAddr().String(),
					AllowedIPs: hostPrefixes(j),
				})
			}
		}
		for _, edit := range m.edits {
			edit(i, &configs[i])
		}
	}
	return configs
}

func closeConns(conns []transport.PacketConn) {
	for _, c := range conns {
		c.Close()
	}
}

// waitTimeout bounds WaitEstablished: several handshake timeouts on a very bad wire.
const waitTimeout = 60 * time.Second

// WaitEstablished waits until every one of nodes can send to every other of them that it has as
// a peer. It fails the test when that takes more than a minute.
func WaitEstablished(t testing.TB, nodes ...*netstack.Node) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
	defer cancel()
	for i, a := range nodes {
		known := map[netstack.PublicKey]bool{}
		for _, p := range a.Status().Tunnel.Peers {
			known[p.PublicKey] = true
		}
		for j, b := range nodes {
			if i != j && known[b.PublicKey()] {
				if err := a.WaitEstablished(ctx, b.PublicKey()); err != nil {
					t.Fatalf("vpntest: node %d to node %d: %v", i+1, j+1, err)
				}
			}
		}
	}
}
