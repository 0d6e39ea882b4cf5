package netstack

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/penstock-vpn/penstock/transport"
)

// A rawClient is a peer without a stack, for packets that no stack would send. It is a
// [transport.Device].
type rawClient struct {
	transport *transport.Transport
	out       chan []byte
	in        chan []byte
	closed    chan struct{}
	once      sync.Once
}

func (c *rawClient) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p := <-c.out:
		sizes[0] = copy(bufs[0][offset:], p)
		return 1, nil
	case <-c.closed:
		return 0, os.ErrClosed
	}
}

func (c *rawClient) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		select {
		case c.in <- slices.Clone(b[offset:]):
		default:
		}
	}
	return len(bufs), nil
}

func (c *rawClient) BatchSize() int { return 8 }

var _ interface {
	Read([][]byte, []int, int) (int, error)
	Write([][]byte, int) (int, error)
} = (tun.Device)(nil)

// newRawClient joins a client at 10.66.0.1 and fd66::1 to the node with the public key at
// endpoint.
func newRawClient(t testing.TB, key PrivateKey, router PublicKey, listen netip.AddrPort, endpoint string) *rawClient {
	t.Helper()
	c := &rawClient{out: make(chan []byte, 64), in: make(chan []byte, 1024), closed: make(chan struct{})}
	sock, err := transport.ListenUDP(listen, transport.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.transport, err = transport.New(transport.Config{Key: key, Conns: []transport.PacketConn{sock}, Device: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.once.Do(func() { close(c.closed) })
		c.transport.Close()
	})
	err = c.transport.AddPeer(transport.PeerConfig{PublicKey: router, Endpoint: endpoint, AllowedIPs: prefixes("0.0.0.0/0", "::/0")})
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); c.transport.Status().Peers[0].State != transport.PeerEstablished; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no association with the router")
		}
	}
	return c
}

// ask sends packets and waits for the first answer that fits; nil after a while.
func (c *rawClient) ask(ctx context.Context, fits func([]byte) bool, packets ...[]byte) []byte {
	for {
		select {
		case <-c.in:
			continue
		default:
		}
		break
	}
	for _, p := range packets {
		c.out <- p
	}
	for {
		select {
		case p := <-c.in:
			if fits(p) {
				return p
			}
		case <-ctx.Done():
			return nil
		}
	}
}

var (
	client4 = netip.MustParseAddr("10.66.0.1")
	client6 = netip.MustParseAddr("fd66::1")
)

// ipPacket puts an IP header before payload, whose checksum is right already.
func ipPacket(dst netip.Addr, proto tcpip.TransportProtocolNumber, ttl uint8, df bool, payload []byte) []byte {
	if dst.Is6() {
		b := make([]byte, header.IPv6MinimumSize, header.IPv6MinimumSize+len(payload))
		header.IPv6(b).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(payload)), TransportProtocol: proto, HopLimit: ttl,
			SrcAddr: stackAddr(client6), DstAddr: stackAddr(dst),
		})
		return append(b, payload...)
	}
	b := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(payload))
	f := &header.IPv4Fields{
		TotalLength: uint16(len(b) + len(payload)), ID: 77, TTL: ttl, Protocol: uint8(proto),
		SrcAddr: stackAddr(client4), DstAddr: stackAddr(dst),
	}
	if df {
		f.Flags = header.IPv4FlagDontFragment
	}
	header.IPv4(b).Encode(f)
	header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	return append(b, payload...)
}

// echoRequest is a ping of dst.
func echoRequest(dst netip.Addr, ttl uint8, df bool, ident, seq uint16, data []byte) []byte {
	m := make([]byte, 8, 8+len(data))
	m[0] = echoTypes(dst.Is6())[0]
	binary.BigEndian.PutUint16(m[4:], ident)
	binary.BigEndian.PutUint16(m[6:], seq)
	m = append(m, data...)
	if dst.Is6() {
		header.ICMPv6(m).SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: m, Src: stackAddr(client6), Dst: stackAddr(dst),
		}))
		return ipPacket(dst, header.ICMPv6ProtocolNumber, ttl, df, m)
	}
	header.ICMPv4(m).SetChecksum(^checksum.Checksum(m, 0))
	return ipPacket(dst, header.ICMPv4ProtocolNumber, ttl, df, m)
}

