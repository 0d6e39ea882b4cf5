package transport

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

func established(n *testNode) bool {
	st := n.Status()
	return len(st.Peers) == 1 && st.Peers[0].State == PeerEstablished
}

func pair(t testing.TB, timing Timing) (net *memNet, a, b *testNode, ca, cb *memConn) {
	net = newMemNet()
	ca, cb = net.listen("192.0.2.1:1000"), net.listen("192.0.2.2:2000")
	a = newTestNode(t, "10.0.0.1", timing, ca)
	b = newTestNode(t, "10.0.0.2", timing, cb)
	return net, a, b, ca, cb
}

func TestEitherSideStarts(t *testing.T) {
	for _, c := range []struct{ name, fromA, fromB string }{
		{"first", "192.0.2.2:2000", ""},
		{"second", "", "192.0.2.1:1000"},
		{"both", "192.0.2.2:2000", "192.0.2.1:1000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, a, b, _, _ := pair(t, quick)
			b.knows(t, a, c.fromB)
			a.knows(t, b, c.fromA)
			ping(t, a, b)
			eventually(t, "both established", func() bool { return established(a) && established(b) })
			st := a.Status().Peers[0]
			if st.CipherSuite == "" || st.LastHandshake.IsZero() || st.InnerMTU != DefaultInnerMTU {
				t.Errorf("status after the handshake: %+v", st)
			}
			eventually(t, "no half-open handshake left", func() bool { return a.Status().HalfOpen == 0 && b.Status().HalfOpen == 0 })
		})
	}
}

func TestFirstPacketWaitsForTheHandshake(t *testing.T) {
	_, a, b, _, _ := pair(t, Timing{})
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	for i := range uint32(10) {
		a.dev.outbound <- a.packet(b.addr, i, 60)
	}
	for i := range uint32(10) {
		select {
		case p := <-b.dev.inbound:
			if number(p) != i {
				t.Fatalf("packet %d came in place of %d", number(p), i)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("packet %d was lost", i)
		}
	}
}

func TestPacketsAreCheckedBothWays(t *testing.T) {
	_, a, b, _, _ := pair(t, steady)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)

	forged := a.packet(b.addr, 1<<20, 60)
	copy(forged[12:], netip.MustParseAddr("10.9.9.9").AsSlice())
	a.dev.outbound <- forged
	eventually(t, "a forged source is counted", func() bool { return b.drops[DropSource].Load() == 1 })

	a.dev.outbound <- a.packet(netip.MustParseAddr("10.0.0.77"), 7, 60)
	a.dev.outbound <- []byte{0x45, 0}
	a.dev.outbound <- a.packet(b.addr, 2<<20, 60)
	p := <-b.dev.inbound
	for number(p) < 1<<20 { // a ping that was still under way
		p = <-b.dev.inbound
	}
	if number(p) != 2<<20 {
		t.Errorf("packet %d came through", number(p))
	}
	if a.drops[DropNoPeer].Load() != 1 || a.drops[DropNotIP].Load() != 1 {
		t.Errorf("drops outbound: %v", a.Status().Drops)
	}
}

func TestWrongKeyIsRefused(t *testing.T) {
	net, a, b, _, _ := pair(t, quick)
	other := newTestNode(t, "10.0.0.3", quick, net.listen("192.0.2.3:3000"))
	// a expects b's key at the address of a node that has another one.
	other.knows(t, a, "")
	a.knows(t, b, "192.0.2.3:3000")
	eventually(t, "the mistake is reported", func() bool { return a.Status().Peers[0].LastError != "" })
	if a.Status().Peers[0].State != PeerConnecting {
		t.Errorf("state is %v", a.Status().Peers[0].State)
	}
	// A node that b does not know calls b: it is refused, b keeps nothing.
	stranger := newTestNode(t, "10.0.0.4", quick, net.listen("192.0.2.4:4000"))
	stranger.knows(t, b, "192.0.2.2:2000")
	eventually(t, "the stranger is told", func() bool { return stranger.Status().Peers[0].LastError != "" })
	eventually(t, "nothing is left", func() bool { return b.Status().HalfOpen == 0 })
}

// A rekey in mid-transfer loses no packet: every number arrives once.
func TestRekeyLosesNothing(t *testing.T) {
	timing := steady
	timing.RekeyAfterRecords = 3000
	_, a, b, _, _ := pair(t, timing)
	b.knows(t, a, "192.0.2.1:1000")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)

	// Three rekeys in mid-transfer: where handshakes are slow, more than packets are sent until then.
	const packets, most = 20000, 60000 // the device holds 65,536
	const first = 1 << 20              // a ping may still be under way
	enough := func() bool { return a.Status().Peers[0].Handshakes >= 4 }
	send := func(from, to *testNode, sent chan<- int) {
		i := uint32(0)
		for ; i < packets || i < most && (i%50 != 0 || !enough()); i++ {
			from.dev.outbound <- from.packet(to.addr, first+i, 64)
			if i%50 != 49 {
				continue
			}
			// The wire's queue, as short as a socket's, is to lose nothing either.
			time.Sleep(time.Millisecond)
			for end := time.Now().Add(patience); len(to.dev.inbound)+2000 < int(i) && time.Now().Before(end); {
				time.Sleep(time.Millisecond)
			}
		}
		sent <- int(i)
	}
	fromA, fromB := make(chan int, 1), make(chan int, 1)
	go send(a, b, fromA)
	go send(b, a, fromB)
	for n, sent := range map[*testNode]int{b: <-fromA, a: <-fromB} {
		seen := make([]bool, sent)
		timeout := time.After(patience)
		for left := sent; left > 0; {
			select {
			case p := <-n.dev.inbound:
				if number(p) < first {
					continue
				}
				i := number(p) - first
				if seen[i] {
					t.Fatalf("packet %d came twice", i)
				}
				seen[i] = true
				left--
			case <-timeout:
				t.Fatalf("%d packets were lost, the first %d; %v", left, slices.Index(seen, false), n.Status().Drops)
			}
		}
	}
	if h := a.Status().Peers[0].Handshakes; h < 4 {
		t.Errorf("%d handshakes in %d records and more, want one in 3000", h, packets)
	}
}

