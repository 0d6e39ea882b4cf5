package transport

import (
	"context"
	"crypto/rand"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v2"
)

// helloOf captures the first hello of a client of the session, as somebody on the path sees it.
func helloOf(t *testing.T, appID []byte) []byte {
	t.Helper()
	h, err := newHandshaker(PrivateKey{}, nil, time.Second, nil)
	if err != nil {
		t.Fatal(err)
	}
	d := firstDatagram(t, func(ctx context.Context, c *handshakeConn) (*agreement, error) {
		return h.sessionClient(ctx, c, &sharedSecret{appID: string(appID)})
	})
	if info, ok := peekClientHello(d); !ok || string(info.sessionID) != string(appID) {
		t.Fatalf("the hello names %x, want %x", info.sessionID, appID)
	}
	return d
}

// firstDatagram is what a client sends first.
func firstDatagram(t *testing.T, client func(context.Context, *handshakeConn) (*agreement, error)) []byte {
	t.Helper()
	hello := make(chan []byte, 1)
	c := newHandshakeConn(netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2"), func(d []byte) {
		select {
		case hello <- slices.Clone(d):
		default:
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if _, err := client(ctx, c); err == nil {
			t.Error("an agreement with nobody")
		}
	}()
	d := <-hello
	cancel()
	<-done
	return d
}

// Who names no session hears nothing, whatever else is said.
func TestUnknownSessionsAreNotAnswered(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	stranger := p.net.listen("203.0.113.1:1")
	unknown := make([]byte, maxAppID)
	rand.Read(unknown)
	// One without a name is for static peers, of which a node without a key has none.
	certificates, _ := testHandshaker(t)
	nameless := firstDatagram(t, func(ctx context.Context, c *handshakeConn) (*agreement, error) {
		return certificates.client(ctx, c, anyKey)
	})
	hellos := [][]byte{helloOf(t, unknown), nameless}
	const n = 1000
	for range n / 2 {
		for _, hello := range hellos {
			p.net.deliver(stranger.LocalAddr(), netip.MustParseAddrPort("192.0.2.2:443"), hello)
		}
	}
	eventually(t, "all are counted", func() bool { return p.server.Status().Drops[DropUnknownSession.String()] == n })
	if st := p.server.Status(); st.HalfOpen != 0 {
		t.Errorf("%+v", st)
	}
	select {
	case m := <-stranger.queue:
		t.Errorf("answered: %x", m.Buf)
	default:
	}
}

// A node can have static peers and sessions on one socket.
func TestPeersAndSessionsOnOneSocket(t *testing.T) {
	noLeaks(t)
	net := newMemNet()
	server := newTestNode(t, "10.0.0.2", steady, net.listen("192.0.2.2:443"))
	client := keyless(t, "10.0.0.1", steady, net.listen("192.0.2.1:1000"))
	static := newTestNode(t, "10.0.0.3", steady, net.listen("192.0.2.3:3000"))
	server.knows(t, static, "")
	static.knows(t, server, "192.0.2.2:443")
	cl, sl := linkPair(t)
	p := &sessionPair{net: net, client: client, server: server}
	p.add(t, SessionConfig{Client: true, Endpoint: "192.0.2.2:443", Link: cl, AllowedIPs: hostOf(server)},
		SessionConfig{Link: sl, AllowedIPs: hostOf(client)})
	ping(t, static, server)
	p.onPath(t, PathDatagrams)
	drain(server.dev.inbound)
	ping(t, client, server)
	if _, err := server.AddSession(SessionConfig{Link: SessionLink{Stream: discardConn{}, AppID: sl.AppID, PSK: sl.PSK}}); !errors.Is(err, errAppIDTaken) {
		t.Errorf("an App-ID twice: %v", err)
	}
	if _, err := server.AddSession(SessionConfig{Link: SessionLink{Stream: discardConn{}, NoDatagrams: "none", MTU: -1}}); err == nil {
		t.Error("a session with an MTU below 0")
	}
	if _, err := server.AddSession(SessionConfig{Link: SessionLink{Stream: discardConn{}, NoDatagrams: "none"}, AllowedIPs: hostOf(static)}); err == nil {
		t.Error("a prefix of a peer's was given to a session")
	}
	if err := static.AddPeer(PeerConfig{PublicKey: server.key.Public()}); err == nil {
		t.Error("a key twice")
	}
}

// Somebody who has seen the client's hello sends it again, from the client's address and from others. The
// session goes on, and no more than a few handshakes are kept.
func TestReplayedHelloDisturbsNothing(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	drain(p.server.dev.inbound)
	hello := helloOf(t, []byte(p.s.secret.Load().appID))
	server := netip.MustParseAddrPort("192.0.2.2:443")
	before := p.s.peer.slots.Load().current
	for i := range 200 {
		from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 1)
		p.net.deliver(from, server, hello)
		p.net.deliver(p.clientConn.LocalAddr(), server, hello)
		p.client.dev.outbound <- p.client.packet(p.server.addr, uint32(i+1), 100)
	}
	r := receiving(p.server)
	eventually(t, "every packet came through", func() bool { return r.has(200) == 0 })
	st := p.server.Status()
	if st.HalfOpen > maxSessionHandshakes {
		t.Errorf("%d handshakes are kept", st.HalfOpen)
	}
	if now := p.s.peer.slots.Load().current; now != before {
		t.Error("the association is another")
	}
	if s := p.s.Status(); s.Path != PathDatagrams || s.Handshakes != 1 || s.Remote != p.clientConn.LocalAddr() {
		t.Errorf("%+v", s)
	}
}