// udpPacket is a datagram from port 4000.
func udpPacket(dst netip.AddrPort, ttl uint8, df bool, data []byte) []byte {
	u := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(data))
	size := uint16(len(u) + len(data))
	header.UDP(u).Encode(&header.UDPFields{SrcPort: 4000, DstPort: dst.Port(), Length: size})
	src := client4
	if dst.Addr().Is6() {
		src = client6
	}
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, stackAddr(src), stackAddr(dst.Addr()), size)
	header.UDP(u).SetChecksum(^header.UDP(u).CalculateChecksum(checksum.Combine(sum, checksum.Checksum(data, 0))))
	return ipPacket(dst.Addr(), header.UDPProtocolNumber, ttl, df, append(u, data...))
}

// An icmpMessage is what a client got, checked with the stack's own code.
type icmpMessage struct {
	from       netip.Addr
	kind, code uint8
	ident, seq uint16
	mtu        uint32
	body       []byte // after 8 bytes: the data of an echo, or the packet that an error quotes
}

// parseICMP reads p; ok is false if it is something else.
func parseICMP(t testing.TB, p []byte) (m icmpMessage, ok bool) {
	t.Helper()
	var b []byte
	if p[0]>>4 == 6 {
		h := header.IPv6(p)
		if h.NextHeader() != uint8(header.ICMPv6ProtocolNumber) {
			return m, false
		}
		b = p[header.IPv6MinimumSize:]
		m.from = addrOf(h.SourceAddress())
		zeroed := slices.Clone(b)
		header.ICMPv6(zeroed).SetChecksum(0)
		want := header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: zeroed, Src: h.SourceAddress(), Dst: h.DestinationAddress()})
		if want != header.ICMPv6(b).Checksum() {
			t.Errorf("ICMPv6 checksum %#x, want %#x", header.ICMPv6(b).Checksum(), want)
		}
		m.mtu = binary.BigEndian.Uint32(b[4:])
	} else {
		h := header.IPv4(p)
		if h.TransportProtocol() != header.ICMPv4ProtocolNumber || h.More() || h.FragmentOffset() != 0 {
			return m, false
		}
		b = p[h.HeaderLength():]
		m.from = addrOf(h.SourceAddress())
		if !h.IsChecksumValid() || checksum.Checksum(b, 0) != 0xffff {
			t.Error("bad IPv4 or ICMP checksum")
		}
		m.mtu = uint32(header.ICMPv4(b).MTU())
	}
	m.kind, m.code = b[0], b[1]
	m.ident, m.seq = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	m.body = b[8:]
	return m, true
}

// answers tells whether m is about the packet: its echo, or an error that quotes it. What comes late for
// another is not.
func (m *icmpMessage) answers(packet []byte) bool {
	l4 := 20
	if packet[0]>>4 == 6 {
		l4 = 40
	}
	if echo := m.kind == 0 || m.kind == 129; echo {
		return m.ident == binary.BigEndian.Uint16(packet[l4+4:]) && m.seq == binary.BigEndian.Uint16(packet[l4+6:])
	}
	return len(m.body) >= l4+8 && sameDestination(m.body, packet)
}

// askICMP sends packets and gives the first ICMP message in answer to the first of them.
func (c *rawClient) askICMP(t testing.TB, wait time.Duration, packets ...[]byte) (icmpMessage, bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), wait)
	defer cancel()
	var m icmpMessage
	p := c.ask(ctx, func(p []byte) (ok bool) {
		m, ok = parseICMP(t, p)
		return ok && m.answers(packets[0])
	}, packets...)
	return m, p != nil
}

