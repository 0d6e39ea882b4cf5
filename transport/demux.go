package transport

import (
	"context"
	"time"
)

// helloPatience: a second hello with another random, from an address whose
// handshake is younger than this, is ignored. A client that did restart repeats its hello.
const helloPatience = time.Second

// handshakeDatagram routes a datagram that starts with a handshake record, a
// ChangeCipherSpec or a plain alert. It borrows d. Nothing here is
// authenticated: whatever comes, established associations stay as they are.
func (t *Transport) handshakeDatagram(at path, d []byte, known *peer) {
	pend := t.halfOpen.get(at.remote)
	hello, isHello := peekClientHello(d)
	var session *Session
	if isHello {
		if len(hello.sessionID) > 0 {
			session = t.apps.get(hello.sessionID)
		}
		if session == nil && (len(hello.sessionID) > 0 || !t.handshaker.hasKey()) {
			// Not answered, whatever it holds: only who has signed in knows a name that is.
			t.drops.add(DropUnknownSession, 1)
			return
		}
	}
	if isHello && (pend == nil || t.supersedes(pend, &hello)) {
		if hello.messageSeq != 0 || pend != nil && !t.helloVerifier.isAdmitted(at.remote) {
			// It answers a cookie for which nothing was kept; or it is to end a handshake under way with its
			// address, which a forger shall not.
			t.challenge(&at, &hello)
			return
		}
		if pend != nil {
			pend.abandon(t.abandonCause(pend))
			t.halfOpen.remove(at.remote, pend)
		}
		t.accept(at, d, &hello, known != nil, session)
		return
	}
	switch {
	case pend == nil:
		t.drops.add(DropUnsolicited, 1)
	case isHello && pend.callee != nil: // both called; the remote will yield
	case isHello && pend.random != hello.random: // too soon to start anew
		t.drops.add(DropUnsolicited, 1)
	default:
		if isHello && pend.echoes(&hello) {
			t.halfOpen.prove(at.remote, pend)
		}
		if !pend.conn.push(d) {
			t.drops.add(DropHandshakeQueue, 1)
		}
	}
}

// supersedes tells whether hello takes the place of the handshake under way
// with the same address. When both sides have called, the one with the smaller
// key yields, so exactly one handshake goes on.
func (t *Transport) supersedes(pend *pending, hello *helloInfo) bool {
	if pend.callee != nil {
		return !pend.callee.identity.prevails()
	}
	return pend.random != hello.random && (time.Since(pend.started) > helloPatience || t.halfOpen.isCompleted(pend))
}

func (t *Transport) abandonCause(pend *pending) error {
	if pend.callee != nil {
		return errYielded
	}
	return errReplaced
}

// accept starts to serve a handshake if the limits allow: of the session that the hello names, or, where that is
// nil, of who may prove to be a peer. Under load a stranger first gets a cookie that costs no memory.
func (t *Transport) accept(at path, d []byte, hello *helloInfo, known bool, session *Session) {
	proven := !known && t.helloVerifier.isAdmitted(at.remote)
	if !known && !proven && session == nil && t.halfOpen.underLoad(at.remote) {
		t.challenge(&at, hello)
		return
	}
	ctx, cancel := context.WithTimeout(t.ctx, t.cfg.Timing.HandshakeTimeout)
	ctx, abandon := context.WithCancelCause(ctx)
	to := &path{conn: at.conn, remote: at.remote, local: at.local}
	pend := &pending{abandon: abandon, random: hello.random, remote: at.remote, session: session}
	pend.conn = newHandshakeConn(at.conn.LocalAddr(), at.remote, func(d []byte) {
		pend.sent(d)
		t.sendDatagram(to, d)
	})
	pend.conn.addressVerified = proven
	reason, ok := DropSessionHandshakes, false
	if session != nil {
		ok = t.halfOpen.addSession(pend)
	} else {
		reason, ok = t.halfOpen.addServed(at.remote, pend, known, proven)
	}
	if !ok {
		t.drops.add(reason, 1)
		pend.conn.Close()
		abandon(nil)
		cancel()
		return
	}
	pend.conn.push(d)
	serve := func() {
		defer cancel()
		defer abandon(nil)
		t.serve(ctx, pend, to)
	}
	if !t.spawn(serve) {
		pend.conn.Close()
		abandon(nil)
		cancel()
	}
}

// challenge answers a hello, keeping nothing: a first one with a
// cookie, one that brings the cookie back with the request to start anew, now admitted.
func (t *Transport) challenge(at *path, hello *helloInfo) {
	t.drops.add(DropChallenged, 1)
	if t.helloVerifier.verify(at.remote, hello) {
		t.helloVerifier.admit(at.remote)
		t.sendDatagram(at, t.helloVerifier.retryAlert(hello))
		return
	}
	t.sendDatagram(at, t.helloVerifier.challenge(at.remote, hello))
}