// The App-ID is known to the attacker, the key is not.
func TestSessionNeedsTheKey(t *testing.T) {
	noLeaks(t)
	net := newMemNet()
	client := keyless(t, "10.0.0.1", quick, net.listen("192.0.2.1:1000"))
	server := keyless(t, "10.0.0.2", quick, net.listen("192.0.2.2:443"))
	cl, sl := linkPair(t)
	rand.Read(cl.PSK)
	p := &sessionPair{net: net, client: client, server: server}
	p.add(t, SessionConfig{Client: true, Endpoint: "192.0.2.2:443", Link: cl, AllowedIPs: hostOf(server)},
		SessionConfig{Link: sl, AllowedIPs: hostOf(client)})
	eventually(t, "the handshake has failed twice", func() bool { return p.c.peer.attemptsNow() >= 2 })
	if c, s := p.c.Status(), p.s.Status(); c.Handshakes+s.Handshakes != 0 || c.Path != PathStream || s.Path != PathStream {
		t.Errorf("%+v\n%+v", c, s)
	}
}

func (p *peer) attemptsNow() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.attempts
}

// resumer is a session store that knows every session, with a secret of its choice: a server with it agrees to resume whatever is named.
type resumer struct{ secret []byte }

func (r resumer) Get(id []byte) (dtls.Session, error) {
	return dtls.Session{ID: id, Secret: r.secret}, nil
}
func (resumer) Set([]byte, dtls.Session) error { return nil }
func (resumer) Del([]byte) error               { return nil }

// To our client its App-ID is no session to be resumed. A server in the middle that has seen it, and not the key, offers
// to go on from a secret of its own, or from none.
func TestNobodyResumesASession(t *testing.T) {
	noLeaks(t)
	for name, secret := range map[string][]byte{"none": nil, "empty": {}, "zero": make([]byte, 48)} {
		t.Run(name, func(t *testing.T) {
			h, err := newHandshaker(PrivateKey{}, nil, 50*time.Millisecond, nil)
			if err != nil {
				t.Fatal(err)
			}
			shared := &sharedSecret{appID: "somebody has seen this name here"}
			rand.Read(shared.psk[:])
			w := newWire(nil)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			var wg sync.WaitGroup
			wg.Go(func() {
				config := h.sessionConfig(new(attempt), &sharedSecret{})
				config.SessionStore = resumer{secret}
				if conn, err := dtls.ServerWithContext(ctx, w.server, config); err == nil {
					t.Error("the server has a connection")
					w.server.mute()
					conn.Close()
				}
			})
			if s, err := h.sessionClient(ctx, w.client, shared); err == nil {
				<-s.retire()
				t.Error("the client has keys with whom does not know its own")
			}
			w.client.Close()
			wg.Wait()
		})
	}
}

// Both suites, and what each side makes of them.
func TestSessionSuites(t *testing.T) {
	noLeaks(t)
	shared := &sharedSecret{appID: "0123456789abcdef0123456789abcdef"}
	rand.Read(shared.psk[:])
	for _, id := range sessionSuites {
		t.Run(id.String(), func(t *testing.T) {
			h, err := newHandshaker(PrivateKey{}, nil, 50*time.Millisecond, nil)
			if err != nil {
				t.Fatal(err)
			}
			w := newWire(nil)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			var client, server *agreement
			var clientErr, serverErr error
			var wg sync.WaitGroup
			wg.Go(func() { server, serverErr = h.sessionServer(ctx, w.server, shared) })
			a := new(attempt)
			config := h.sessionConfig(a, shared)
			config.PSKIdentityHint, config.SessionStore = pskIdentity, appIDStore(shared.appID)
			config.CustomCipherSuites = func() []dtls.CipherSuite { return customSuites([]CipherSuite{id}, &a.capture) }
			w.client.wholeFlights = true
			client, clientErr = h.run(ctx, w.client, a, config, true)
			wg.Wait()
			if err := errors.Join(clientErr, serverErr); err != nil {
				t.Fatal(err)
			}
			if client.suite != id || server.suite != id || server.secret != shared {
				t.Errorf("%v, %v", client.suite, server.suite)
			}
			exchange(t, client, server)
			<-client.retire()
			<-server.retire()
		})
	}
}
