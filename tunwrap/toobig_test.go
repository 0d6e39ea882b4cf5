package tunwrap

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// tell calls TooBig and returns what the stack gets and the fragments queued.
func tell(w *Wrapper, link *fakeLink, packet []byte, mtu int) (messages, fragments [][]byte) {
	link.delivered = func(pkt *stack.PacketBuffer) { messages = append(messages, bytesOf(pkt)) }
	link.requeued = func(pkt *stack.PacketBuffer) { fragments = append(fragments, bytesOf(pkt)) }
	before := bytes.Clone(packet)
	w.TooBig(packet, mtu)
	if !bytes.Equal(before, packet) {
		panic("TooBig has changed the packet")
	}
	return messages, fragments
}

func TestTooBigMessage(t *testing.T) {
	for _, c := range []struct {
		name           string
		spec           spec
		mtu, reported  int
		quoted         int
		nat            bool
		quotedSrc, dst string
	}{
		{name: "IPv4", spec: spec{df: true}, mtu: 1300, reported: 1300, quoted: 548, quotedSrc: "10.0.0.1"},
		{name: "IPv4 UDP", spec: spec{df: true, udp: true}, mtu: 1399, reported: 1399, quoted: 548, quotedSrc: "10.0.0.1"},
		{name: "IPv4 options", spec: spec{df: true, ipExtra: ip4Options}, mtu: 1300, reported: 1300, quoted: 548, quotedSrc: "10.0.0.1"},
		{name: "IPv4 tiny", spec: spec{df: true}, mtu: 20, reported: 68, quoted: 548, quotedSrc: "10.0.0.1"},
		{name: "IPv4 NAT", spec: spec{df: true}, mtu: 1300, reported: 1300, quoted: 548, nat: true, quotedSrc: "172.16.0.9"},
		{name: "IPv6", spec: spec{v6: true}, mtu: 1300, reported: 1300, quoted: 1232, quotedSrc: "fd00::1"},
		{name: "IPv6 UDP", spec: spec{v6: true, udp: true}, mtu: 1300, reported: 1300, quoted: 1232, quotedSrc: "fd00::1"},
		{name: "IPv6 tiny", spec: spec{v6: true}, mtu: 1000, reported: 1280, quoted: 1232, quotedSrc: "fd00::1"},
		{name: "IPv6 NAT", spec: spec{v6: true}, mtu: 1300, reported: 1300, quoted: 1232, nat: true, quotedSrc: "fd99::9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			link := new(fakeLink)
			w := New(link, Options{})
			defer w.Close()
			if c.nat {
				peer := []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("fd00::2/128")}
				if err := w.SetNAT([]NATRule{
					{Peer: peer, Inside: netip.MustParseAddr("172.16.0.9"), Outside: netip.MustParseAddr("10.0.0.1")},
					{Peer: peer, Inside: netip.MustParseAddr("fd99::9"), Outside: netip.MustParseAddr("fd00::1")},
				}); err != nil {
					t.Fatal(err)
				}
			}
			c.spec.flags, c.spec.payload = ack, payload(1400-c.spec.hdrLen())
			b := c.spec.full()
			ms, fs := tell(w, link, b, c.mtu)
			if len(ms) != 1 || len(fs) != 0 {
				t.Fatalf("%d messages, %d fragments; drops %v", len(ms), len(fs), w.Drops())
			}
			m := ms[0]
			if err := valid(m); err != nil {
				t.Fatal(err)
			}
			var quote []byte
			var mtu int
			var src, dst netip.Addr
			if c.spec.v6 {
				h := header.ICMPv6(m[40:])
				if h.Type() != header.ICMPv6PacketTooBig || h.Code() != 0 || len(m) > 1280 {
					t.Fatalf("%x", m)
				}
				quote, mtu = m[48:], int(h.MTU())
				src, dst = netip.AddrFrom16([16]byte(m[8:24])), netip.AddrFrom16([16]byte(m[24:40]))
			} else {
				h := header.ICMPv4(m[20:])
				if h.Type() != header.ICMPv4DstUnreachable || h.Code() != header.ICMPv4FragmentationNeeded || len(m) > 576 {
					t.Fatalf("%x", m)
				}
				quote, mtu = m[28:], int(h.MTU())
				src, dst = netip.AddrFrom4([4]byte(m[12:16])), netip.AddrFrom4([4]byte(m[16:20]))
			}
			inside := c.spec
			inside.src = netip.MustParseAddr(c.quotedSrc)
			if want := inside.full()[:c.quoted]; !bytes.Equal(quote, want) {
				t.Errorf("quotes\n%x\nwant\n%x", quote, want)
			}
			if mtu != c.reported {
				t.Errorf("MTU %d", mtu)
			}
			if _, d := c.spec.addrs(); src != d || dst != inside.src {
				t.Errorf("from %v to %v", src, dst)
			}
			if s := w.Stats(); s.TooBig != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestTooBigSilence(t *testing.T) {
	icmp := func(v6 bool, typ uint8) []byte {
		s := spec{v6: v6, df: true, payload: payload(1400)}
		b := s.full()
		b[[]int{9, 6}[b2i(v6)]] = []uint8{1, 58}[b2i(v6)]
		b[s.l4Offset()] = typ
		return b
	}
	to := func(v6 bool, src, dst string) []byte {
		s := spec{v6: v6, df: true, payload: payload(1400), src: netip.MustParseAddr(src), dst: netip.MustParseAddr(dst)}
		return s.full()
	}
	offset := to(false, "10.0.0.1", "10.0.0.2")
	offset[7] = 8
	laterFragment := spec{v6: true, payload: payload(1400), ipExtra: []byte{6, 0, 0, 8, 1, 2, 3, 4}, ext: 44}
	small := spec{v6: true, payload: payload(1200)}
	deathOffset := fullOf(spec{payload: payload(1400)})
	deathOffset[6], deathOffset[7] = 0x1f, 0xff
	noRoom := spec{payload: payload(100), ipExtra: bytes.Repeat([]byte{1}, 40)}
	fits := spec{payload: payload(100)}
	for _, c := range []struct {
		name string
		b    []byte
		mtu  int
		want Drop
	}{
		{"unreachable", icmp(false, 3), 1300, DropTooBig},
		{"source quench", icmp(false, 4), 1300, DropTooBig},
		{"redirect", icmp(false, 5), 1300, DropTooBig},
		{"time exceeded", icmp(false, 11), 1300, DropTooBig},
		{"parameter problem", icmp(false, 12), 1300, DropTooBig},
		{"ICMPv6 unreachable", icmp(true, 1), 1300, DropTooBig},
		{"ICMPv6 unknown error", icmp(true, 127), 1300, DropTooBig},
		{"multicast", to(false, "10.0.0.1", "224.0.0.251"), 1300, DropTooBig},
		{"broadcast", to(false, "10.0.0.1", "255.255.255.255"), 1300, DropTooBig},
		{"nobody's", to(false, "0.0.0.0", "10.0.0.1"), 1300, DropTooBig},
		{"loopback", to(false, "127.0.0.1", "10.0.0.1"), 1300, DropTooBig},
		{"multicast source", to(false, "224.0.0.1", "10.0.0.1"), 1300, DropTooBig},
		{"IPv6 multicast", to(true, "fd00::1", "ff02::1"), 1300, DropTooBig},
		{"IPv6 nobody's", to(true, "::", "fd00::1"), 1300, DropTooBig},
		{"later fragment with DF", offset, 1300, DropTooBig},
		{"later IPv6 fragment", laterFragment.full(), 1300, DropTooBig},
		{"below the minimum of IPv6", small.full(), 1000, DropTooBig},
		{"no room for a fragment", noRoom.full(), 67, DropTooBig},
		{"beyond 64 KiB", deathOffset, 1300, DropTooBig},
		{"fits", fits.full(), 140, DropTooBig},
		{"no packet", []byte{0x45}, 1300, DropMalformed},
	} {
		t.Run(c.name, func(t *testing.T) {
			link := new(fakeLink)
			w := New(link, Options{})
			defer w.Close()
			ms, fs := tell(w, link, c.b, c.mtu)
			if len(ms) != 0 || len(fs) != 0 {
				t.Errorf("%d messages, %d fragments", len(ms), len(fs))
			}
			if d := w.Drops(); d[c.want] != 1 || d.Total() != 1 {
				t.Errorf("drops %v", d)
			}
		})
	}
	// The requests and replies of ICMP are packets like others.
	for _, typ := range []uint8{0, 8} {
		link := new(fakeLink)
		w := New(link, Options{})
		if ms, _ := tell(w, link, icmp(false, typ), 1300); len(ms) != 1 {
			t.Errorf("ICMP type %d: %d messages", typ, len(ms))
		}
		w.Close()
	}
}

func TestTooBigRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		link := new(fakeLink)
		w := New(link, Options{})
		defer w.Close()
		flow := func(port uint16) []byte {
			s := spec{v6: true, sport: port, payload: payload(1400)}
			return s.full()
		}
		said := func(b []byte, mtu int) bool {
			ms, _ := tell(w, link, b, mtu)
			return len(ms) == 1
		}
		if !said(flow(1), 1400) || said(flow(1), 1400) {
			t.Error("a flow is told once")
		}
		if !said(flow(2), 1400) || !said(flow(1), 1399) {
			t.Error("another flow and another MTU are news")
		}
		time.Sleep(tooBigQuiet)
		if !said(flow(1), 1400) {
			t.Error("later the flow is told again")
		}
		n := 0
		for port := range uint16(5000) {
			n += b2i(said(flow(port), 1300))
		}
		if n > tooBigBurst || n < tooBigBurst-4 {
			t.Errorf("%d messages at once", n)
		}
		if d := w.Drops(); d[DropTooBigRate] != uint64(1+5000-n) {
			t.Errorf("drops %v", d)
		}
		time.Sleep(time.Second)
		if !said(flow(1), 1290) {
			t.Error("the limit does not recover")
		}
	})
}

