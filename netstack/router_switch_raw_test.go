package netstack

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/penstock-vpn/penstock/transport"
)

// A batchClient gives all that is there.
type batchClient struct{ *rawClient }

func (c batchClient) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := c.rawClient.Read(bufs, sizes, offset)
	for err == nil && n < len(bufs) && len(c.out) > 0 {
		sizes[n] = copy(bufs[n][offset:], <-c.out)
		n++
	}
	return n, err
}

// newBatchClient joins a raw client that gives all its packets at once, whatever its address.
func newBatchClient(t *testing.T, key PrivateKey, hub *Node) *rawClient {
	c := &rawClient{out: make(chan []byte, 64), in: make(chan []byte, 1024), closed: make(chan struct{})}
	sock, err := transport.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), transport.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.transport, err = transport.New(transport.Config{Key: key, Conns: []transport.PacketConn{sock}, Device: batchClient{c}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.once.Do(func() { close(c.closed) }); c.transport.Close() })
	if err := c.transport.AddPeer(transport.PeerConfig{PublicKey: hub.PublicKey(), Endpoint: hub.LocalAddrs()[0].String(), AllowedIPs: prefixes("0.0.0.0/0", "::/0")}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := hub.WaitEstablished(ctx, key.Public()); err != nil {
		t.Fatal(err)
	}
	for c.transport.Status().Peers[0].State != transport.PeerEstablished {
		if ctx.Err() != nil {
			t.Fatal("no association with the hub")
		}
		time.Sleep(5 * time.Millisecond)
	}
	return c
}

// TestSwitchExtensionHeaders: TCP behind extension headers is a superpacket on its way too.
func TestSwitchExtensionHeaders(t *testing.T) {
	k1, k3 := newKey(t), newKey(t)
	hub := start(t, Config{
		PrivateKey: newKey(t), Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, Addresses: prefixes("fd66::2/64"),
		Router: &RouterConfig{}, Switch: true,
		Peers: []Peer{{PublicKey: k1.Public(), AllowedIPs: prefixes("fd66::1/128")}, {PublicKey: k3.Public(), AllowedIPs: prefixes("fd66::3/128")}},
	})
	a, c := newBatchClient(t, k1, hub), newBatchClient(t, k3, hub)
	dst := netip.MustParseAddr("fd66::3")
	sum := func(l4 []byte) uint16 {
		return checksum.Checksum(l4, header.PseudoHeaderChecksum(header.TCPProtocolNumber, stackAddr(client6), stackAddr(dst), uint16(len(l4))))
	}
	for _, n := range []int{100, 1200} {
		for i := range 3 {
			l4 := make([]byte, header.TCPMinimumSize+n)
			header.TCP(l4).Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, SeqNum: uint32(i * n), AckNum: 1, DataOffset: 20, Flags: header.TCPFlagAck, WindowSize: 100})
			header.TCP(l4).SetChecksum(^sum(l4))
			// Destination options with nothing but padding.
			a.out <- ipPacket(dst, 60, 64, false, append([]byte{uint8(header.TCPProtocolNumber), 0, 1, 4, 0, 0, 0, 0}, l4...))
		}
		for i := range 3 {
			select {
			case b := <-c.in:
				if len(b) != 48+20+n || sum(b[48:]) != 0xffff {
					t.Errorf("segment %d of %d bytes: %d bytes, sum %x", i, n, len(b), sum(b[48:]))
				}
			case <-time.After(2 * time.Second):
				t.Errorf("segment %d of %d bytes has not come; drops %v", i, n, hub.Status().Drops)
			}
		}
	}
}
