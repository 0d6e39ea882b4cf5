package tunwrap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A forkSide records copies of what it is given.
type forkSide struct {
	got [][]byte
	err error
}

func (s *forkSide) Write(bufs [][]byte, offset int) (int, error) {
	if s.err != nil {
		return 0, s.err
	}
	for _, b := range bufs {
		s.got = append(s.got, bytes.Clone(b[offset:]))
		clear(b) // it may
	}
	return len(bufs), nil
}

// newTestFork makes a fork of a node at 10.0.0.2, 10.0.0.9 and fd00::2.
func newTestFork(others bool) (f *Fork, stack, kernel *forkSide) {
	stack, kernel = new(forkSide), new(forkSide)
	f = NewFork(ForkOptions{
		Stack: stack, Kernel: kernel, OthersToStack: others,
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::2")},
	})
	return f, stack, kernel
}

// icmpPacket is an ICMP message to dst over IPv4 or ICMPv6 over IPv6.
func icmpPacket(dst string, t4, t6 uint8, id uint16, body []byte) []byte {
	d := netip.MustParseAddr(dst)
	s := spec{v6: d.Is6(), dst: d, udp: true, payload: body}
	b := s.full() // UDP's header is as long as ICMP's
	m := b[s.l4Offset():]
	clear(m[:8])
	if d.Is6() {
		b[ip6NextHeader], m[0] = protoICMPv6, t6
	} else {
		b[ip4Proto], m[0] = protoICMP, t4
		header.IPv4(b).SetChecksum(0)
		header.IPv4(b).SetChecksum(^header.IPv4(b).CalculateChecksum())
	}
	binary.BigEndian.PutUint16(m[4:], id)
	return b
}

func udpSpec(dst string, dport uint16) *spec {
	d := netip.MustParseAddr(dst)
	return &spec{v6: d.Is6(), dst: d, udp: true, sport: 99, dport: dport, payload: make([]byte, 64)}
}

func tcpSpec(dst string, dport uint16) *spec {
	s := udpSpec(dst, dport)
	s.udp = false
	return s
}

// quoting is an ICMP error about a packet that the node has sent.
func quoting(dst string, sent []byte) []byte { return icmpPacket(dst, 3, 1, 0, sent) }

// sentFrom is a packet of src to a peer.
func sentFrom(src string, udp bool, sport uint16) []byte {
	a := netip.MustParseAddr(src)
	peer := "10.0.0.1"
	if a.Is6() {
		peer = "fd00::1"
	}
	s := spec{v6: a.Is6(), src: a, dst: netip.MustParseAddr(peer), udp: udp, sport: sport, dport: 7, payload: []byte("data")}
	return s.full()
}

func echoFrom(src string, id uint16) []byte {
	b := icmpPacket(map[bool]string{true: "10.0.0.1", false: "fd00::1"}[netip.MustParseAddr(src).Is4()], 8, 128, id, []byte("data"))
	a := netip.MustParseAddr(src)
	if a.Is4() {
		copy(b[ip4Src:], a.AsSlice())
	} else {
		copy(b[ip6Src:], a.AsSlice())
	}
	return b
}

