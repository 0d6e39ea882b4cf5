package transport

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func listenLoopback(t *testing.T) *UDPSocket {
	t.Helper()
	c, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// OpenSSL and GnuTLS with a peer's key are that peer to a node: they complete the handshake,
// exchange DPD both ways, send a packet, and say goodbye.
func TestStrangerIsAPeer(t *testing.T) {
	forEachStranger(t, isClient, func(t *testing.T, s stranger) {
		timing := quick
		timing.DPDTimeout = 10 * time.Second
		n := newTestNode(t, "10.0.0.2", timing, listenLoopback(t))
		id := newKeyFiles(t)
		packetSource := netip.MustParseAddr("48.48.48.48") // "0000": what a keyboard can type
		err := n.AddPeer(PeerConfig{Name: s.name, PublicKey: id.key.Public(), AllowedIPs: []netip.Prefix{netip.PrefixFrom(packetSource, 32)}})
		if err != nil {
			t.Fatal(err)
		}
		p := s.client(t, AES128GCM, id, fmt.Sprint(n.Status().Sockets[0].Local.Port()))
		eventually(t, "the node has the association", func() bool { return n.sortedPeers()[0].slots.Load().newest() != nil })

		// Its DPD-REQ is echoed whole, as a DPD-RESP.
		p.keyIn("\x03are you there\n")
		p.waitFor("\x04are you there\n")
		eventually(t, "established", func() bool { return established(n) })

		// Ours arrive: each starts with the type byte, after the silence of Timing.DPD.
		p.waitFor("\x03")

		// An IPv4 packet from its allowed address reaches the device.
		p.keyIn("\x00E000000000000000" + strings.Repeat("x", 20) + "\n")
		select {
		case got := <-n.dev.inbound:
			if src, _ := source(got); src != packetSource {
				t.Errorf("a packet from %v", src)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("its packet did not arrive; drops %v", n.Status().Drops)
		}

		p.stdin.Close()
		eventually(t, "its close_notify is heard", func() bool { return !established(n) })
	})
}

// With a key that is no peer's they are refused, and nothing is kept.
func TestStrangerIsNoPeer(t *testing.T) {
	forEachStranger(t, isClient, func(t *testing.T, s stranger) {
		n := newTestNode(t, "10.0.0.2", quick, listenLoopback(t))
		if err := n.AddPeer(PeerConfig{PublicKey: newKeyFiles(t).key.Public()}); err != nil {
			t.Fatal(err)
		}
		p := s.client(t, AES128GCM, newKeyFiles(t), fmt.Sprint(n.Status().Sockets[0].Local.Port()))
		p.waitExit()
		if said := strings.ToLower(p.said()); !strings.Contains(said, "bad certificate") && !strings.Contains(said, "certificate is bad") {
			t.Errorf("it was not told why:\n%s", said)
		}
		if st := n.Status(); st.Peers[0].State == PeerEstablished {
			t.Errorf("established: %+v", st)
		}
		eventually(t, "nothing is kept", func() bool { return n.Status().HalfOpen == 0 })
	})
}
