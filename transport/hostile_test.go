package transport

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// captureHello gets a genuine first ClientHello of ours.
func captureHello(t *testing.T) []byte {
	t.Helper()
	net := newMemNet()
	var hello atomic.Pointer[[]byte]
	net.setPass(func(_, _ netip.AddrPort, d []byte) bool {
		if _, ok := peekClientHello(d); ok {
			c := slices.Clone(d)
			hello.CompareAndSwap(nil, &c)
		}
		return false
	})
	a := newTestNode(t, "10.0.0.1", quick, net.listen("192.0.2.1:1"))
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	net.listen("192.0.2.2:2")
	if err := a.AddPeer(PeerConfig{PublicKey: key.Public(), Endpoint: "192.0.2.2:2"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a hello is sent", func() bool { return hello.Load() != nil })
	a.stop()
	return *hello.Load()
}

// forger makes hellos that differ, from addresses that differ.
func forger(hello []byte) func(i uint32) (from netip.AddrPort, d []byte) {
	randomAt := recordHeaderSize + handshakeHeaderSize + 2
	return func(i uint32) (netip.AddrPort, []byte) {
		d := slices.Clone(hello)
		rand.Read(d[randomAt : randomAt+32])
		var ip [4]byte
		binary.BigEndian.PutUint32(ip[:], 0xc6120000+i) // 198.18.0.0/15, for benchmarks (RFC 2544)
		return netip.AddrPortFrom(netip.AddrFrom4(ip), uint16(1024+i%60000)), d
	}
}

// A flood of forged hellos and of garbage leaves the live association alone, the memory
// bounded, and lets a peer in that really is where it says.
func TestFloodOfForgedHellos(t *testing.T) {
	hello := captureHello(t)
	net, a, b, _, cb := pair(t, steady)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	remote := netip.MustParseAddrPort("192.0.2.2:2000")

	stop := make(chan struct{})
	flooded := make(chan uint32)
	forge := forger(hello)
	go func() {
		var n uint32
		defer func() { flooded <- n }()
		garbage := make([]byte, 300)
		for ; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			from, d := forge(n % 100000)
			net.deliver(from, remote, d)
			rand.Read(garbage)
			garbage[0] = byte(20 + n%4)
			copy(garbage[1:], []byte{0xfe, 0xfd, 0, byte(n % 2)})
			binary.BigEndian.PutUint16(garbage[11:], uint16(len(garbage)-recordHeaderSize))
			net.deliver(from, remote, garbage)
			// Some 50,000 a second, not a whole core, and never all of the wire's queue.
			for n%64 == 63 {
				time.Sleep(time.Millisecond)
				if len(cb.queue) < cap(cb.queue)/2 {
					break
				}
			}
		}
	}()
	drain(b.dev.inbound)
	const packets = 5000
	for i := range uint32(packets) {
		a.dev.outbound <- a.packet(b.addr, i, 1000)
		if i%20 == 19 {
			time.Sleep(2 * time.Millisecond)
		}
	}
	if half := b.Status().HalfOpen; half > defaultMaxHalfOpen {
		t.Errorf("%d half-open handshakes, the bound is %d", half, defaultMaxHalfOpen)
	}
	if n := runtime.NumGoroutine(); n > 50+6*defaultMaxHalfOpen {
		t.Errorf("%d goroutines during the flood", n)
	}
	// The memory wire's queue is shared with the flood; what it drops is no fault of ours.
	eventually(t, "four packets of five came through the flood", func() bool { return len(b.dev.inbound) >= packets*8/10 })
	c := newTestNode(t, "10.0.0.3", quick, net.listen("203.0.113.3:3000"))
	b.knows(t, c, "")
	c.knows(t, b, remote.String())
	ping(t, c, b)

	close(stop)
	n := <-flooded
	drops := b.Status().Drops
	t.Logf("%d forged hellos and as much garbage; drops: %v", n, drops)
	if b.Status().Peers[0].Handshakes != 1 {
		t.Errorf("the live association was replaced: %+v", b.Status().Peers[0])
	}
	if b.drops[DropChallenged].Load() == 0 {
		t.Error("no hello was answered by a cookie")
	}
	eventually(t, "the table empties", func() bool { return b.Status().HalfOpen == 0 })
}

// One source cannot take the table for itself.
func TestHelloesFromOneSource(t *testing.T) {
	hello := captureHello(t)
	net, a, b, _, _ := pair(t, quick)
	b.knows(t, a, "")
	a.knows(t, b, "192.0.2.2:2000")
	ping(t, a, b)
	forge := forger(hello)
	for i := range uint32(200) {
		_, d := forge(i)
		from := netip.AddrPortFrom(netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i)), uint16(i+1))
		net.deliver(from, netip.MustParseAddrPort("192.0.2.2:2000"), d)
	}
	eventually(t, "the excess is answered by cookies", func() bool { return b.drops[DropChallenged].Load() >= 200-defaultMaxHalfOpenPerSource })
	if half := b.Status().HalfOpen; half > defaultMaxHalfOpenPerSource {
		t.Errorf("%d half-open handshakes of one /64", half)
	}
}

