package netstack

import (
	"crypto/rand"
	"net/netip"
	"testing"

	"github.com/penstock-vpn/penstock/transport"
)

// A session that is refused takes nothing from the one, or from the static peer, that has its addresses.
func TestRefusedSessionTakesNothing(t *testing.T) {
	peer := Peer{PublicKey: newKey(t).Public(), AllowedIPs: prefixes("10.66.0.8/32")}
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.1/24"), Peers: []Peer{peer},
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Router: &RouterConfig{Allow: prefixes(routed4)},
	})
	session := func(allowed netip.Prefix) error { // its client has not shown up yet
		l := transport.SessionLink{AppID: make([]byte, 32), PSK: make([]byte, 32)}
		rand.Read(l.AppID)
		_, err := n.AddSession(transport.SessionConfig{Name: "client", Link: l, AllowedIPs: []netip.Prefix{allowed}}, "")
		return err
	}
	client := netip.MustParsePrefix("10.66.0.7/32")
	if err := session(client); err != nil {
		t.Fatal(err)
	}
	for _, taken := range []netip.Prefix{client, peer.AllowedIPs[0]} {
		before := n.router.peerOf(stackAddr(taken.Addr()))
		if session(taken) == nil {
			t.Fatalf("%v was given away twice", taken)
		}
		if err := n.reachable(taken.Addr()); err != nil {
			t.Errorf("%v is not reachable: %v", taken, err)
		}
		if now := n.router.peerOf(stackAddr(taken.Addr())); now == nil || now != before {
			t.Errorf("%v is another's for the router than before, or nobody's", taken)
		}
	}
}
