package tunwrap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// headroom is the offset at which the engines keep packets in their buffers.
const headroom = 22

// A chanLink is a Link around gVisor's channel endpoint, with superpackets of 64 KiB.
type chanLink struct {
	*channel.Endpoint
	ctx    context.Context
	cancel context.CancelFunc
}

func newChanLink(mtu uint32) *chanLink {
	ep := channel.New(1024, mtu, "")
	ep.SupportedGSOKind = stack.HostGSOSupported
	ep.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	ctx, cancel := context.WithCancel(context.Background())
	return &chanLink{Endpoint: ep, ctx: ctx, cancel: cancel}
}

func (*chanLink) GSOMaxSize() uint32 { return 64 << 10 }

func (l *chanLink) Dequeue(pkts []*stack.PacketBuffer) (n int, err error) {
	pkt := l.ReadContext(l.ctx)
	for pkt != nil {
		pkts[n] = pkt
		if n++; n == len(pkts) {
			break
		}
		pkt = l.Read()
	}
	if n == 0 {
		return 0, fmt.Errorf("chanLink: %w", os.ErrClosed)
	}
	return n, nil
}

func (l *chanLink) Deliver(pkt *stack.PacketBuffer) {
	l.InjectInbound(pkt.NetworkProtocolNumber, pkt)
	pkt.DecRef()
}

func (l *chanLink) Close() {
	l.cancel()
	l.Endpoint.Close()
}

// A node is a gVisor stack with a Wrapper.
type node struct {
	*stack.Stack
	*Wrapper
	link *chanLink
	addr [2]tcpip.Address // IPv4, IPv6
}

func newNode(t testing.TB, mtu uint32, addrs ...string) *node {
	t.Helper()
	n := &node{
		Stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		}),
		link: newChanLink(mtu),
	}
	sack := tcpip.TCPSACKEnabled(true)
	n.SetTransportProtocolOption(tcp.ProtocolNumber, &sack)
	if err := n.CreateNIC(1, n.link); err != nil {
		t.Fatal(err)
	}
	for i, s := range addrs {
		a := netip.MustParseAddr(s)
		n.addr[i] = tcpip.AddrFromSlice(a.AsSlice())
		p := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: n.addr[i].WithPrefix()}
		if a.Is6() {
			p.Protocol = ipv6.ProtocolNumber
		}
		if err := n.AddProtocolAddress(1, p, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	n.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: 1},
		{Destination: header.IPv6EmptySubnet, NIC: 1},
	})
	n.Wrapper = New(n.link, Options{MTU: int(mtu)})
	return n
}

func (n *node) stop() {
	n.Wrapper.Close()
	n.Stack.Close()
	n.Stack.Wait()
}

// pump carries packets from one node to another until from is closed. batch is the number of
// buffers it reads into. tap, if not nil, sees every packet, may change it and tells
// whether it goes on.
func pump(t testing.TB, from, to *node, batch int, tap func(from *node, packet []byte) bool) {
	const size = 2048
	bufs, sizes := make([][]byte, batch), make([]int, batch)
	for i := range bufs {
		bufs[i] = make([]byte, size)
	}
	out := make([][]byte, 0, batch)
	for {
		n, err := from.Read(bufs, sizes, headroom)
		if errors.Is(err, os.ErrClosed) {
			return
		}
		if err != nil {
			t.Errorf("Read: %v", err)
			return
		}
		out = out[:0]
		for i := range n {
			b := bufs[i][:headroom+sizes[i]]
			if tap == nil || tap(from, b[headroom:]) {
				out = append(out, b)
			}
		}
		if _, err := to.Write(out, headroom); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Errorf("Write: %v", err)
			return
		}
	}
}

// join pumps both ways until stop.
func join(t testing.TB, a, b *node, batch int, tap func(*node, []byte) bool) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() { pump(t, a, b, batch, tap) })
	wg.Go(func() { pump(t, b, a, batch, tap) })
	return func() {
		a.stop()
		b.stop()
		wg.Wait()
	}
}

func (n *node) full(i int, port uint16) (tcpip.FullAddress, tcpip.NetworkProtocolNumber) {
	p := ipv4.ProtocolNumber
	if i == 1 {
		p = ipv6.ProtocolNumber
	}
	return tcpip.FullAddress{NIC: 1, Addr: n.addr[i], Port: port}, p
}