func TestForkSides(t *testing.T) {
	withOptions := tcpSpec("10.0.0.2", 80)
	withOptions.ipExtra = []byte{1, 1, 1, 1}
	withExtension := tcpSpec("fd00::2", 80)
	withExtension.ext, withExtension.ipExtra = 60, []byte{protoTCP, 0, 1, 4, 0, 0, 0, 0}

	for _, c := range []struct {
		name string
		b    []byte
		want side
	}{
		{"TCP claimed", tcpSpec("10.0.0.2", 80).full(), toStack},
		{"TCP claimed, IPv6", tcpSpec("fd00::2", 80).full(), toStack},
		{"TCP claimed at another address", tcpSpec("10.0.0.9", 80).full(), toKernel},
		{"UDP where TCP is claimed", udpSpec("10.0.0.2", 80).full(), toKernel},
		{"UDP claimed", udpSpec("10.0.0.9", 53).full(), toStack},
		{"TCP where UDP is claimed", tcpSpec("10.0.0.9", 53).full(), toKernel},
		{"TCP unclaimed", tcpSpec("fd00::2", 22).full(), toKernel},
		{"the last port of Linux's", tcpSpec("10.0.0.2", 60999).full(), toKernel},
		{"the first of the stack's", tcpSpec("10.0.0.2", 61000).full(), toStack},
		{"the last port", udpSpec("fd00::2", 65535).full(), toStack},
		{"claimed, with IPv4 options", withOptions.full(), toStack},
		{"claimed, behind an extension header", withExtension.full(), toStack},
		{"to nobody", tcpSpec("10.0.0.3", 80).full(), toKernel},
		{"to nobody, IPv6", udpSpec("fd00::3", 65000).full(), toKernel},
		{"multicast", udpSpec("ff02::1", 65000).full(), toKernel},

		{"echo request", icmpPacket("10.0.0.2", 8, 128, 7, nil), toKernel},
		{"echo request, IPv6", icmpPacket("fd00::2", 8, 128, 7, nil), toKernel},
		{"echo reply claimed", icmpPacket("10.0.0.2", 0, 129, 7, nil), toStack},
		{"echo reply claimed, IPv6", icmpPacket("fd00::2", 0, 129, 7, nil), toStack},
		{"echo reply unclaimed", icmpPacket("fd00::2", 0, 129, 8, nil), toKernel},
		{"a neighbour solicitation", icmpPacket("fd00::2", 0, 135, 7, nil), toKernel},
		{"an error about TCP of the stack", quoting("10.0.0.2", sentFrom("10.0.0.2", false, 61234)), toStack},
		{"an error about TCP of a claimed port", quoting("fd00::2", sentFrom("fd00::2", false, 80)), toStack},
		{"an error about TCP of the kernel", quoting("fd00::2", sentFrom("fd00::2", false, 45678)), toKernel},
		{"an error about UDP of the stack", quoting("10.0.0.9", sentFrom("10.0.0.9", true, 53)), toStack},
		{"an error about UDP of the kernel", quoting("10.0.0.2", sentFrom("10.0.0.2", true, 53)), toKernel},
		{"an error about an echo of the stack", quoting("10.0.0.2", echoFrom("10.0.0.2", 7)), toStack},
		{"an error about an echo of the kernel", quoting("fd00::2", echoFrom("fd00::2", 8)), toKernel},
		{"an error that quotes too little", quoting("fd00::2", sentFrom("fd00::2", false, 80)[:41]), toKernel},

		{"nothing", nil, toStack},
		{"no IP", bytes.Repeat([]byte{0xff}, 60), toStack},
	} {
		f, stack, kernel := newTestFork(false)
		v4, v4b, v6 := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.9"), netip.MustParseAddr("fd00::2")
		f.Claim(ClaimTCP, 80, v4, v6)
		f.Claim(ClaimUDP, 53, v4b)
		f.Claim(ClaimEcho, 7, v4, v6)
		buf := append(make([]byte, 5), c.b...)
		if n, err := f.Write([][]byte{buf}, 5); n != 1 || err != nil {
			t.Errorf("%s: %d, %v", c.name, n, err)
		}
		got, other := kernel, stack
		if c.want == toStack {
			got, other = stack, kernel
		}
		if len(got.got) != 1 || !bytes.Equal(got.got[0], c.b) || len(other.got) != 0 {
			t.Errorf("%s: %d to the stack, %d to the kernel", c.name, len(stack.got), len(kernel.got))
		}
		if s := f.Stats(); s.ToStack != uint64(len(stack.got)) || s.ToKernel != uint64(len(kernel.got)) {
			t.Errorf("%s: %+v", c.name, s)
		}
	}
}

// With a router, what is not the node's is the stack's; what is stays divided.
func TestForkRouter(t *testing.T) {
	f, stack, kernel := newTestFork(true)
	f.Write([][]byte{
		tcpSpec("192.0.2.1", 80).full(), tcpSpec("10.0.0.2", 80).full(), icmpPacket("2001:db8::1", 8, 128, 1, nil),
	}, 0)
	if len(stack.got) != 2 || len(kernel.got) != 1 {
		t.Errorf("%d to the stack, %d to the kernel", len(stack.got), len(kernel.got))
	}
	if !f.FromStack(sentFrom("10.9.9.9", false, 80)) || f.FromStack(sentFrom("10.0.0.2", false, 80)) {
		t.Error("what comes from the router's targets is the stack's, what comes from here is not")
	}
}

