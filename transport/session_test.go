package transport

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"
)

// tlsPair is a TLS connection over TCP on loopback, as CONNECT leaves it: StreamConns below, and records as large as what is written.
func tlsPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	return tlsPairOver(t, func(c net.Conn) net.Conn { return NewStreamConn(c) })
}

// tlsPairOver is the same with something else below.
func tlsPairOver(t testing.TB, below func(net.Conn) net.Conn) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dialled, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(below(dialled), &tls.Config{InsecureSkipVerify: true, DynamicRecordSizingDisabled: true})
	s := tls.Server(below(accepted), &tls.Config{Certificates: []tls.Certificate{testCertificate()}, DynamicRecordSizingDisabled: true})
	failed := make(chan error, 1)
	go func() { failed <- s.Handshake() }()
	if err := errors.Join(c.Handshake(), <-failed); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		dialled.Close()
		accepted.Close()
	})
	return c, s
}

var testCertificate = sync.OnceValue(func() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
})

// linkPair is what both ends have after a CONNECT.
func linkPair(t testing.TB) (client, server SessionLink) {
	t.Helper()
	c, s := tlsPair(t)
	appID, psk := make([]byte, maxAppID), make([]byte, pskSize)
	rand.Read(appID)
	rand.Read(psk)
	return SessionLink{Stream: c, AppID: appID, PSK: psk}, SessionLink{Stream: s, AppID: slices.Clone(appID), PSK: slices.Clone(psk)}
}

// told records the events of a session.
type told struct {
	mu    sync.Mutex
	lines []string
	ends  []error
	lost  []error
}

func (e *told) events() SessionEvents {
	return SessionEvents{
		Closed:     func(reason error) { e.add(&e.ends, reason, "closed") },
		StreamLost: func(reason error) { e.add(&e.lost, reason, "lost") },
		PathChanged: func(path SessionPath, why string) {
			e.add(nil, errors.New(why), string(path))
		},
	}
}

func (e *told) add(to *[]error, reason error, what string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lines = append(e.lines, fmt.Sprintf("%s: %v", what, reason))
	if to != nil {
		*to = append(*to, reason)
	}
}

func (e *told) closed() []error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.ends)
}

func (e *told) lostStreams() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.lost)
}

func (e *told) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return fmt.Sprint(e.lines)
}

// sessionPair is a client and a server of one session: over a memNet and a TLS connection.
type sessionPair struct {
	net                 *memNet
	client, server      *testNode
	c, s                *Session
	clientTold, srvTold *told
	clientConn          *memConn
}

// keyless makes a node for sessions alone.
func keyless(t testing.TB, inner string, timing Timing, conns ...PacketConn) *testNode {
	t.Helper()
	return newTestNodeKey(t, PrivateKey{}, inner, timing, conns...)
}

func newSessionPair(t testing.TB, timing Timing, change func(client, server *SessionConfig)) *sessionPair {
	t.Helper()
	net := newMemNet()
	p := &sessionPair{net: net, clientTold: new(told), srvTold: new(told), clientConn: net.listen("192.0.2.1:1000")}
	p.client = keyless(t, "10.0.0.1", timing, p.clientConn)
	p.server = keyless(t, "10.0.0.2", timing, net.listen("192.0.2.2:443"))
	cl, sl := linkPair(t)
	cc := SessionConfig{Name: "to server", Client: true, Endpoint: "192.0.2.2:443", Link: cl, AllowedIPs: hostOf(p.server), Events: p.clientTold.events()}
	sc := SessionConfig{Name: "alice", Link: sl, AllowedIPs: hostOf(p.client), Events: p.srvTold.events()}
	// On a busy machine nothing comes for longer than the DPDTimeout of tests.
	cc.Stream.DPD, sc.Stream.DPD = patience, patience
	if change != nil {
		change(&cc, &sc)
	}
	p.add(t, cc, sc)
	return p
}

func (p *sessionPair) add(t testing.TB, cc, sc SessionConfig) {
	t.Helper()
	var err error
	if p.s, err = p.server.AddSession(sc); err != nil {
		t.Fatal(err)
	}
	if p.c, err = p.client.AddSession(cc); err != nil {
		t.Fatal(err)
	}
}

func hostOf(n *testNode) []netip.Prefix {
	return []netip.Prefix{netip.PrefixFrom(n.addr, n.addr.BitLen())}
}

// onPath waits until both sides use a path.
func (p *sessionPair) onPath(t testing.TB, path SessionPath) {
	t.Helper()
	eventually(t, fmt.Sprintf("both on %s", path), func() bool {
		ok := p.c.Status().Path == path && p.s.Status().Path == path
		if !ok { // a server learns of a change from the client's packets
			p.client.dev.outbound <- p.client.packet(p.server.addr, 0, 100)
		}
		return ok
	})
}

