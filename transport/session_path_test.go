package transport

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// blocked makes the net pass nothing from what `from` tells, as a firewall for UDP does.
func blocked(net *memNet, from func(netip.AddrPort) bool) {
	net.setPass(func(f, _ netip.AddrPort, _ []byte) bool { return !from(f) })
}

func everybody(netip.AddrPort) bool { return true }

// Datagrams are blocked in mid-transfer: packets go by the stream, and back when datagrams get through. How
// many are lost is bounded by how long that takes to be seen.
func TestSessionFallsBackAndReturns(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, quick, nil)
	p.onPath(t, PathDatagrams)
	blocked(p.net, everybody)
	p.onPath(t, PathStream)
	drain(p.client.dev.inbound)
	drain(p.server.dev.inbound)
	ping(t, p.client, p.server)
	p.net.setPass(nil)
	p.onPath(t, PathDatagrams)
	drain(p.server.dev.inbound)
	ping(t, p.client, p.server)
	if p.srvTold.lostStreams()+p.clientTold.lostStreams() != 0 || len(p.srvTold.closed()) != 0 {
		t.Errorf("client: %v, server: %v", p.clientTold, p.srvTold)
	}
	if st := p.c.Status(); st.StreamOutbound == 0 || st.StreamInbound == 0 {
		t.Errorf("%+v", st)
	}
}

// Only what the server sends is blocked: it hears the client and is not heard. Both must see it.
func TestSessionWithHalfAPath(t *testing.T) {
	noLeaks(t)
	for name, half := range map[string]string{"server unheard": "192.0.2.2:443", "client unheard": "192.0.2.1:1000"} {
		t.Run(name, func(t *testing.T) {
			p := newSessionPair(t, quick, nil)
			p.onPath(t, PathDatagrams)
			blocked(p.net, func(a netip.AddrPort) bool { return a == netip.MustParseAddrPort(half) })
			p.onPath(t, PathStream)
			drain(p.server.dev.inbound)
			ping(t, p.client, p.server)
			time.Sleep(3 * quick.DPD)
			if c, s := p.c.Status(), p.s.Status(); c.Path != PathStream || s.Path != PathStream {
				t.Errorf("client %s: %s; server %s: %s", c.Path, c.Why, s.Path, s.Why)
			}
			p.net.setPass(nil)
			p.onPath(t, PathDatagrams)
		})
	}
}

// A session that never gets a datagram through works all the same.
func TestSessionWithDatagramsBlockedFromTheStart(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, quick, func(c, s *SessionConfig) { c.Endpoint = "192.0.2.99:443" })
	ping(t, p.client, p.server)
	eventually(t, "a handshake has failed", func() bool { return p.c.Status().LastError != "" })
	ping(t, p.client, p.server)
}

// counting sends numbered packets from one node to another until stop, and tells how many.
func counting(from, to *testNode, pause time.Duration) (stop func() uint32) {
	done, ended := make(chan struct{}), make(chan uint32)
	go func() {
		for i := uint32(1); ; i++ {
			select {
			case from.dev.outbound <- from.packet(to.addr, i, 200):
			case <-done:
				ended <- i - 1
				return
			}
			time.Sleep(pause)
		}
	}()
	return func() uint32 {
		close(done)
		return <-ended
	}
}

// received collects the numbers of the packets that reach a node.
type received struct {
	mu   sync.Mutex
	seen map[uint32]int
}

func receiving(n *testNode) *received {
	r := &received{seen: make(map[uint32]int)}
	go func() {
		for {
			select {
			case p := <-n.dev.inbound:
				r.mu.Lock()
				r.seen[number(p)]++
				r.mu.Unlock()
			case <-n.dev.closed:
				return
			}
		}
	}()
	return r
}

// has tells whether 1 to n have come.
func (r *received) has(n uint32) (missing int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := uint32(1); i <= n; i++ {
		if r.seen[i] == 0 {
			missing++
		}
	}
	return missing
}