// A batch is divided in order.
func TestForkOrder(t *testing.T) {
	for _, pattern := range []string{"sssss", "kkkkk", "skskk", "kssss", "ssssk", "k"} {
		f, stack, kernel := newTestFork(false)
		var want [2][][]byte
		var all [][]byte
		for i, c := range pattern {
			s := udpSpec("10.0.0.2", 53)
			at := 0
			if c == 's' {
				s.dport, at = 65000, 1
			}
			s.payload[0] = byte(i)
			b := s.full()
			want[at] = append(want[at], bytes.Clone(b))
			all = append(all, b)
		}
		if n, err := f.Write(all, 0); n != len(all) || err != nil {
			t.Errorf("%s: %d, %v", pattern, n, err)
		}
		for at, got := range [][][]byte{kernel.got, stack.got} {
			if len(got) != len(want[at]) {
				t.Errorf("%s: %d, want %d", pattern, len(got), len(want[at]))
				continue
			}
			for i := range got {
				if !bytes.Equal(got[i], want[at][i]) {
					t.Errorf("%s: packet %d differs", pattern, i)
				}
			}
		}
	}
}

// An error of one side does not keep the other from its packets.
func TestForkError(t *testing.T) {
	f, stack, kernel := newTestFork(false)
	kernel.err = os.ErrClosed
	_, err := f.Write([][]byte{udpSpec("10.0.0.2", 53).full(), udpSpec("10.0.0.2", 65000).full()}, 0)
	if !errors.Is(err, os.ErrClosed) || len(stack.got) != 1 {
		t.Errorf("%v, %d to the stack", err, len(stack.got))
	}
}

// Claims add up, and the last release counts.
func TestForkClaims(t *testing.T) {
	f, _, _ := newTestFork(false)
	b := tcpSpec("10.0.0.2", 80).full()
	a := netip.MustParseAddr("10.0.0.2")
	one := f.Claim(ClaimTCP, 80, a, netip.MustParseAddr("192.0.2.1"))
	two := f.Claim(ClaimTCP, 80, a, netip.MustParseAddr("10.0.0.9"))
	one()
	one() // counts once
	if f.sideOf(b) != toStack {
		t.Error("the other claim is gone")
	}
	two()
	if f.sideOf(b) != toKernel || f.sideOf(tcpSpec("10.0.0.9", 80).full()) != toKernel {
		t.Error("a claim is left")
	}
	if len(f.claims) != 0 {
		t.Errorf("left: %v", f.claims)
	}
}

// pieces cuts a packet in fragments.
func pieces(t *testing.T, s *spec, id uint32) [][]byte {
	t.Helper()
	var all [][]byte
	if !s.v6 {
		s.id = uint16(id)
		if !fragment(s.full(), 48, func(head, payload []byte) { all = append(all, append(bytes.Clone(head), payload...)) }) {
			t.Fatal("no fragments")
		}
		return all
	}
	b := s.full()
	payload := b[40:]
	for at := 0; at < len(payload); at += 24 {
		end := min(at+24, len(payload))
		p := append(bytes.Clone(b[:40]), b[ip6NextHeader], 0, 0, 0, 0, 0, 0, 0)
		word := uint16(at)
		if end < len(payload) {
			word |= 1
		}
		binary.BigEndian.PutUint16(p[42:], word)
		binary.BigEndian.PutUint32(p[44:], id)
		p[ip6NextHeader] = 44
		p = append(p, payload[at:end]...)
		binary.BigEndian.PutUint16(p[ip6PayloadLen:], uint16(len(p)-40))
		all = append(all, p)
	}
	return all
}

// Fragments follow the first one; those before it go to both sides, each with a copy.
func TestForkFragments(t *testing.T) {
	for _, dst := range []string{"10.0.0.2", "fd00::2"} {
		for _, port := range []uint16{53, 65000} {
			f, stack, kernel := newTestFork(false)
			frags := pieces(t, udpSpec(dst, port), 77)
			whole := bytes.Join(frags, nil)
			for _, p := range frags {
				f.Write([][]byte{bytes.Clone(p)}, 0)
			}
			got, other := kernel, stack
			if port == 65000 {
				got, other = stack, kernel
			}
			if len(frags) < 3 || !bytes.Equal(bytes.Join(got.got, nil), whole) || len(other.got) != 0 {
				t.Errorf("%s port %d in order: %d of %d and %d", dst, port, len(got.got), len(frags), len(other.got))
			}

			got.got, other.got = nil, nil
			late := pieces(t, udpSpec(dst, port), 78)
			f.Write([][]byte{bytes.Clone(late[1]), bytes.Clone(late[0]), bytes.Clone(late[2])}, 0)
			want := [][]byte{late[1], late[0], late[2]}
			if !bytes.Equal(bytes.Join(got.got, nil), bytes.Join(want, nil)) || len(other.got) != 1 || !bytes.Equal(other.got[0], late[1]) {
				t.Errorf("%s port %d out of order: %d and %d", dst, port, len(got.got), len(other.got))
			}
		}
	}
}