// A path that is narrower than the link must not stop a transfer, with and without NAT.
func TestTooBigTCP(t *testing.T) {
	for family, name := range []string{"IPv4", "IPv6"} {
		for _, nat := range []bool{false, true} {
			t.Run(name+[]string{"", "/NAT"}[b2i(nat)], func(t *testing.T) {
				a := newNode(t, 1400, "10.0.0.1", "fd00::1")
				b := newNode(t, 1400, "10.0.0.2", "fd00::2")
				if nat {
					p := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
					if err := a.SetNAT([]NATRule{
						{Peer: p, Inside: netip.MustParseAddr("10.0.0.1"), Outside: netip.MustParseAddr("10.99.0.1")},
						{Peer: p, Inside: netip.MustParseAddr("fd00::1"), Outside: netip.MustParseAddr("fd99::1")},
					}); err != nil {
						t.Fatal(err)
					}
				}
				const path = 1301
				stop := join(t, a, b, 128, func(from *node, packet []byte) bool {
					if len(packet) <= path {
						return true
					}
					from.TooBig(packet, path)
					return false
				})
				defer stop()
				transfer(t, a, b, family, 4<<20)
				if s := a.Wrapper.Stats(); s.TooBig == 0 || s.Fragments != 0 {
					t.Errorf("%+v", s)
				}
			})
		}
	}
}

