package transport

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A path that becomes smaller is noticed although small packets keep coming.
func TestBlackHoleUnderInboundTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net, a, b, _, _ := pair(t, Timing{})
		b.knows(t, a, "")
		a.knows(t, b, "192.0.2.2:2000")
		ping(t, a, b)
		time.Sleep(5 * time.Second)
		if got := a.Status().Peers[0].InnerMTU; got != DefaultInnerMTU {
			t.Fatalf("inner MTU %d", got)
		}
		const carries = 1300
		net.setPass(func(_, _ netip.AddrPort, d []byte) bool { return len(d) <= carries })
		for range 40 {
			a.dev.outbound <- a.packet(b.addr, 1, DefaultInnerMTU)
			b.dev.outbound <- b.packet(a.addr, 1, 60)
			time.Sleep(time.Second)
		}
		if got := a.Status().Peers[0].InnerMTU; got > carries {
			t.Errorf("inner MTU is %d, the path has carried %d for 40 s", got, carries)
		}
		a.stop()
		b.stop()
	})
}

// An outage leaves the MTU as it was.
func TestOutageLeavesTheMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net, a, b, _, _ := pair(t, Timing{})
		b.knows(t, a, "")
		a.knows(t, b, "192.0.2.2:2000")
		ping(t, a, b)
		net.setPass(func(_, _ netip.AddrPort, _ []byte) bool { return false })
		for range 25 {
			a.dev.outbound <- a.packet(b.addr, 1, DefaultInnerMTU)
			time.Sleep(time.Second)
		}
		net.setPass(nil)
		time.Sleep(5 * time.Second)
		if st := a.Status().Peers[0]; st.InnerMTU != DefaultInnerMTU || st.Handshakes != 1 || st.State != PeerEstablished {
			t.Errorf("after an outage of 25 s: %+v", st)
		}
		a.stop()
		b.stop()
	})
}

// The node's MTU is that of its established peers: one that left holds nobody down.
func TestOnlyEstablishedPeersCountForTheMTU(t *testing.T) {
	p := lonePeer(t, "")
	tr := p.t
	var said []int
	tr.cfg.PathMTUChanged = func(mtu int) { said = append(said, mtu) }
	tr.peers[p.key] = p
	tr.searchListLocked()
	p.mtu.use = 1300
	p.step()
	if len(said) != 0 {
		t.Fatalf("before any association: %v", said)
	}
	sealing, opening := testKeys(t, AES128GCM)
	a := &association{peer: p, suite: AES128GCM, sealer: &sealing, opener: &opening, born: time.Now()}
	a.path.Store(&path{conn: tr.conns[0], remote: remoteNumber(1)})
	a.lastInbound.Store(tr.clock.now())
	p.lastInbound.Store(tr.clock.now())
	p.slots.Store(&slots{current: a})
	p.step()
	p.step()
	p.goodbye(a)
	p.step()
	if !slices.Equal(said, []int{1300, DefaultInnerMTU}) {
		t.Errorf("reported %v", said)
	}
}

// An idle peer's old association gets its time after a rekey, however long it was silent.
func TestReplacedAssociationGetsItsOverlap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := lonePeer(t, "192.0.2.2:2")
		at := &path{conn: p.t.conns[0], remote: remoteNumber(1)}
		sealing, opening := testKeys(t, AES128GCM)
		for range 2 {
			s := completed(true)
			s.sealer, s.opener = sealing, opening
			if err := p.install(s, at); err != nil {
				t.Fatal(err)
			}
			p.confirm(p.slots.Load().next)
			time.Sleep(2 * defaultOverlap)
		}
		s := completed(true)
		s.sealer, s.opener = sealing, opening
		if err := p.install(s, at); err != nil {
			t.Fatal(err)
		}
		before := p.slots.Load().current
		p.confirm(p.slots.Load().next)
		p.dialling = true // step is not to call anybody here
		p.step()
		if p.slots.Load().previous != before {
			t.Error("the old association ended with the rekey")
		}
		time.Sleep(defaultOverlap)
		p.step()
		if p.slots.Load().previous != nil {
			t.Error("the old association never ends")
		}
		p.timer.Stop()
	})
}