// transfer sends size random bytes from a to b over TCP and half of them back at the same
// time, and checks what arrives.
func transfer(t *testing.T, a, b *node, family int, size int) {
	t.Helper()
	at, proto := b.full(family, 80)
	ln, err := gonet.ListenTCP(b.Stack, at, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	want, wantBack := sha256.Sum256(data), sha256.Sum256(data[:size/2])
	receive := func(c net.Conn, want [32]byte) error {
		h := sha256.New()
		if _, err := io.Copy(h, c); err != nil {
			return err
		}
		if !bytes.Equal(h.Sum(nil), want[:]) {
			return errors.New("not what was sent")
		}
		return nil
	}
	send := func(c *gonet.TCPConn, data []byte) error {
		if _, err := c.Write(data); err != nil {
			return err
		}
		return c.CloseWrite()
	}
	errs := make(chan error, 4)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			errs <- err
			errs <- err
			return
		}
		defer c.Close()
		done := make(chan error)
		go func() { done <- send(c.(*gonet.TCPConn), data[:size/2]) }()
		errs <- receive(c, want)
		errs <- <-done
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := gonet.DialContextTCP(ctx, a.Stack, at, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() { errs <- send(c, data) }()
	go func() { errs <- receive(c, wantBack) }()
	for range 4 {
		select {
		case err := <-errs:
			if err != nil {
				t.Fatal(err)
			}
		case <-ctx.Done():
			t.Fatalf("timed out; %+v, drops %v", a.Wrapper.Stats(), a.Drops())
		}
	}
}

func TestStacks(t *testing.T) {
	for family, name := range []string{"IPv4", "IPv6"} {
		for _, batch := range []int{1, 7, 128} {
			t.Run(fmt.Sprintf("%s/batch=%d", name, batch), func(t *testing.T) {
				defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
				a := newNode(t, 1400, "10.0.0.1", "fd00::1")
				b := newNode(t, 1400, "10.0.0.2", "fd00::2")
				stop := join(t, a, b, batch, nil)
				transfer(t, a, b, family, 3<<20)
				stop()
				for _, n := range []*node{a, b} {
					d := n.Drops()
					d[DropClosed] = 0
					if d.Total() != 0 {
						t.Errorf("drops: %v", d)
					}
					s := n.Wrapper.Stats()
					if s.Outbound.Superpackets == 0 || batch > 1 && s.Inbound.Superpackets == 0 {
						t.Errorf("no superpackets: %+v", s)
					}
					t.Logf("%+v", s)
				}
			})
		}
	}
}

// A connection that is not yet established has no MSS, but its resets are marked for offload like
// everything else.
func TestResetInHandshake(t *testing.T) {
	for family, name := range []string{"IPv4", "IPv6"} {
		t.Run(name, func(t *testing.T) {
			a := newNode(t, 1400, "10.0.0.1", "fd00::1")
			defer a.stop()
			at, proto := a.full(family, 80)
			at.Addr = tcpip.AddrFromSlice(netip.MustParseAddr([]string{"10.0.0.2", "fd00::2"}[family]).AsSlice())
			ctx, cancel := context.WithCancel(context.Background())
			dialed := make(chan error)
			go func() {
				_, err := gonet.DialContextTCP(ctx, a.Stack, at, proto)
				dialed <- err
			}()
			defer func() { cancel(); <-dialed }()

			bufs, sizes := buffers(8, 1500)
			// read waits for a TCP packet with the flags; the stack says other things too.
			read := func(flags header.TCPFlags) header.TCP {
				for {
					n, err := a.Read(bufs, sizes, headroom)
					if err != nil {
						t.Fatal(err)
					}
					for i := range n {
						b := bufs[i][headroom : headroom+sizes[i]]
						if err := valid(b); err != nil {
							t.Fatal(err)
						}
						if l, _ := locate(b, len(b)); l.proto == protoTCP && header.TCP(b[l.l4:]).Flags() == flags {
							return header.TCP(b[l.l4:])
						}
					}
				}
			}
			watchdog := time.AfterFunc(10*time.Second, a.link.Close)
			defer watchdog.Stop()
			first := read(header.TCPFlagSyn)
			wrong := spec{
				v6: family == 1, sport: 80, dport: first.SourcePort(), flags: syn | ack, seq: 9,
				ack: first.SequenceNumber() + 1000,
			}
			src, dst := wrong.addrs()
			wrong.src, wrong.dst = dst, src
			if _, err := a.Write([][]byte{wrong.full()}, 0); err != nil {
				t.Fatal(err)
			}
			if h := read(header.TCPFlagRst); h.SequenceNumber() != wrong.ack {
				t.Errorf("sequence number %d", h.SequenceNumber())
			}
			if d := a.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
		})
	}
}