// What a peer calls the node counts as the node's, for that peer only.
func TestForkNAT(t *testing.T) {
	f, stack, kernel := newTestFork(true)
	out := netip.MustParseAddr("172.16.0.7")
	f.SetNAT([]NATRule{{Peer: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, Inside: netip.MustParseAddr("10.0.0.2"), Outside: out}})
	from := func(src string, port uint16) []byte {
		s := udpSpec("172.16.0.7", port)
		s.src = netip.MustParseAddr(src)
		return s.full()
	}
	f.Write([][]byte{from("10.1.2.3", 53)}, 0)
	if len(kernel.got) != 1 {
		t.Error("to the kernel")
	}
	f.Write([][]byte{from("10.1.2.3", 65000)}, 0)
	f.Write([][]byte{from("10.2.2.3", 53)}, 0) // of this peer it is an address behind the router
	if len(stack.got) != 2 || len(kernel.got) != 1 {
		t.Errorf("%d to the stack, %d to the kernel", len(stack.got), len(kernel.got))
	}
	sent := spec{src: out, dst: netip.MustParseAddr("10.1.2.3"), sport: 65000}
	if !f.FromStack(sent.full()) {
		t.Error("NATed and from the stack")
	}
	sent.sport = 53
	if f.FromStack(sent.full()) {
		t.Error("NATed and from the kernel")
	}
}

func TestForkFromStack(t *testing.T) {
	f, _, _ := newTestFork(false)
	f.Claim(ClaimTCP, 80, netip.MustParseAddr("10.0.0.2"))
	f.Claim(ClaimEcho, 9, netip.MustParseAddr("fd00::2"))
	for _, c := range []struct {
		name string
		b    []byte
		want bool
	}{
		{"claimed", sentFrom("10.0.0.2", false, 80), true},
		{"stack's range", sentFrom("fd00::2", true, 61000), true},
		{"kernel's", sentFrom("fd00::2", true, 60999), false},
		{"forwarded by the kernel", sentFrom("10.5.5.5", true, 61000), false},
		{"echo", echoFrom("fd00::2", 9), true},
		{"the kernel's echo", echoFrom("fd00::2", 10), false},
	} {
		if got := f.FromStack(c.b); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}

type writerFunc func(bufs [][]byte, offset int) (int, error)

func (w writerFunc) Write(bufs [][]byte, offset int) (int, error) { return w(bufs, offset) }

// Whatever comes, each packet goes to one side as it is, or to both as a fragment.
func FuzzFork(f *testing.F) {
	for _, b := range [][]byte{
		tcpSpec("10.0.0.2", 80).full(), udpSpec("fd00::2", 65000).full(), icmpPacket("10.0.0.2", 0, 129, 7, nil),
		quoting("fd00::2", sentFrom("fd00::2", false, 80)), udpSpec("192.0.2.1", 1).full(),
	} {
		f.Add(b, uint8(20))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint8) {
		fork, stack, kernel := newTestFork(false)
		fork.Claim(ClaimTCP, 80, netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"))
		at := min(int(cut), len(b))
		input := [][]byte{b[:at], b[at:], b}
		var bufs [][]byte
		for _, p := range input {
			bufs = append(bufs, bytes.Clone(p))
		}
		if n, err := fork.Write(bufs, 0); n != len(input) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		s, k := stack.got, kernel.got
		for i, p := range input {
			inStack := len(s) > 0 && bytes.Equal(s[0], p)
			inKernel := len(k) > 0 && bytes.Equal(k[0], p)
			switch {
			case inStack && inKernel && len(s) > 0 && len(k) > 0:
				l, d := locate(p, len(p))
				if d == DropNone && l.later {
					s, k = s[1:], k[1:]
					continue
				}
				// Equal packets are decided alike.
				t.Fatalf("packet %d was given to both", i)
			case inStack:
				s = s[1:]
			case inKernel:
				k = k[1:]
			default:
				t.Fatalf("packet %d is lost or out of order", i)
			}
		}
		if len(s)+len(k) != 0 {
			t.Fatalf("%d left at the stack, %d at the kernel", len(s), len(k))
		}
		for _, p := range input {
			fork.FromStack(p)
		}
	})
}

func BenchmarkFork(b *testing.B) {
	drop := writerFunc(func(bufs [][]byte, _ int) (int, error) { return len(bufs), nil })
	f := NewFork(ForkOptions{Stack: drop, Kernel: drop, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}})
	bufs := make([][]byte, 64)
	for i := range bufs {
		bufs[i] = tcpSpec("10.0.0.2", 22).full()
	}
	for b.Loop() {
		f.Write(bufs, 0)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(bufs)), "ns/packet")
}