// Forged hellos keep us from calling neither in the name of the peer nor, at the peer, from other ports of ours.
func TestForgedHellosKeepNobodyOut(t *testing.T) {
	hello := captureHello(t)
	net, a, b, _, _ := pair(t, Timing{})
	here, there := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("192.0.2.2:2000")
	delayed(net, 20*time.Millisecond)
	forge := forger(hello)
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		for i := uint32(0); ; i++ {
			_, d := forge(i)
			net.deliver(there, here, d)
			net.deliver(netip.AddrPortFrom(here.Addr(), uint16(5000+i%40)), there, d)
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
	}()
	eventually(t, "the forgeries are half open", func() bool {
		return a.Status().HalfOpen == 1 && b.Status().HalfOpen == defaultMaxHalfOpenPerSource
	})
	b.knows(t, a, "")
	a.knows(t, b, there.String())
	eventually(t, "established", func() bool { return established(a) && established(b) })
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Whatever bytes come as datagrams, from known and unknown addresses: no panic,
// and the association stays as it was.
func FuzzInbound(f *testing.F) {
	f.Add([]byte{23, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, 2, 0, 4, 1, 2, 3, 4}, true)
	f.Add([]byte{22, 0xfe, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, false)
	f.Add([]byte{21, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 40}, true)
	f.Add([]byte{20, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}, true)
	f.Add([]byte{}, true)
	net := newMemNet()
	ca, cb := net.listen("192.0.2.1:1000"), net.listen("192.0.2.2:2000")
	a := newTestNode(f, "10.0.0.1", quick, ca)
	b := newTestNode(f, "10.0.0.2", quick, cb)
	b.knows(f, a, "")
	a.knows(f, b, "192.0.2.2:2000")
	ping(f, a, b)
	p := b.sortedPeers()[0]
	in := newInbound(b.Transport, cb)
	f.Fuzz(func(t *testing.T, datagram []byte, known bool) {
		from := netip.MustParseAddrPort("192.0.2.1:1000")
		if !known {
			from = netip.MustParseAddrPort("198.51.100.1:999")
		}
		before := p.slots.Load().current
		heard := before.lastInbound.Load()
		n := len(b.Status().Peers)
		in.message(&Inbound{Buf: slices.Clone(datagram), N: len(datagram), SegmentSize: max(len(datagram), 1), Remote: from})
		in.deliver()
		after := p.slots.Load()
		if after.current != before || after.next != nil && after.next.peer != p {
			t.Fatal("an unauthenticated datagram changed the association")
		}
		if after.current.path.Load().remote.Port() != 1000 || before.lastInbound.Load() < heard {
			t.Fatal("an unauthenticated datagram moved the peer")
		}
		if len(b.Status().Peers) != n || b.Status().HalfOpen > defaultMaxHalfOpen {
			t.Fatal("an unauthenticated datagram left something behind")
		}
	})
}
