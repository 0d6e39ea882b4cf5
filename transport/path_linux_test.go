package transport

import (
	"net/netip"
	"testing"
	"time"
)

// Where 0.0.0.0 and [::] have a socket each, an IPv4 peer is called by the one for IPv4, whichever is first.
func TestCallByTheSocketOfTheFamily(t *testing.T) {
	six, err := ListenUDP(netip.MustParseAddrPort("[::]:0"), SocketOptions{V6Only: true})
	if err != nil {
		t.Skip(err)
	}
	four, err := ListenUDP(netip.MustParseAddrPort("0.0.0.0:0"), SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	far := listenLoopback(t)
	endpoint := far.LocalAddr().String()
	a := newTestNode(t, "10.0.0.1", quick, six, four)
	b := newTestNode(t, "10.0.0.2", quick, far)
	b.knows(t, a, "")
	a.knows(t, b, endpoint)
	start := time.Now()
	for !established(a) {
		if time.Since(start) > 5*time.Second {
			t.Fatalf("not established: %s; %+v", a.Status().Peers[0].LastError, six.Stats())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// A rekey leaves from the address that the peer knows.
func TestRekeyFromTheLivePath(t *testing.T) {
	aTiming, bTiming := steady, steady
	aTiming.RekeyAfter = 300 * time.Millisecond
	all, err := ListenUDP(netip.MustParseAddrPort("0.0.0.0:0"), SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	home := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.5"), all.LocalAddr().Port())
	a := newTestNode(t, "10.0.0.1", aTiming, all)
	b := newTestNode(t, "10.0.0.2", bTiming, listenLoopback(t))
	a.knows(t, b, "")
	b.knows(t, a, home.String())
	ping(t, a, b)
	for range 3 {
		n := a.Status().Peers[0].Handshakes
		eventually(t, "a rekey", func() bool { return a.Status().Peers[0].Handshakes > n })
		if got := b.Status().Peers[0].Remote; got != home {
			t.Fatalf("after the rekey b sends to %v, want %v", got, home)
		}
	}
	if n := b.Status().Peers[0].Roamings; n != 0 {
		t.Errorf("%d roamings", n)
	}
}