// New keys and a new stream while packets go both ways: nothing is lost, whichever side changes over first.
func TestRenewLosesNothing(t *testing.T) {
	noLeaks(t)
	for _, serverFirst := range []bool{true, false} {
		p := newSessionPair(t, steady, nil)
		p.onPath(t, PathDatagrams)
		time.Sleep(20 * time.Millisecond)
		drain(p.client.dev.inbound)
		drain(p.server.dev.inbound)
		atServer, atClient := receiving(p.server), receiving(p.client)
		stopUp, stopDown := counting(p.client, p.server, 200*time.Microsecond), counting(p.server, p.client, 200*time.Microsecond)
		for range 3 {
			time.Sleep(50 * time.Millisecond)
			before := p.c.Status().Handshakes
			cl, sl := linkPair(t)
			renew := []func() error{func() error { return p.s.Renew(sl) }, func() error { return p.c.Renew(cl) }}
			if !serverFirst {
				slices.Reverse(renew)
			}
			for _, f := range renew {
				if err := f(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond)
			}
			eventually(t, "a handshake under the new secret", func() bool {
				return p.c.Status().Handshakes > before && p.s.Status().Handshakes > before
			})
			p.onPath(t, PathDatagrams)
		}
		up, down := stopUp(), stopDown()
		for _, x := range []struct {
			at   *received
			sent uint32
			what string
		}{{atServer, up, "to the server"}, {atClient, down, "to the client"}} {
			deadline := time.Now().Add(patience)
			for x.at.has(x.sent) > 0 && time.Now().Before(deadline) {
				time.Sleep(5 * time.Millisecond)
			}
			if n := x.at.has(x.sent); n > 0 || x.sent < 100 {
				t.Errorf("serverFirst %v: %d of %d packets %s were lost; drops %v / %v", serverFirst, n, x.sent, x.what, p.client.Status().Drops, p.server.Status().Drops)
			}
		}
		lost := p.clientTold.lostStreams()
		if serverFirst { // else the client may have closed the old stream by the time that the server hears of the new
			lost += p.srvTold.lostStreams()
		}
		if lost != 0 || len(p.srvTold.closed())+len(p.clientTold.closed()) != 0 {
			t.Errorf("client: %v, server: %v", p.clientTold, p.srvTold)
		}
		p.client.stop()
		p.server.stop()
	}
}

// The client moves to another address: the session follows with the first record, as peers do.
func TestSessionRoams(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	p.clientConn.rebind("198.51.100.7:7777")
	drain(p.server.dev.inbound)
	ping(t, p.client, p.server)
	st := p.s.Status()
	if st.Remote != netip.MustParseAddrPort("198.51.100.7:7777") || st.Roamings != 1 || st.Handshakes != 1 {
		t.Errorf("%+v", st)
	}
}

// The stream is lost: datagrams go on, and with a new CONNECT all is as before. Without datagrams packets wait for it.
func TestSessionOutlivesItsStream(t *testing.T) {
	noLeaks(t)
	for name, datagrams := range map[string]bool{"datagrams": true, "no datagrams": false} {
		t.Run(name, func(t *testing.T) {
			p := newSessionPair(t, steady, func(c, s *SessionConfig) {
				if !datagrams {
					c.Link.NoDatagrams, s.Link.NoDatagrams = "none", "none"
				}
			})
			if datagrams {
				p.onPath(t, PathDatagrams)
			} else {
				ping(t, p.client, p.server)
			}
			netOf(p.c).Close()
			eventually(t, "both know", func() bool { return p.clientTold.lostStreams() == 1 && p.srvTold.lostStreams() == 1 })
			drain(p.server.dev.inbound)
			want := PathNone
			if datagrams {
				want = PathDatagrams
				ping(t, p.client, p.server)
			}
			if st := p.c.Status(); st.Path != want || st.StreamRemote != "" {
				t.Errorf("%+v", st)
			}
			p.client.dev.outbound <- p.client.packet(p.server.addr, 4711, 100)
			time.Sleep(20 * time.Millisecond)
			cl, sl := linkPair(t)
			if !datagrams {
				cl.NoDatagrams, sl.NoDatagrams = "none", "none"
			}
			if err := errors.Join(p.s.Renew(sl), p.c.Renew(cl)); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-p.server.dev.inbound:
				for number(got) != 4711 {
					got = <-p.server.dev.inbound
				}
			case <-time.After(patience):
				t.Fatal("the packet that waited was lost")
			}
			ping(t, p.client, p.server)
			if len(p.srvTold.closed())+len(p.clientTold.closed()) != 0 {
				t.Errorf("client: %v, server: %v", p.clientTold, p.srvTold)
			}
		})
	}
}

// netOf is the TCP connection of a session's stream.
func netOf(s *Session) net.Conn {
	s.peer.mu.Lock()
	defer s.peer.mu.Unlock()
	return s.stream.wire.Conn
}