// Datagrams without DF go through a narrow path in fragments.
func TestTooBigUDP(t *testing.T) {
	a := newNode(t, 1400, "10.0.0.1", "fd00::1")
	b := newNode(t, 1400, "10.0.0.2", "fd00::2")
	const path = 577
	stop := join(t, a, b, 128, func(from *node, packet []byte) bool {
		if len(packet) <= path {
			return true
		}
		from.TooBig(packet, path)
		return false
	})
	defer stop()
	at, proto := b.full(0, 7)
	server, err := gonet.DialUDP(b.Stack, &at, nil, proto)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	var wq waiter.Queue
	ep, terr := a.NewEndpoint(udp.ProtocolNumber, proto, &wq)
	if terr != nil {
		t.Fatal(terr)
	}
	// gVisor sets DF on UDP unless told otherwise.
	if terr := ep.SetSockOptInt(tcpip.MTUDiscoverOption, int(tcpip.PMTUDiscoveryDont)); terr != nil {
		t.Fatal(terr)
	}
	if terr := ep.Connect(at); terr != nil {
		t.Fatal(terr)
	}
	client := gonet.NewUDPConn(&wq, ep)
	defer client.Close()
	for _, n := range []int{1, 549, 550, 1372, 1373, 5000} {
		if _, err := client.Write(payload(n)); err != nil {
			t.Fatal(n, err)
		}
		got := make([]byte, 9000)
		server.SetReadDeadline(time.Now().Add(5 * time.Second))
		k, _, err := server.ReadFrom(got)
		if err != nil {
			t.Fatal(n, err)
		}
		if !bytes.Equal(got[:k], payload(n)) {
			t.Errorf("%d bytes arrive as %d others", n, k)
		}
	}
	if s := a.Wrapper.Stats(); s.Fragments == 0 || s.TooBig != 0 {
		t.Errorf("%+v", s)
	}
}

func fullOf(s spec) []byte { return s.full() }

