package transport

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

func pendingOne() *pending {
	_, abandon := context.WithCancelCause(context.Background())
	return &pending{abandon: abandon}
}

func remoteNumber(i int) netip.AddrPort {
	return netip.MustParseAddrPort(fmt.Sprintf("198.51.100.%d:1000", i))
}

// A hub that calls a thousand dead peers still serves, and so does one whose peers
// have yet to send their first record.
func TestHalfOpenBoundIsForStrangers(t *testing.T) {
	h := newHalfOpenTable(4, 4)
	for i := range 8 {
		if err := h.addCall(remoteNumber(i), pendingOne()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 8 {
		p, remote := pendingOne(), remoteNumber(20+i)
		if reason, ok := h.addServed(remote, p, false, true); !ok {
			t.Fatalf("handshake %d beside calls and completed ones: %v", i, reason)
		}
		if !h.completed(remote, p, completed(false)) {
			t.Fatal("a completed handshake lost its place")
		}
	}
	if h.len() != 16 {
		t.Errorf("%d in the table", h.len())
	}
}

// Addresses that are genuine are cheap, too: a table full of them keeps nobody out.
func TestHalfOpenEvictsProvenOnesLast(t *testing.T) {
	h := newHalfOpenTable(3, 4)
	all := make([]*pending, 6)
	for i := range all {
		all[i] = pendingOne()
	}
	h.addServed(remoteNumber(0), all[0], true, false)
	h.addServed(remoteNumber(1), all[1], false, true)
	h.addServed(remoteNumber(2), all[2], false, false)
	for i, victim := range []int{2, 3, 1} { // what is added: 3 unproven, 4 proven, 5 proven
		if _, ok := h.addServed(remoteNumber(3+i), all[3+i], false, i > 0); !ok {
			t.Fatalf("handshake %d was refused", 3+i)
		}
		if h.get(remoteNumber(victim)) != nil {
			t.Errorf("after %d, %d is still there", 3+i, victim)
		}
	}
	if h.get(remoteNumber(0)) == nil {
		t.Error("a stranger displaced an established peer's handshake")
	}
	for i, p := range all {
		h.remove(remoteNumber(i), p)
	}
	if n := h.unproven.Len() + h.proven.Len() + h.trusted.Len() + len(h.m) + len(h.sources); n != 0 {
		t.Errorf("%d entries left behind", n)
	}
}

// Any cookie would do for a forger; only pion's own proves the address.
func TestOnlyTheCookieSentProves(t *testing.T) {
	var v helloVerifier
	remote := remoteNumber(1)
	hello := &helloInfo{suites: []byte{0xc0, 0x2b}, compression: []byte{0}}
	request := v.challenge(remote, hello)
	p := pendingOne()
	h := newHalfOpenTable(4, 4)
	h.addServed(remote, p, false, false)
	hello.cookie = make([]byte, cookieSize)
	if p.echoes(hello) {
		t.Error("a cookie proves something before one was sent")
	}
	p.sent(request)
	if p.echoes(hello) || p.echoes(&helloInfo{}) {
		t.Error("a made up cookie proves something")
	}
	hello.cookie = request[len(request)-cookieSize:]
	if !p.echoes(hello) {
		t.Fatal("the cookie that was sent is not known again")
	}
	h.prove(remote, p)
	if h.unproven.Len() != 0 || h.proven.Len() != 1 {
		t.Error("the proof changes nothing")
	}
	for i := range request {
		if _, ok := peekCookie(request[:i]); ok {
			t.Errorf("a cookie in the first %d bytes", i)
		}
	}
}

// echoing makes of a first hello the second, with the cookie of a HelloVerifyRequest.
func echoing(hello, request []byte) []byte {
	const cookieAt = recordHeaderSize + handshakeHeaderSize + 2 + 32 + 1 // behind an empty session ID
	cookie := request[len(request)-cookieSize:]
	d := slices.Concat(hello[:cookieAt], []byte{cookieSize}, cookie, hello[cookieAt+1:])
	binary.BigEndian.PutUint16(d[11:], uint16(len(d)-recordHeaderSize))
	length := len(d) - recordHeaderSize - handshakeHeaderSize
	for _, at := range []int{14, 22} { // length and fragment length, 3 bytes each
		d[at], d[at+1], d[at+2] = byte(length>>16), byte(length>>8), byte(length)
	}
	d[18] = 1 // message_seq
	return d
}

// A hello in the name of the peer that we call ends our call only if its sender
// receives there; and the answer is smaller than the hello.
func TestForgedHelloEndsNoCall(t *testing.T) {
	hello := captureHello(t)
	var p *peer
	for p == nil || p.identity.prevails() {
		p = lonePeer(t, "192.0.2.2:2")
	}
	tr, sink := p.t, p.t.conns[0].(*sinkConn)
	remote := netip.MustParseAddrPort("192.0.2.2:2")
	call := pendingOne()
	call.callee = p
	if err := tr.halfOpen.addCall(remote, call); err != nil {
		t.Fatal(err)
	}
	at := path{conn: sink, remote: remote}
	tr.handshakeDatagram(at, slices.Clone(hello), nil)
	if tr.halfOpen.get(remote) != call {
		t.Fatal("a forged hello has ended our call")
	}
	if len(sink.wire) == 0 || len(sink.wire) >= len(hello) {
		t.Fatalf("a hello of %d bytes is answered by %d", len(hello), len(sink.wire))
	}
	second := echoing(hello, sink.wire)
	if _, ok := peekClientHello(second); !ok {
		t.Fatal("the second hello is malformed")
	}
	tr.handshakeDatagram(at, second, nil)
	if tr.halfOpen.get(remote) != call || !tr.helloVerifier.isAdmitted(remote) {
		t.Fatal("the cookie was not taken for what it is")
	}
	tr.handshakeDatagram(at, slices.Clone(hello), nil)
	if got := tr.halfOpen.get(remote); got == call || got == nil {
		t.Error("the peer's own call did not take the place of ours")
	}
	tr.cancel()
	tr.wg.Wait()
}

// A hello that brings back a cookie is no first one: pion would wait for that in vain.
func TestSecondHelloWithoutAFirst(t *testing.T) {
	hello := captureHello(t)
	p := lonePeer(t, "")
	tr, sink := p.t, p.t.conns[0].(*sinkConn)
	at := path{conn: sink, remote: remoteNumber(7)}
	var v helloVerifier
	info, _ := peekClientHello(hello)
	tr.handshakeDatagram(at, echoing(hello, v.challenge(at.remote, &info)), nil)
	if tr.halfOpen.len() != 0 {
		t.Error("state is kept for it")
	}
	cookie, ok := peekCookie(sink.wire)
	if !ok || len(cookie) != cookieSize {
		t.Error("it was not asked anew")
	}
	tr.cancel()
	tr.wg.Wait()
}

// A hello forged in the name of a peer that we want to call does not keep us from it for long.
func TestCallTakesThePlaceOfADoubtfulOne(t *testing.T) {
	h := newHalfOpenTable(4, 4)
	remote := remoteNumber(1)
	for name, c := range map[string]struct {
		proven, proved, young, completed bool
		taken                            bool
	}{
		"forged, perhaps":      {taken: true},
		"just begun":           {young: true},
		"echoes pion's cookie": {proved: true},
		"was admitted":         {proven: true},
		"is complete":          {completed: true},
	} {
		served, call := pendingOne(), pendingOne()
		var given error
		served.abandon = func(err error) { given = err }
		h.addServed(remote, served, false, c.proven)
		if !c.young {
			served.started = served.started.Add(-2 * helloPatience)
		}
		if c.proved {
			h.prove(remote, served)
		}
		if c.completed {
			h.completed(remote, served, completed(false))
		}
		err := h.addCall(remote, call)
		if taken := err == nil && h.get(remote) == call && given != nil; taken != c.taken || !taken && h.get(remote) != served {
			t.Errorf("%s: %v, served one ended by %v", name, err, given)
		}
		h.remove(remote, served)
		h.remove(remote, call)
	}
	if n := h.unproven.Len() + h.proven.Len() + len(h.m) + len(h.sources); n != 0 {
		t.Errorf("%d entries left behind", n)
	}
}

// A source that has all it may, perhaps by forgeries, still gets in once it has shown that it receives there.
func TestAFullSourceIsAskedForACookie(t *testing.T) {
	h := newHalfOpenTable(100, 3)
	at := func(port int) netip.AddrPort { return netip.AddrPortFrom(remoteNumber(1).Addr(), uint16(port)) }
	h.addServed(remoteNumber(2), pendingOne(), false, false)
	for port := range 3 {
		if h.underLoad(at(1)) {
			t.Fatalf("with %d of 3", port)
		}
		h.addServed(at(port), pendingOne(), false, false)
	}
	if !h.underLoad(at(1)) || h.underLoad(remoteNumber(2)) {
		t.Error("not the full source alone is asked")
	}
	if _, ok := h.addServed(at(10), pendingOne(), false, false); ok {
		t.Error("more than a source may have")
	}
	for i := range 3 {
		if _, ok := h.addServed(at(20+i), pendingOne(), false, true); !ok {
			t.Fatalf("one that is proven was refused after %d", i)
		}
	}
	if _, ok := h.addServed(at(23), pendingOne(), false, true); ok {
		t.Error("what is proven has lost its place at once")
	}
	first := h.get(at(20))
	first.started = first.started.Add(-2 * helloPatience)
	if _, ok := h.addServed(at(23), pendingOne(), false, true); !ok || h.get(at(20)) != nil {
		t.Error("what is proven has kept its place for ever")
	}
	if h.len() != 4 || h.get(remoteNumber(2)) == nil {
		t.Errorf("%d in the table", h.len())
	}
}