// With datagrams and the stream alive nothing is given up for want of traffic, and nothing but liveness is sent.
func TestIdleSessionStaysAsItIs(t *testing.T) {
	noLeaks(t)
	var toServer atomic.Int64
	p := newSessionPair(t, quick, nil)
	p.onPath(t, PathDatagrams)
	time.Sleep(quick.DPD)
	p.net.setPass(func(_, to netip.AddrPort, _ []byte) bool {
		if to.Port() == 443 {
			toServer.Add(1)
		}
		return true
	})
	before := p.clientTold.String()
	time.Sleep(5 * quick.DPD)
	if st := p.c.Status(); st.Path != PathDatagrams || p.clientTold.String() != before {
		t.Errorf("%+v: %v", st, p.clientTold)
	}
	if n := toServer.Load(); n > 40 {
		t.Errorf("%d datagrams in %v of rest", n, 5*quick.DPD)
	}
}

// Either side ends the session, by either channel; the other hears why.
func TestSessionGoodbye(t *testing.T) {
	noLeaks(t)
	for name, c := range map[string]struct{ byServer, streamLost bool }{
		"client": {}, "server": {byServer: true}, "client by datagram": {streamLost: true}, "server by datagram": {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			p := newSessionPair(t, steady, nil)
			p.onPath(t, PathDatagrams)
			if c.streamLost {
				netOf(p.c).Close()
				eventually(t, "both know", func() bool { return p.clientTold.lostStreams() == 1 && p.srvTold.lostStreams() == 1 })
			}
			said, heard, to := p.clientTold, p.srvTold, p.c
			if c.byServer {
				said, heard, to = p.srvTold, p.clientTold, p.s
			}
			why := errors.New("maintenance\x1b[2J")
			to.Close(why)
			to.Close(nil)
			eventually(t, "both are told", func() bool { return len(said.closed()) == 1 && len(heard.closed()) == 1 })
			if got := said.closed()[0]; got != why {
				t.Errorf("own side: %v", got)
			}
			g := (*Goodbye)(nil)
			if got := heard.closed()[0]; !errors.As(got, &g) || g.Text != "maintenance.[2J" || g.Code != 0xb0 || g.Terminate {
				t.Errorf("far side: %#v", got)
			}
			if n := len(p.client.Status().Sessions) + len(p.server.Status().Sessions); n != 0 {
				t.Errorf("%d sessions left", n)
			}
			if err := to.Renew(SessionLink{Stream: discardConn{}, NoDatagrams: "none"}); !errors.Is(err, ErrClosed) {
				t.Errorf("Renew of an ended session: %v", err)
			}
		})
	}
}

// A server that sees the new CONNECT says goodbye to the old stream, perhaps before the client has the answer.
func TestGoodbyeToAnOldStreamEndsOnlyThat(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	p.c.Renewing(true)
	p.s.peer.mu.Lock()
	st := p.s.stream
	p.s.peer.mu.Unlock()
	st.send(frameTerminate, nil)
	eventually(t, "the client has lost the stream", func() bool { return p.c.Status().StreamRemote == "" })
	if p.clientTold.lostStreams() != 0 {
		t.Error("told although it is being renewed")
	}
	p.c.Renewing(false)
	eventually(t, "the client is told in the end", func() bool { return p.clientTold.lostStreams() == 1 })
	cl, sl := linkPair(t)
	if err := errors.Join(p.s.Renew(sl), p.c.Renew(cl)); err != nil {
		t.Fatal(err)
	}
	p.onPath(t, PathDatagrams)
	if len(p.clientTold.closed()) != 0 {
		t.Errorf("%v", p.clientTold)
	}
}

// discardConn is a connection on which nothing ever comes and all that is written vanishes.
type discardConn struct{ net.Conn }

func (discardConn) Close() error                     { return nil }
func (discardConn) Write(p []byte) (int, error)      { return len(p), nil }
func (discardConn) SetWriteDeadline(time.Time) error { return nil }

// After a new CONNECT the old association is asked at once, and then with pauses, if it does not answer.
func TestRenewAsksWithPauses(t *testing.T) {
	noLeaks(t)
	p := newSessionPair(t, steady, nil)
	p.onPath(t, PathDatagrams)
	var asked atomic.Int64
	p.net.setPass(func(from, _ netip.AddrPort, d []byte) bool {
		if hdr, _ := parseRecordHeader(d); from == p.clientConn.LocalAddr() && hdr.epoch != 0 {
			asked.Add(1)
		}
		return false
	})
	cl, sl := linkPair(t)
	if err := errors.Join(p.s.Renew(sl), p.c.Renew(cl)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	if n := asked.Load(); n == 0 || n > 20 {
		t.Errorf("%d records in half a second", n)
	}
}