// Fragments pass NAT once more, so they are queued as the stack had sent them.
func TestFragmentsBeforeNAT(t *testing.T) {
	link := new(fakeLink)
	w := New(link, Options{})
	defer w.Close()
	if err := w.SetNAT([]NATRule{rule("10.7.7.7", "10.0.0.1", "10.0.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	outside := spec{udp: true, id: 4, payload: payload(1400)}
	inside := outside
	inside.src = netip.MustParseAddr("10.7.7.7")
	_, fs := tell(w, link, outside.full(), 1000)
	if len(fs) != 2 {
		t.Fatalf("%d fragments", len(fs))
	}
	var got []byte
	for _, f := range fs {
		if !header.IPv4(f).IsChecksumValid() || !bytes.Equal(f[12:16], inside.src.AsSlice()) {
			t.Errorf("%x", f[:20])
		}
		got = append(got, f[20:]...)
	}
	if !bytes.Equal(got, inside.full()[20:]) {
		t.Error("payload")
	}
	// And once they have passed it they are as they were.
	got = nil
	for _, f := range readAll(t, w, 4, 1500) {
		if !header.IPv4(f).IsChecksumValid() || !bytes.Equal(f[12:16], []byte{10, 0, 0, 1}) {
			t.Errorf("%x", f[:20])
		}
		got = append(got, f[20:]...)
	}
	if !bytes.Equal(got, outside.full()[20:]) {
		t.Error("payload after NAT")
	}
}

func TestFragmentOptions(t *testing.T) {
	// Record route (not copied), router alert (copied), NOP, end.
	s := spec{ipExtra: []byte{7, 7, 4, 0, 0, 0, 0, 0x94, 4, 0, 0, 1}, id: 5, payload: payload(300), udp: true}
	b := s.full()
	var heads [][]byte
	var got []byte
	if !fragment(b, 100, func(h, p []byte) {
		heads = append(heads, bytes.Clone(h))
		got = append(got, p...)
	}) {
		t.Fatal("not fragmented")
	}
	if !bytes.Equal(heads[0][20:], s.ipExtra) {
		t.Errorf("first: %x", heads[0])
	}
	for _, h := range heads[1:] {
		if !bytes.Equal(h[20:], []byte{0x94, 4, 0, 0}) {
			t.Errorf("later: %x", h)
		}
	}
	if !bytes.Equal(got, b[32:]) {
		t.Error("payload")
	}
}

// FuzzTooBig takes any packet. Fragments must give it back; messages must be valid and quote it.
func FuzzTooBig(f *testing.F) {
	for _, s := range []spec{
		{df: true, payload: payload(1400)},
		{payload: payload(1400), id: 7},
		{payload: payload(1400), ipExtra: []byte{7, 7, 4, 0, 0, 0, 0, 0x94, 4, 0, 0, 1}, udp: true},
		{v6: true, payload: payload(1400)},
		{v6: true, udp: true, payload: payload(1400), ipExtra: destOpts, ext: 60},
	} {
		f.Add(s.full(), uint16(1300))
		f.Add(s.full(), uint16(77))
	}
	again := spec{payload: payload(500)}
	b := again.full()
	b[6] = 0x21 // already a fragment, more to come
	f.Add(b, uint16(300))
	f.Fuzz(func(t *testing.T, b []byte, mtu uint16) {
		link := new(fakeLink)
		w := New(link, Options{})
		defer w.Close()
		ms, fs := tell(w, link, b, int(mtu))
		if n := w.Drops(); len(ms)+b2i(len(fs) > 0)+int(n.Total()) != 1 {
			t.Fatalf("%d messages, %d fragments, drops %v", len(ms), len(fs), n)
		}
		for _, m := range ms {
			if err := valid(m); err != nil {
				t.Fatal(err)
			}
			quote, limit := m[28:], 576
			if m[0]>>4 == 6 {
				quote, limit = m[48:], 1280
			}
			if len(m) > limit || !bytes.HasPrefix(b, quote) || len(quote) < min(len(b), limit-48) && !bytes.Equal(quote, b[:len(quote)]) {
				t.Fatalf("quotes %x", quote)
			}
		}
		if len(fs) == 0 {
			return
		}
		word := binary.BigEndian.Uint16(b[6:])
		at := int(word&0x1fff) * 8
		var got []byte
		for i, p := range fs {
			h := header.IPv4(p)
			if !h.IsValid(len(p)) || int(h.TotalLength()) != len(p) || !h.IsChecksumValid() || len(p) > int(mtu) {
				t.Fatalf("fragment %d: %x", i, p[:20])
			}
			if int(h.FragmentOffset()) != at+len(got) || h.More() != (i < len(fs)-1 || word&0x2000 != 0) || h.ID() != header.IPv4(b).ID() {
				t.Fatalf("fragment %d: offset %d, more %v", i, h.FragmentOffset(), h.More())
			}
			got = append(got, p[h.HeaderLength():]...)
		}
		total := int(header.IPv4(b).TotalLength())
		if !bytes.Equal(got, b[header.IPv4(b).HeaderLength():total]) {
			t.Fatal("payload")
		}
	})
}