func TestPeerRoams(t *testing.T) {
	_, a, b, ca, _ := pair(t, steady)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	for _, to := range []string{"192.0.2.1:1001", "198.51.100.9:77", "192.0.2.1:1000"} {
		before := b.Status().Peers[0].Handshakes
		ca.rebind(to)
		ping(t, a, b)
		st := b.Status().Peers[0]
		if st.Remote != netip.MustParseAddrPort(to) {
			t.Errorf("b sends to %v, a is at %v", st.Remote, to)
		}
		if st.Handshakes != before {
			t.Errorf("roaming to %v took a handshake", to)
		}
	}
	if got := b.Status().Peers[0].Roamings; got != 3 {
		t.Errorf("%d roamings counted, want 3", got)
	}
}

// Records of a peer, captured and sent again from elsewhere, move nothing.
func TestReplayFromElsewhereMovesNothing(t *testing.T) {
	net, a, b, _, _ := pair(t, steady)
	thief := net.listen("203.0.113.66:6666")
	var record atomic.Pointer[[]byte]
	net.setPass(func(from, to netip.AddrPort, d []byte) bool {
		if from == netip.MustParseAddrPort("192.0.2.1:1000") && contentType(d[0]) == contentApplicationData {
			c := slices.Clone(d)
			record.Store(&c)
		}
		return true
	})
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	remote := b.Status().Peers[0].Remote
	for range 50 {
		if _, err := thief.WriteBatch([]Run{{Remote: netip.MustParseAddrPort("192.0.2.2:2000"), Segments: [][]byte{*record.Load()}}}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the replays are dropped", func() bool {
		return b.drops[DropUnknownRemote].Load()+b.drops[DropTrialLimit].Load()+b.drops[DropReplay].Load() >= 50
	})
	if now := b.Status().Peers[0].Remote; now != remote {
		t.Errorf("a replay moved the peer from %v to %v", remote, now)
	}
}

func TestRestartOfOneSide(t *testing.T) {
	for _, c := range []struct{ name, fromA, fromB string }{
		{"the caller restarts", "192.0.2.2:2000", ""},
		{"the called restarts", "", "192.0.2.1:1000"},
		{"both may call", "192.0.2.2:2000", "192.0.2.1:1000"},
	} {
		for _, crash := range []bool{false, true} {
			name := c.name + " with a goodbye"
			if crash {
				name = c.name + " without a goodbye"
			}
			t.Run(name, func(t *testing.T) {
				net, a, b, _, _ := pair(t, quick)
				b.knows(t, a, c.fromB)
				a.knows(t, b, c.fromA)
				ping(t, a, b)
				if crash {
					net.setPass(func(from, _ netip.AddrPort, _ []byte) bool { return from.Port() != 1000 })
				}
				a.stop()
				net.setPass(nil)
				a2 := newTestNodeKey(t, a.key, "10.0.0.1", quick, net.listen("192.0.2.1:1000"))
				a2.knows(t, b, c.fromA)
				ping(t, a2, b)
			})
		}
	}
}

func TestSilentPeerIsCalledAgain(t *testing.T) {
	net, a, b, _, _ := pair(t, quick)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	net.setPass(func(_, _ netip.AddrPort, _ []byte) bool { return false })
	eventually(t, "the outage is seen", func() bool {
		p := a.Status().Peers[0]
		return p.State == PeerConnecting && p.LastError != ""
	})
	net.setPass(nil)
	ping(t, a, b)
	eventually(t, "established again", func() bool { return established(a) })
}

func TestPathMTUEndToEnd(t *testing.T) {
	net, a, b, _, _ := pair(t, quick)
	const carries = 1300 // of UDP payload
	net.setPass(func(_, _ netip.AddrPort, d []byte) bool { return len(d) <= carries })
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	want := carries - maxHeadroom - frameHeaderSize - tagSize
	eventually(t, "the path MTU is found on both sides", func() bool {
		x, y := a.Status().Peers[0].InnerMTU, b.Status().Peers[0].InnerMTU
		return x <= want && x >= want-mtuStep && y <= want && y >= want-mtuStep
	})
}

func TestCloseTwiceAndAfterwards(t *testing.T) {
	_, a, b, _, _ := pair(t, quick)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	begin := time.Now()
	a.stop()
	a.stop()
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("Close took %v", took)
	}
	eventually(t, "b hears the goodbye", func() bool { return b.Status().Peers[0].State != PeerEstablished })
	if err := a.AddPeer(PeerConfig{PublicKey: b.key.Public()}); err == nil {
		t.Error("a closed Transport takes a peer")
	}
	a.Status()
}

func TestAddPeerRefuses(t *testing.T) {
	_, a, b, _, _ := pair(t, quick)
	a.knows(t, b, "")
	third, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []PeerConfig{
		{},
		{PublicKey: a.key.Public()},
		{PublicKey: b.key.Public()},
		{PublicKey: third.Public(), AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32")}},
	} {
		if err := a.AddPeer(c); err == nil {
			t.Errorf("AddPeer(%+v) succeeded", c)
		}
	}
	if err := a.RemovePeer(b.key.Public()); err != nil {
		t.Error(err)
	}
	if err := a.RemovePeer(b.key.Public()); err == nil {
		t.Error("a peer was removed twice")
	}
	a.knows(t, b, "")
}