// rawRouted is a router to loopback and a client of it.
func rawRouted(t *testing.T) (b *Node, c *rawClient) {
	t.Helper()
	key := newKey(t)
	b = start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/24", "fd66::2/64"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Peers:  []Peer{{Name: "a", PublicKey: key.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")}},
		Router: &RouterConfig{Allow: prefixes(routed4, routed6), Flow: toLoopback},
	})
	c = newRawClient(t, key, b.PublicKey(), netip.MustParseAddrPort("127.0.0.1:0"), b.LocalAddrs()[0].String())
	return b, c
}

// TestRouterErrors: what is told of packets that go nowhere, and by whom. The quoted
// packet is what the client sent.
func TestRouterErrors(t *testing.T) {
	_, c := rawRouted(t)
	addr := netip.MustParseAddr
	own4, own6 := addr("10.66.0.2"), addr("fd66::2")
	for _, x := range []struct {
		name       string
		packet     []byte
		from       netip.Addr
		kind, code uint8 // of the answer; 0xff: none
	}{
		{"own address is pinged", echoRequest(own4, 64, false, 7, 1, []byte("hello")), own4, 0, 0},
		{"own address is pinged, IPv6", echoRequest(own6, 64, false, 7, 1, []byte("hello")), own6, 129, 0},
		{"TTL 1", udpPacket(netip.MustParseAddrPort("203.0.113.1:33434"), 1, false, nil), own4, 11, 0},
		{"hop limit 1", udpPacket(netip.MustParseAddrPort("[2001:db8::1]:33434"), 1, false, nil), own6, 3, 0},
		{"TTL 1, ping", echoRequest(addr("203.0.113.1"), 1, false, 7, 2, nil), own4, 11, 0},
		{"TTL 1 to the node itself", echoRequest(own4, 1, false, 7, 3, nil), own4, 0, 0},
		{"not allowed", udpPacket(netip.MustParseAddrPort("198.51.100.1:53"), 64, false, nil), own4, 3, 13},
		{"not allowed, IPv6", udpPacket(netip.MustParseAddrPort("[2002::1]:53"), 64, false, nil), own6, 1, 1},
		{"not allowed, ping", echoRequest(addr("198.51.100.1"), 64, false, 7, 4, nil), own4, 3, 13},
		{"multicast", udpPacket(netip.MustParseAddrPort("224.0.0.251:5353"), 64, false, nil), own4, 0xff, 0},
		{"multicast, IPv6", udpPacket(netip.MustParseAddrPort("[ff02::fb]:5353"), 64, false, nil), own6, 0xff, 0},
		{"unspecified", udpPacket(netip.MustParseAddrPort("0.0.0.0:53"), 64, false, nil), own4, 0xff, 0},
	} {
		wait := patience
		if x.kind == 0xff {
			wait = 100 * time.Millisecond
		}
		m, ok := c.askICMP(t, wait, x.packet)
		switch {
		case ok != (x.kind != 0xff):
			t.Errorf("%s: an answer: %v", x.name, ok)
		case ok && (m.kind != x.kind || m.code != x.code || m.from != x.from):
			t.Errorf("%s: type %d code %d from %v, want %d %d from %v", x.name, m.kind, m.code, m.from, x.kind, x.code, x.from)
		case ok && m.kind != 0 && m.kind != 129 && !sameDestination(m.body, x.packet):
			t.Errorf("%s: quotes %x, sent %x", x.name, m.body, x.packet)
		}
	}
	// An ICMP error is never answered with one.
	errorPacket := slices.Clone(echoRequest(addr("198.51.100.1"), 1, false, 7, 5, make([]byte, 40)))
	errorPacket[20] = 3
	header.ICMPv4(errorPacket[20:]).SetChecksum(0)
	header.ICMPv4(errorPacket[20:]).SetChecksum(^checksum.Checksum(errorPacket[20:], 0))
	if m, ok := c.askICMP(t, 100*time.Millisecond, errorPacket); ok {
		t.Errorf("an error about an error: %+v", m)
	}
	// A segment of a connection that the router does not know is reset, and so is nothing
	// that is not allowed.
	reset := func(p []byte) bool {
		return header.IPv4(p).TransportProtocol() == header.TCPProtocolNumber && header.TCP(p[20:]).Flags().Contains(header.TCPFlagRst)
	}
	for dst, want := range map[string]bool{"203.0.113.5:80": true, "198.51.100.1:80": false} {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if want {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), patience)
		}
		if got := c.ask(ctx, reset, ackTo(netip.MustParseAddrPort(dst))) != nil; got != want {
			t.Errorf("%s: reset: %v, want %v", dst, got, want)
		}
		cancel()
	}
}

