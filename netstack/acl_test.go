package netstack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestACLConfigErrors(t *testing.T) {
	for _, c := range []struct {
		rule   ACLRule
		limits ACLLimits
		want   []string
	}{
		{ACLRule{}, ACLLimits{}, nil},
		{ACLRule{Direction: "inbound"}, ACLLimits{}, []string{"ACL[0].Direction"}},
		{ACLRule{Protocol: "gre"}, ACLLimits{}, []string{"ACL[0].Protocol"}},
		{ACLRule{Protocol: "icmp", Ports: []PortRange{{1, 2}}}, ACLLimits{}, []string{"ACL[0].Ports"}},
		{ACLRule{Ports: []PortRange{{1, 2}, {0, 2}, {3, 2}}}, ACLLimits{}, []string{"ACL[0].Ports[1]", "ACL[0].Ports[2]"}},
		{ACLRule{From: prefixes("10.0.0.1/24"), To: []netip.Prefix{{}}}, ACLLimits{}, []string{"ACL[0].From[0]", "ACL[0].To[0]"}},
		{ACLRule{}, ACLLimits{Flows: -1, FlowsPerPeer: -1, TCPIdle: -1, UDPIdle: -1},
			[]string{"ACLLimits.Flows", "ACLLimits.FlowsPerPeer", "ACLLimits.TCPIdle", "ACLLimits.UDPIdle"}},
	} {
		n, err := New(Config{
			PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24"), ACL: []ACLRule{c.rule}, ACLLimits: c.limits,
			Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		})
		if err == nil {
			n.Close()
		}
		if got := keysOf(t, err); !slices.Equal(got, c.want) {
			t.Errorf("New complains of %v, want %v", got, c.want)
		}
	}
}

// silence is how long a test waits for an answer that must not come.
const silence = 300 * time.Millisecond

// echoServer answers on port 7 of n, TCP and UDP.
func echoServer(t *testing.T, n *Node) {
	l, err := n.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	pc, err := n.ListenPacket("udp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); pc.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	go func() {
		b := make([]byte, 1<<16)
		for {
			k, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			pc.WriteTo(b[:k], from)
		}
	}()
}

// roundTrip sends data over c and wants it back within d.
func roundTrip(c net.Conn, data []byte, d time.Duration) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(d))
	sent := make(chan error, 1)
	go func() { _, err := c.Write(data); sent <- err }()
	back := make([]byte, len(data))
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if !bytes.Equal(back, data) {
		return errors.New("something else came back")
	}
	return <-sent
}

// reaches tells whether from reaches addr within d, in the way of network: "tcp", "udp" or "ping".
func reaches(t *testing.T, from *Node, network, addr string, data []byte, d time.Duration) error {
	t.Helper()
	if network == "ping" {
		host, _, _ := net.SplitHostPort(addr)
		_, err := from.Ping(within(t, d), netip.MustParseAddr(host), PingOptions{})
		return err
	}
	c, err := from.Dial(within(t, d), network, addr)
	if err != nil {
		return err
	}
	return roundTrip(c, data, d)
}

