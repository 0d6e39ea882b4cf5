package linkep

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/refs"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	refs.SetLeakMode(refs.LeaksPanic)
	goleak.VerifyTestMain(leakCheck{m})
}

// leakCheck looks for leaked references after the last test.
type leakCheck struct{ m *testing.M }

func (l leakCheck) Run() int {
	code := l.m.Run()
	refs.DoRepeatedLeakCheck() // panics
	return code
}

const nic = 1

// newStack makes a stack with the two addresses on e.
func newStack(t *testing.T, e *Endpoint, addrs ...string) *stack.Stack {
	t.Helper()
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
	})
	t.Cleanup(s.Destroy)
	if err := s.CreateNIC(nic, e); err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		ip := net.ParseIP(a)
		proto, addr := tcpip.NetworkProtocolNumber(ipv6.ProtocolNumber), tcpip.AddrFromSlice(ip)
		if v4 := ip.To4(); v4 != nil {
			proto, addr = ipv4.ProtocolNumber, tcpip.AddrFromSlice(v4)
		}
		pa := tcpip.ProtocolAddress{Protocol: proto, AddressWithPrefix: addr.WithPrefix()}
		if err := s.AddProtocolAddress(nic, pa, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic},
		{Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	return s
}

// carry moves packets from one endpoint to the other until from is closed, superpackets
// unsplit, and calls see for each.
func carry(from, to *Endpoint, see func(*stack.PacketBuffer)) {
	var pkts [32]*stack.PacketBuffer
	for {
		n, err := from.Dequeue(pkts[:])
		if err != nil {
			return
		}
		for _, p := range pkts[:n] {
			see(p)
			to.Deliver(p.CloneToInbound())
			p.DecRef()
		}
	}
}

// TCP between two stacks over two endpoints: superpackets of the promised size leave
// with a partial checksum, and the payload arrives whole.
func TestSuperpacketsBetweenStacks(t *testing.T) {
	for _, family := range []struct {
		name, a, b string
		proto      tcpip.NetworkProtocolNumber
	}{
		{"ipv4", "10.0.0.1", "10.0.0.2", ipv4.ProtocolNumber},
		{"ipv6", "fd00::1", "fd00::2", ipv6.ProtocolNumber},
	} {
		for _, noGSO := range []bool{false, true} {
			name := family.name
			if noGSO {
				name += "/nogso"
			}
			t.Run(name, func(t *testing.T) {
				o := Options{MTU: 1400, NoGSO: noGSO}
				ea, eb := New(o), New(o)
				a, b := newStack(t, ea, family.a), newStack(t, eb, family.b)
				largest, done := 0, make(chan struct{}, 2)
				go func() {
					carry(ea, eb, func(p *stack.PacketBuffer) {
						largest = max(largest, p.Size())
						if noGSO != (p.GSOOptions.Type == stack.GSONone) && p.Data().Size() > 0 {
							t.Errorf("GSO type %v with NoGSO %v", p.GSOOptions.Type, noGSO)
						}
					})
					done <- struct{}{}
				}()
				go func() { carry(eb, ea, func(*stack.PacketBuffer) {}); done <- struct{}{} }()
				defer func() { ea.Close(); eb.Close(); <-done; <-done }()

				transfer(t, a, b, family.proto, net.ParseIP(family.b), 4<<20)
				ea.Close()
				<-done
				done <- struct{}{}
				if noGSO && largest > 1400 {
					t.Errorf("a packet of %d bytes left without GSO", largest)
				}
				if !noGSO && (largest < 60<<10 || largest > 65535) {
					t.Errorf("largest superpacket %d bytes", largest)
				}
			})
		}
	}
}

// transfer sends n random bytes from a to b and compares them.
func transfer(t *testing.T, a, b *stack.Stack, proto tcpip.NetworkProtocolNumber, to net.IP, n int) {
	t.Helper()
	if v4 := to.To4(); v4 != nil {
		to = v4
	}
	addr := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(to), Port: 80}
	l, err := gonet.ListenTCP(b, addr, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := gonet.DialContextTCP(ctx, a, addr, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sent := make([]byte, n)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	s.SetReadDeadline(time.Now().Add(20 * time.Second))
	got, err := io.ReadAll(s)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes arrived, %d sent, or they differ", len(got), n)
	}
}

