package transport

import (
	"bytes"
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
	if isHello && (pend == nil || t.supersedes(pend, hello)) {
		if pend != nil {
			pend.abandon(t.abandonCause(pend))
			t.halfOpen.remove(at.remote, pend)
		}
		t.accept(at, d, hello, known != nil)
		return
	}
	switch {
	case pend == nil:
		t.drops.add(DropUnsolicited, 1)
	case isHello && pend.callee != nil: // both called; the remote will yield
	case isHello && pend.random != hello.random: // too soon to start anew
		t.drops.add(DropUnsolicited, 1)
	default:
		if isHello && len(hello.cookie) != 0 {
			t.halfOpen.prove(pend)
		}
		if !pend.conn.push(d) {
			t.drops.add(DropHandshakeQueue, 1)
		}
	}
}

// supersedes tells whether hello takes the place of the handshake under way
// with the same address. When both sides have called, the one with the smaller
// key yields, so exactly one handshake goes on.
func (t *Transport) supersedes(pend *pending, hello helloInfo) bool {
	if pend.callee != nil {
		return bytes.Compare(t.public[:], pend.callee.key[:]) < 0
	}
	return pend.random != hello.random && (pend.session != nil || time.Since(pend.started) > helloPatience)
}

func (t *Transport) abandonCause(pend *pending) error {
	if pend.callee != nil {
		return errYielded
	}
	return errReplaced
}

// accept starts to serve a handshake if the limits allow.
func (t *Transport) accept(at path, d []byte, hello helloInfo, known bool) {
	ctx, cancel := context.WithTimeout(t.ctx, t.cfg.Timing.HandshakeTimeout)
	ctx, abandon := context.WithCancelCause(ctx)
	to := &path{conn: at.conn, remote: at.remote, local: at.local}
	pend := &pending{
		conn:    newHandshakeConn(at.conn.LocalAddr(), at.remote, func(d []byte) { t.sendDatagram(to, d) }),
		abandon: abandon,
		random:  hello.random,
	}
	if reason, ok := t.halfOpen.addServed(at.remote, pend, known); !ok {
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
		cancel()
	}
}