// TestACL: node b lets a in by TCP port 7, UDP port 7 and ping, and goes nowhere itself.
func TestACL(t *testing.T) {
	var keyA PublicKey
	a, b := pair(t, func(ca, cb *Config) {
		keyA = ca.PrivateKey.Public()
		cb.ACL = []ACLRule{
			{Deny: true, Protocol: "udp", Direction: "in", To: prefixes("fd66::2/128")},
			{Direction: "in", Peer: keyA, Ports: []PortRange{{7, 7}}},
			{Direction: "in", Protocol: "icmp"},
		}
	})
	echoServer(t, a)
	echoServer(t, b)
	big := randomBytes(4 << 20)
	for _, c := range []struct {
		from    *Node
		network string
		addr    string
		data    []byte
		ok      bool
	}{
		{a, "tcp", "10.66.0.2:7", big, true},
		{a, "tcp", "[fd66::2]:7", big, true},
		{a, "tcp", "10.66.0.2:8", nil, false}, // a refusal without the filter
		{a, "tcp", "[fd66::2]:8", nil, false},
		{a, "udp", "10.66.0.2:7", big[:100], true},
		{a, "udp", "10.66.0.2:7", big[:6000], true}, // fragments
		{a, "udp", "[fd66::2]:7", big[:100], false},
		{a, "ping", "10.66.0.2:0", nil, true},
		{a, "ping", "[fd66::2]:0", nil, true},
		{b, "tcp", "10.66.0.1:7", big[:9], false},
		{b, "tcp", "[fd66::1]:7", big[:9], false},
		{b, "udp", "10.66.0.1:7", big[:9], false},
		{b, "ping", "10.66.0.1:0", nil, false},
		{b, "ping", "[fd66::1]:0", nil, false},
	} {
		wait := silence
		if c.ok {
			wait = patience
		}
		err := reaches(t, c.from, c.network, c.addr, c.data, wait)
		if c.ok != (err == nil) {
			t.Errorf("%s %s: %v, want success %v", c.network, c.addr, err, c.ok)
		}
		if !c.ok && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s %s: %v, want silence", c.network, c.addr, err)
		}
	}
	s := b.Status()
	rules := s.ACL.Rules
	if want := "allow in peer a ports 7"; rules[1].Rule != want {
		t.Errorf("rule %q, want %q", rules[1].Rule, want)
	}
	if rules[0].Inbound.Packets != 1 || rules[0].Flows != 0 {
		t.Errorf("the denying rule: %+v", rules[0])
	}
	// Two connections and two flows of UDP; 8 MiB each way, in superpackets.
	if r := rules[1]; r.Flows != 4 || r.Inbound.Bytes < 8<<20 || r.Outbound.Bytes < 8<<20 || r.Outbound.Bytes/r.Outbound.Packets < 4000 {
		t.Errorf("the rule for port 7: %+v", r)
	}
	if r := rules[2]; r.Flows != 2 || r.Outbound.Packets != 2 {
		t.Errorf("the rule for ping: %+v", r)
	}
	dropped := s.Drops["refused by the packet filter"]
	if s.ACL.NoRule.Packets < 7 || dropped != s.ACL.NoRule.Packets+s.ACL.Unknown.Packets+s.ACL.Full.Packets+1 {
		t.Errorf("%d drops, %+v", dropped, s.ACL)
	}
	if a.Status().ACL != nil {
		t.Error("a node without rules has a filter")
	}
}

// TestACLPeers: the rules follow the peers that come and go.
func TestACLPeers(t *testing.T) {
	a, b := pair(t, func(ca, cb *Config) {
		cb.ACL = []ACLRule{{Direction: "in", Peer: ca.PrivateKey.Public(), Protocol: "tcp"}}
	})
	echoServer(t, b)
	if err := reaches(t, a, "tcp", "10.66.0.2:7", []byte("hello"), patience/10); err != nil {
		t.Fatal(err)
	}
	peer := Peer{Name: "renamed", PublicKey: a.PublicKey(), AllowedIPs: prefixes("10.66.0.1/32")}
	if err := b.RemovePeer(a.PublicKey()); err != nil {
		t.Fatal(err)
	}
	if n := b.Status().ACL.Flows; n != 0 {
		t.Errorf("%d flows of a peer that is gone", n)
	}
	if err := b.AddPeer(peer); err != nil {
		t.Fatal(err)
	}
	if err := b.AddPeer(peer); err == nil {
		t.Error("a peer twice")
	}
	if err := a.WaitEstablished(within(t, patience), b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); {
		if err = reaches(t, a, "tcp", "10.66.0.2:7", []byte("hello"), patience/10); err == nil {
			break
		}
	}
	if err != nil {
		t.Error("after the peer has come back:", err)
	}
	if got, want := b.Status().ACL.Rules[0].Rule, "allow in peer renamed tcp"; got != want {
		t.Errorf("rule %q, want %q", got, want)
	}
}

