package transport

import (
	"net/netip"
	"testing"
	"time"
)

// A peer is called anew by the socket by which it comes, as long as it is heard there.
func TestRekeyByTheLiveSocket(t *testing.T) {
	net := newMemNet()
	timing := steady
	timing.RekeyAfter = 300 * time.Millisecond
	a := newTestNode(t, "10.0.0.1", timing, net.listen("192.0.2.1:1000"), net.listen("192.0.2.5:1000"))
	b := newTestNode(t, "10.0.0.2", steady, net.listen("192.0.2.2:2000"))
	a.knows(t, b, "")
	b.knows(t, a, "192.0.2.5:1000")
	ping(t, a, b)
	n := a.Status().Peers[0].Handshakes
	eventually(t, "two rekeys", func() bool { return a.Status().Peers[0].Handshakes >= n+2 })
	if st := b.Status().Peers[0]; st.Remote != netip.MustParseAddrPort("192.0.2.5:1000") || st.Roamings != 0 {
		t.Errorf("after the rekey b sends to %v, roamings %d", st.Remote, st.Roamings)
	}
}

// Who is silent is called by the way that the routing table has, and who comes to another socket of ours has not moved.
func TestWayToAPeer(t *testing.T) {
	p := lonePeer(t, "192.0.2.2:2")
	remote := netip.MustParseAddrPort("192.0.2.2:2")
	other := &sinkConn{}
	came := &path{conn: other, remote: remote, local: netip.MustParseAddr("192.0.2.9")}
	if err := p.install(completed(true), &path{conn: p.t.conns[0], remote: remote}); err != nil {
		t.Fatal(err)
	}
	a := p.slots.Load().next
	p.confirm(a)
	p.roam(a, came)
	if n := p.roamings.Load(); n != 0 {
		t.Errorf("%d roamings", n)
	}
	p.lastInbound.Store(p.t.clock.now())
	if at := p.t.wayTo(p, remote); *at != *came {
		t.Errorf("heard: called by %+v", at)
	}
	elsewhere := netip.MustParseAddrPort("192.0.2.3:2")
	if at := p.t.wayTo(p, elsewhere); at.conn != p.t.conns[0] || at.remote != elsewhere || at.local.IsValid() {
		t.Errorf("elsewhere: called by %+v", at)
	}
	p.lastInbound.Store(p.t.clock.now() - int64(p.timing.DPDTimeout))
	if at := p.t.wayTo(p, remote); at.conn != p.t.conns[0] || at.local.IsValid() {
		t.Errorf("silent: called by %+v", at)
	}
}
