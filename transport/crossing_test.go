package transport

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// delayed makes every datagram of net take d.
func delayed(net *memNet, d time.Duration) {
	net.setPass(func(from, to netip.AddrPort, datagram []byte) bool {
		net.mu.Lock()
		dst := net.conns[to]
		net.mu.Unlock()
		m := Inbound{Buf: slices.Clone(datagram), Remote: from, Local: to.Addr()}
		time.AfterFunc(d, func() {
			select {
			case dst.queue <- m:
			default:
			}
		})
		return false
	})
}

// Both sides call at once, each at an address that the other does not call from: no
// half-open table sees both handshakes, and both complete. The sides must agree on one.
func TestCallsThatCrossOnTwoPaths(t *testing.T) {
	net := newMemNet()
	a4, a6 := net.listen("192.0.2.1:1000"), net.listen("[2001:db8::1]:1000")
	b4, b6 := net.listen("192.0.2.2:2000"), net.listen("[2001:db8::2]:2000")
	a := newTestNode(t, "10.0.0.1", Timing{}, a4, a6)
	b := newTestNode(t, "10.0.0.2", Timing{}, b4, b6)
	delayed(net, 100*time.Millisecond)
	a.knows(t, b, "192.0.2.2:2000")
	b.knows(t, a, "[2001:db8::1]:1000")
	ping(t, a, b)
	if x, y := a.Status().Peers[0].Remote, b.Status().Peers[0].Remote; x.Addr().Is4() != y.Addr().Is4() {
		t.Errorf("a sends to %v, b to %v", x, y)
	}
}

// completed is an agreement as a handshake would give it, without pion.
func completed(initiator bool) *agreement {
	s := &agreement{initiator: initiator, nextSeq: 257, retired: make(chan struct{})}
	close(s.retired)
	return s
}

func TestInstallAgreesOnOneOfTwo(t *testing.T) {
	p := lonePeer(t, "192.0.2.2:2")
	at := &path{conn: p.t.conns[0], remote: netip.MustParseAddrPort("192.0.2.2:2")}
	ours := p.identity.prevails()
	for _, order := range [][]bool{{true, false}, {false, true}} {
		p.slots.Store(new(slots))
		for _, initiator := range order {
			err := p.install(completed(initiator), at)
			if stands := p.slots.Load().next.initiator == initiator; (err == nil) != stands {
				t.Errorf("install: %v, although the association stands: %v", err, stands)
			}
		}
		if got := p.slots.Load().next.initiator; got != ours {
			t.Errorf("order %v: the handshake that we began stands: %v, want %v", order, got, ours)
		}
	}
	// One that was not confirmed for long is no rival: the remote has started anew.
	p.slots.Store(new(slots))
	for _, initiator := range []bool{ours, !ours} {
		if err := p.install(completed(initiator), at); err != nil {
			t.Fatal(err)
		}
		p.slots.Load().next.born = time.Now().Add(-confirmPatience)
	}
	if p.slots.Load().next.initiator == ours {
		t.Error("a stale association kept the new one out")
	}
}

// A peer that sends from another peer's address takes nothing from it.
func TestTwoPeersAtOneAddress(t *testing.T) {
	net, a, b, _, _ := pair(t, Timing{})
	c := newTestNode(t, "10.0.0.3", Timing{}, net.listen("192.0.2.3:3000"))
	for _, n := range []*testNode{a, c} {
		b.knows(t, n, "")
		n.knows(t, b, "192.0.2.2:2000")
		ping(t, n, b)
	}
	for i := range uint32(50) { // a's sequence numbers are ahead of c's, so c's look like replays
		a.dev.outbound <- a.packet(b.addr, i, 60)
	}
	eventually(t, "they are there", func() bool { return b.Status().Peers[0].InboundPackets >= 50 })
	// c's packets come from a's address from now on.
	home, other := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("192.0.2.3:3000")
	net.setPass(func(from, to netip.AddrPort, d []byte) bool {
		if from == other {
			net.mu.Lock()
			dst := net.conns[to]
			net.mu.Unlock()
			dst.queue <- Inbound{Buf: slices.Clone(d), Remote: home, Local: to.Addr()}
			return false
		}
		return true
	})
	drain(b.dev.inbound)
	const each = 20
	for i := range uint32(each) {
		c.dev.outbound <- c.packet(b.addr, i, 60)
		time.Sleep(5 * time.Millisecond)
		a.dev.outbound <- a.packet(b.addr, i, 60)
		time.Sleep(5 * time.Millisecond)
	}
	from := map[netip.Addr]int{}
	// The first of a newcomer is lost: it was tried with the other's keys, in place.
	for from[a.addr] < each-1 || from[c.addr] < each-2 {
		select {
		case p := <-b.dev.inbound:
			src, _ := source(p)
			from[src]++
		case <-time.After(patience / 3): // of silence
			t.Fatalf("of %d packets each, b took %v", each, from)
		}
	}
}