func sameDestination(a, b []byte) bool {
	if a[0]>>4 == 6 {
		return string(a[8:48]) == string(b[8:48])
	}
	return string(a[12:28]) == string(b[12:28])
}

// ackTo is a TCP segment out of nowhere.
func ackTo(dst netip.AddrPort) []byte {
	s := make([]byte, header.TCPMinimumSize)
	header.TCP(s).Encode(&header.TCPFields{SrcPort: 4000, DstPort: dst.Port(), SeqNum: 1, AckNum: 1, DataOffset: 20, Flags: header.TCPFlagAck, WindowSize: 1000})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, stackAddr(client4), stackAddr(dst.Addr()), 20)
	header.TCP(s).SetChecksum(^header.TCP(s).CalculateChecksum(sum))
	return ipPacket(dst.Addr(), header.TCPProtocolNumber, 64, false, s)
}

// inFragments cuts the packet p in two, the first with size bytes after the IP header.
func inFragments(p []byte, size int) [][]byte {
	if p[0]>>4 == 6 {
		piece := func(body []byte, offset int, more byte) []byte {
			q := slices.Concat(p[:header.IPv6MinimumSize], []byte{p[6], 0, byte(offset >> 8), byte(offset) | more, 0, 0, 0, 77}, body)
			header.IPv6(q).SetNextHeader(uint8(header.IPv6FragmentHeader))
			header.IPv6(q).SetPayloadLength(uint16(8 + len(body)))
			return q
		}
		body := p[header.IPv6MinimumSize:]
		return [][]byte{piece(body[:size], 0, 1), piece(body[size:], size, 0)}
	}
	piece := func(body []byte, offset int, flags uint8) []byte {
		q := slices.Concat(p[:header.IPv4MinimumSize], body)
		h := header.IPv4(q)
		h.SetTotalLength(uint16(len(q)))
		h.SetFlagsFragmentOffset(flags, uint16(offset))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		return q
	}
	body := p[header.IPv4MinimumSize:]
	return [][]byte{piece(body[:size], 0, header.IPv4FlagMoreFragments), piece(body[size:], size, 0)}
}

// TestFragmentsVerified: a datagram in fragments, which only whoever puts them together can verify, arrives if its
// checksum is right and else does not, at the node and at a target of its router.
func TestFragmentsVerified(t *testing.T) {
	b, c := rawRouted(t)
	target, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { target.Close() })
	own, err := b.ListenPacket("udp", ":7000")
	if err != nil {
		t.Fatal(err)
	}
	for to, socket := range map[string]net.PacketConn{
		"10.66.0.2:7000": own, "[fd66::2]:7000": own,
		hostPort("203.0.113.9", target.LocalAddr()): target, hostPort("2001:db8::9", target.LocalAddr()): target,
	} {
		for _, size := range []int{100, 1300, 2000, 2400} {
			right := udpPacket(netip.MustParseAddrPort(to), 64, false, randomBytes(size))
			wrong := slices.Clone(right)
			wrong[len(wrong)-1] ^= 1
			for _, p := range [][]byte{wrong, right} {
				for _, f := range inFragments(p, min(1200, size/2&^7)) {
					c.out <- f
				}
			}
			socket.SetReadDeadline(time.Now().Add(patience))
			got := make([]byte, 65536)
			n, _, err := socket.ReadFrom(got)
			if err != nil || string(got[:n]) != string(right[len(right)-size:]) {
				t.Errorf("%s, %d bytes: got %d others, %v", to, size, n, err)
			}
		}
	}
}
