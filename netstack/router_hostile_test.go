package netstack

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// TestRouterCloseUnderWay: Close does not wait for targets that do not answer and clients that
// do not complete their handshakes. TestMain sees whether anything is left.
func TestRouterCloseUnderWay(t *testing.T) {
	at := serveTCP(t, echoTCP)
	key := newKey(t)
	var asked atomic.Int64
	b := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/24", "fd66::2/64"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Peers:  []Peer{{Name: "a", PublicKey: key.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}},
		Router: &RouterConfig{Allow: prefixes(routed4), Flow: func(ctx context.Context, f Flow) (net.Conn, error) {
			asked.Add(1)
			if f.Dst.Port() == 7 {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return toLoopback(ctx, f)
		}},
	})
	c := newRawClient(t, key, b.PublicKey(), netip.MustParseAddrPort("127.0.0.1:0"), b.LocalAddrs()[0].String())
	hole := netip.MustParseAddrPort("203.0.113.1:7")
	live := netip.MustParseAddrPort(hostPort("203.0.113.2", at))
	synAck := func(p []byte) bool {
		return header.IPv4(p).TransportProtocol() == header.TCPProtocolNumber && header.TCP(p[20:]).Flags() == header.TCPFlagSyn|header.TCPFlagAck
	}
	syn := func(to netip.AddrPort) []byte {
		p := ackTo(to)
		s := header.TCP(p[20:])
		s.SetFlags(uint8(header.TCPFlagSyn))
		s.SetChecksum(0)
		s.SetChecksum(^s.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, stackAddr(client4), stackAddr(to.Addr()), 20)))
		return p
	}
	if c.ask(within(t, patience), synAck, syn(hole), syn(live)) == nil {
		t.Fatal("the live target's handshake has not begun")
	}
	c.out <- udpPacket(hole, 64, false, []byte("waits"))
	for end := time.Now().Add(patience); asked.Load() < 3; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not all were dialled")
		}
	}
	began := time.Now()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > patience/3 {
		t.Errorf("Close took %v", took)
	}
}

// FuzzRouterPacket: whatever packet a peer sends, the hook is asked only about what the
// rules allow, and the packet that was asked about names that target.
func FuzzRouterPacket(f *testing.F) {
	peer := func() PublicKey { k, _ := GenerateKey(); return k.Public() }()
	key, _ := GenerateKey()
	n, err := newInner(Config{
		PrivateKey: key, Addresses: prefixes("10.66.0.2/24", "fd66::2/64"),
		Router: &RouterConfig{Rules: []RouterRule{
			{Deny: true, Ports: []PortRange{{25, 25}}},
			{To: prefixes(routed4, routed6)},
		}},
	})
	if err != nil {
		f.Fatal(err)
	}
	type asked struct{ f Flow }
	var last atomic.Pointer[asked]
	n.cfg.Router.Flow = func(_ context.Context, f Flow) (net.Conn, error) {
		last.Store(&asked{f})
		return nil, ErrRefuse
	}
	r, err := newRouter(n)
	if err != nil {
		f.Fatal(err)
	}
	// Nothing is to leave this machine.
	r.icmp.ability = [2]echoAbility{{err: ErrRefuse}, {err: ErrRefuse}}
	r.setPeers([]Peer{{Name: "a", PublicKey: peer, AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}})
	f.Cleanup(func() {
		r.Close()
		n.Close()
	})
	for _, to := range []string{"203.0.113.1:80", "203.0.113.1:25", "198.51.100.1:80", "[2001:db8::1]:53", "[ff02::1]:53", "10.66.0.2:80"} {
		a := netip.MustParseAddrPort(to)
		f.Add(udpPacket(a, 64, false, []byte("data")))
		f.Add(udpPacket(a, 1, true, nil))
		f.Add(echoRequest(a.Addr(), 64, false, 1, 2, []byte("data")))
		if a.Addr().Is4() {
			f.Add(ackTo(a))
		}
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		last.Store(nil)
		pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
		r.link.Deliver(pkt)
		for end := time.Now().Add(patience); ; {
			r.mu.Lock()
			idle := len(r.flows) == 0
			r.mu.Unlock()
			if idle {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("a refused flow goes on: %+v", r.status())
			}
			time.Sleep(50 * time.Microsecond)
		}
		for n.link.Queues()[0].Stats().Depth > 0 {
			pkts := make([]*stack.PacketBuffer, 8)
			got, err := n.link.Dequeue(pkts)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range pkts[:got] {
				p.DecRef()
			}
		}
		if a := last.Load(); a != nil {
			dst := a.f.Dst
			in := netip.MustParsePrefix(routed4).Contains(dst.Addr()) || netip.MustParsePrefix(routed6).Contains(dst.Addr())
			if !in || dst.Port() == 25 || a.f.Peer != peer {
				t.Fatalf("asked about %+v", a.f)
			}
		}
	})
}