func TestSessionByDatagram(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	drain(p.server.dev.inbound)
	ping(t, p.client, p.server)
	for _, s := range []*Session{p.c, p.s} {
		st := s.Status()
		if st.CipherSuite != "TLS_PSK_WITH_AES_256_GCM_SHA384" || st.Handshakes != 1 || st.StreamRemote == "" || st.Why == "" {
			t.Errorf("%+v", st)
		}
	}
	p.client.stop()
	p.server.stop()
	if got := p.srvTold.closed(); len(got) != 1 {
		t.Errorf("the server was told %v", p.srvTold)
	} else if g := (*Goodbye)(nil); !errors.As(got[0], &g) || g.Code != 0xb0 {
		t.Errorf("closed: %v", got[0])
	}
}

func TestSessionWithoutDatagrams(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, func(c, s *SessionConfig) {
		c.Link.NoDatagrams, s.Link.NoDatagrams = "the server offers none", "switched off"
		c.Endpoint = ""
		c.Stream.DPD, s.Stream.DPD = steady.DPD, steady.DPD
	})
	ping(t, p.client, p.server)
	eventually(t, "the stream was asked", func() bool { return p.c.Status().StreamRTT > 0 })
	ping(t, p.client, p.server)
	st := p.c.Status()
	if st.Path != PathStream || st.NoDatagrams != "the server offers none" || st.Handshakes != 0 {
		t.Errorf("%+v", st)
	}
	if n := p.srvTold.lostStreams(); n != 0 {
		t.Errorf("%v", p.srvTold)
	}
}

// TestLongIntervals: what servers push, 30 s and 90 s for DPD and more, gives timeouts in proportion.
func TestLongIntervals(t *testing.T) {
	for _, dpd := range []time.Duration{time.Second, 30 * time.Second, 90 * time.Second, 30 * time.Minute} {
		if got := inProportion(dpd, 30*time.Second, 10*time.Second); got != 3*dpd {
			t.Errorf("DPD %v: timeout %v", dpd, got)
		}
	}
}

// An association that may seal no more is ended by the server, and the client makes another. Nobody else could.
func TestWornAssociationOfASession(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	p.s.peer.slots.Load().current.nextSeq.Store(p.s.timing.RekeyAfterRecords - 1)
	p.server.dev.outbound <- p.server.packet(p.client.addr, 1, 100)
	eventually(t, "another association", func() bool { return p.s.Status().Handshakes == 2 && p.c.Status().Handshakes == 2 })
	p.onPath(t, PathDatagrams)
	drain(p.server.dev.inbound)
	ping(t, p.client, p.server)
	if len(p.srvTold.closed())+len(p.clientTold.closed()) != 0 {
		t.Errorf("client: %v, server: %v", p.clientTold, p.srvTold)
	}
}

// A far end that answers requests without the echo, as openconnect does, is alive all the same, and the path MTU
// is found by the number of answers.
func TestAnswersWithoutAnEcho(t *testing.T) {
	noLeaks(t)
	const carries = 1250
	p := newSessionPair(t, steady, nil)
	server, client := netip.MustParseAddrPort("192.0.2.2:443"), p.clientConn.LocalAddr()
	p.net.setPass(func(from, to netip.AddrPort, d []byte) bool {
		return len(d) <= carries+recordHeaderSize+explicitNonceSize+frameHeaderSize+tagSize
	})
	p.onPath(t, PathDatagrams)
	keys := p.c.peer.slots.Load().current
	// From here on the test is the client: it has its keys and answers in its place.
	far := p.net.listen("198.51.100.1:1")
	p.net.setPass(func(from, to netip.AddrPort, d []byte) bool {
		if from == client || len(d) > carries+recordHeaderSize+explicitNonceSize+frameHeaderSize+tagSize {
			return false
		}
		if from == server {
			far.queue <- Inbound{Buf: slices.Clone(d)}
			return false
		}
		return true
	})
	done := make(chan struct{})
	defer func() { <-done }()
	defer far.Close()
	go func() {
		defer close(done)
		for {
			var m Inbound
			select {
			case <-far.closed:
				return
			case m = <-far.queue:
			}
			hdr, record, _, ok := nextRecord(m.Buf)
			if !ok || hdr.epoch == 0 {
				continue
			}
			plain, err := keys.opener.open(record, hdr, new(cryptoScratch))
			if err != nil || hdr.typ != contentApplicationData || frameType(plain[0]) != frameDPDRequest {
				continue
			}
			seq, _ := keys.reserve(1)
			buf := make([]byte, headSlack+tagSize)
			p.net.deliver(far.LocalAddr(), server, keys.sealFrame(buf, 0, frameDPDReply, seq, new(cryptoScratch)))
		}
	}()
	peer := p.s.peer
	peer.mu.Lock()
	peer.mtu.restart(p.s.t.clock.now())
	peer.wakeLocked()
	peer.mu.Unlock()
	eventually(t, "the path MTU is found", func() bool {
		mtu := p.s.Status().InnerMTU
		return mtu <= carries && mtu > carries-2*mtuStep
	})
	time.Sleep(3 * steady.DPD)
	if st := p.s.Status(); st.Path != PathDatagrams || st.Handshakes != 1 {
		t.Errorf("%+v", st)
	}
}