// A UDP socket whose datagrams are not dequeued waits; it loses none.
func TestUDPSenderWaitsForQueue(t *testing.T) {
	e := New(Options{})
	s := newStack(t, e, "10.0.0.1")
	defer e.Close()
	to := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4([4]byte{10, 0, 0, 2}), Port: 53}
	c, err := gonet.DialUDP(s, nil, &to, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	datagram := make([]byte, 1200)
	sent := 0
	for ; sent < 10000; sent++ {
		if _, err = c.Write(datagram); err != nil {
			break
		}
	}
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() {
		t.Fatalf("after %d datagrams: %v, want a timeout", sent, err)
	}
	var pkts [1024]*stack.PacketBuffer
	got := 0
	for e.Queues()[0].Stats().Depth > 0 {
		n, err := e.Dequeue(pkts[:])
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range pkts[:n] {
			p.DecRef()
		}
		got += n
	}
	if got != sent {
		t.Errorf("%d datagrams sent, %d queued", sent, got)
	}
	c.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(datagram); err != nil {
		t.Errorf("after draining: %v", err)
	}
}

func TestDeliverCountsWhatItCannotDeliver(t *testing.T) {
	e := New(Options{})
	released := 0
	count := func() { released++ }
	e.Deliver(newPacket(0, 0x45, 40, count)) // no stack yet
	s := newStack(t, e, "10.0.0.1")
	e.Deliver(newPacket(0, 0x75, 40, count)) // neither IPv4 nor IPv6
	empty := stack.NewPacketBuffer(stack.PacketBufferOptions{OnRelease: count})
	e.Deliver(empty)
	e.Deliver(newPacket(0, 0x45, 40, count)) // the stack's business, and its counter
	if st := e.Stats(); st.NotAttached != 1 || st.Malformed != 2 {
		t.Errorf("stats %+v", st)
	}
	if released != 4 {
		t.Errorf("%d of 4 packets released", released)
	}
	if n := s.Stats().IP.MalformedPacketsReceived.Value(); n != 1 {
		t.Errorf("the stack saw %d malformed packets, want 1", n)
	}
}

func TestOptions(t *testing.T) {
	e := New(Options{})
	if e.MTU() != DefaultMTU || e.GSOMaxSize() != 65536 || e.SupportedGSO() != stack.HostGSOSupported {
		t.Errorf("defaults: MTU %d, GSO %d %v", e.MTU(), e.GSOMaxSize(), e.SupportedGSO())
	}
	e = New(Options{MTU: 1400, GSOMaxSize: 32 << 10})
	if e.MTU() != 1400 || e.GSOMaxSize() != 32<<10 {
		t.Errorf("MTU %d, GSO %d", e.MTU(), e.GSOMaxSize())
	}
	e.SetMTU(1300)
	if e.MTU() != 1300 {
		t.Errorf("MTU %d after SetMTU", e.MTU())
	}
	if e = New(Options{NoGSO: true}); e.SupportedGSO() != stack.GSONotSupported {
		t.Error("NoGSO ignored")
	}
}

// Packets without a hash of their own are told apart by addresses, protocol and UDP ports.
func TestFlowHash(t *testing.T) {
	e := New(Options{})
	s := newStack(t, e, "10.0.0.1", "fd00::1")
	defer e.Close()
	hashes := map[uint32]string{}
	for _, to := range []string{"10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3"} {
		for _, port := range []uint16{53, 54} {
			ip := net.ParseIP(to)
			proto := tcpip.NetworkProtocolNumber(ipv6.ProtocolNumber)
			if v4 := ip.To4(); v4 != nil {
				ip, proto = v4, ipv4.ProtocolNumber
			}
			addr := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(ip), Port: port}
			c, err := gonet.DialUDP(s, nil, &addr, proto)
			if err != nil {
				t.Fatal(err)
			}
			var seen []uint32
			for range 2 {
				c.Write([]byte("x"))
				var pkts [1]*stack.PacketBuffer
				if _, err := e.Dequeue(pkts[:]); err != nil {
					t.Fatal(err)
				}
				seen = append(seen, flowHash(pkts[0]))
				pkts[0].DecRef()
			}
			c.Close()
			if seen[0] != seen[1] {
				t.Errorf("two packets of one flow hash to %#x and %#x", seen[0], seen[1])
			}
			name := net.JoinHostPort(to, "port")
			if other, ok := hashes[seen[0]]; ok {
				t.Errorf("%s %d and %s hash alike", name, port, other)
			}
			hashes[seen[0]] = name
		}
	}
	if len(hashes) != 8 {
		t.Errorf("%d hashes for 8 flows", len(hashes))
	}
}