// TestACLHostile: a peer with its own stack sends what no stack would. Nothing of it opens a way in, and
// another peer's connections go on.
func TestACLHostile(t *testing.T) {
	evil, good := newKey(t), newKey(t)
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	b := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/24", "fd66::2/64"), Listen: loopback,
		Peers: []Peer{
			{Name: "evil", PublicKey: evil.Public(), AllowedIPs: prefixes("10.66.0.1/32", "fd66::1/128")},
			{Name: "good", PublicKey: good.Public(), AllowedIPs: prefixes("10.66.0.3/32")},
		},
		ACL:       []ACLRule{{Direction: "in", Peer: evil.Public(), Ports: []PortRange{{9, 9}}}, {Direction: "in", Peer: good.Public()}},
		ACLLimits: ACLLimits{Flows: 1000, FlowsPerPeer: 400},
	})
	echoServer(t, b)
	c := newRawClient(t, evil, b.PublicKey(), loopback[0], b.LocalAddrs()[0].String())
	a := start(t, Config{
		PrivateKey: good, Addresses: prefixes("10.66.0.3/24"), Listen: loopback,
		Peers: []Peer{{PublicKey: b.PublicKey(), AllowedIPs: prefixes("10.66.0.2/32"), Endpoint: b.LocalAddrs()[0].String()}},
	})
	if err := a.WaitEstablished(within(t, patience), b.PublicKey()); err != nil {
		t.Fatal(err)
	}
	old, err := a.Dial(within(t, patience), "tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}

	tcp := func(from, to uint16, flags header.TCPFlags) []byte {
		p := ackTo(netip.AddrPortFrom(netip.MustParseAddr("10.66.0.2"), to))
		h := header.TCP(p[20:])
		h.SetSourcePort(from)
		h.SetFlags(uint8(flags))
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, stackAddr(client4), stackAddr(netip.MustParseAddr("10.66.0.2")), 20)))
		return p
	}
	// A RST, and every other sort of packet, to a port where somebody listens behind the filter; then the SYN.
	for _, flags := range []header.TCPFlags{
		header.TCPFlagRst, header.TCPFlagRst | header.TCPFlagAck, header.TCPFlagAck, header.TCPFlagFin, header.TCPFlagSyn | header.TCPFlagAck, header.TCPFlagSyn | header.TCPFlagFin, 0, header.TCPFlagSyn,
	} {
		if p := c.ask(within(t, silence/4), func([]byte) bool { return true }, tcp(1, 7, flags), tcp(1, 7, header.TCPFlagSyn)); p != nil {
			t.Errorf("flags %v: answered with %x", flags, p)
		}
	}
	if n := b.Status().ACL.Flows; n != 1 {
		t.Errorf("%d flows, want the one of the other peer", n)
	}
	// Its own share of the table, and more.
	for i := range uint16(2000) {
		c.out <- tcp(1000+i, 9, header.TCPFlagSyn)
	}
	for end := time.Now().Add(patience); b.Status().ACL.Full.Packets < 1600; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v", b.Status().ACL)
		}
	}
	if s := b.Status().ACL; s.Flows != 401 {
		t.Errorf("%d flows, want 400 and the old one", s.Flows)
	}
	if err := roundTrip(old, randomBytes(1<<20), patience); err != nil {
		t.Error("the old connection:", err)
	}
	if err := reaches(t, a, "tcp", "10.66.0.2:7", randomBytes(1<<20), patience); err != nil {
		t.Error("a new connection:", err)
	}
}

// TestACLMembers: a member of the VPN by a session has a share of its own, and what it began ends with it.
func TestACLMembers(t *testing.T) {
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.2/24"), Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		ACL: []ACLRule{{Direction: "in"}}, ACLLimits: ACLLimits{Flows: 10, FlowsPerPeer: 5},
	})
	stay, leaver := &member{name: "stays", allowed: prefixes("10.66.0.9/32")}, &member{name: "goes", allowed: prefixes("10.66.0.1/32")}
	change := func(do func()) { n.mu.Lock(); defer n.mu.Unlock(); do() }
	change(func() { n.enterLocked(stay); n.enterLocked(leaver) })
	send := func() { // from 10.66.0.1
		for port := range uint16(8) {
			p := udpPacket(netip.AddrPortFrom(netip.MustParseAddr("10.66.0.2"), 100+port), 64, false, []byte("x"))
			if _, err := n.wrapper.Write([][]byte{p}, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	send()
	if s := n.Status().ACL; s.Flows != 5 || s.Full.Packets != 3 {
		t.Errorf("%+v, want the five flows of its share", s)
	}
	change(func() { n.leaveLocked(leaver) })
	if s := n.Status().ACL; s.Flows != 0 {
		t.Errorf("%d flows are left of a member that has gone", s.Flows)
	}
	change(func() { n.leaveLocked(stay) })
}
