package transport

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"
)

const (
	// confirmRetry spaces the DPD-REQs by which an initiator asks the first record
	// of the peer under a new association: the answer to the first may be lost,
	// or the peer's handshake may return a moment after ours.
	confirmRetry = 100 * time.Millisecond
	// confirmPatience: a stranger that never answers DPD gets data all the same
	// after this long, if there is no older association to wait on.
	confirmPatience = time.Second
	// forgetAfter is how many DPDTimeouts of silence end an association's memory.
	forgetAfter = 10
	// farAway is when step looks again although nothing is due.
	farAway = time.Hour
)

// dpd is dead peer detection (AnyConnect's name; RFC 3706 has the idea).
type dpd struct {
	asked      int64 // clock reading of the last request, 0: answered
	confirming int64 // clock reading of the last request under next
}

// step decides what is due and arms the timer for what comes next. It is the
// only place where a peer acts by itself.
func (p *peer) step() {
	if !p.t.enter() {
		return
	}
	defer p.t.wg.Done()
	p.mu.Lock()
	if p.stopped {
		p.mu.Unlock()
		return
	}
	now := p.t.clock.now()
	var after actions
	next := now + int64(farAway)
	for _, due := range []func(int64, *actions) int64{
		p.expireLocked, p.confirmingLocked, p.livenessLocked, p.streamLocked, p.mtuLocked, p.dialLocked,
	} {
		next = min(next, due(now, &after))
	}
	p.timer.Reset(max(time.Duration(next-now), time.Millisecond))
	p.mu.Unlock()
	for _, do := range after {
		do()
	}
}

// actions are what step does once mu is released: sending, above all.
type actions []func()

func (a *actions) add(f func()) { *a = append(*a, f) }

const never = int64(1) << 62

// expireLocked ends associations that have had their time.
func (p *peer) expireLocked(now int64, after *actions) (due int64) {
	s := *p.slots.Load()
	due = never
	tm := p.timing
	drop := func(slot **association, life time.Duration) {
		a := *slot
		if a == nil {
			return
		}
		end := a.lastInbound.Load() + int64(life)
		if now < end {
			due = min(due, end)
			return
		}
		p.retireLocked(a)
		*slot = nil
	}
	before := s
	if a := s.current; a != nil && a.lingering.Load() {
		if end := tm.HandshakeTimeout - time.Since(a.born); end > 0 {
			due = min(due, now+int64(end))
		} else {
			p.retireLocked(a)
		}
	}
	drop(&s.previous, tm.Overlap)
	drop(&s.next, tm.HandshakeTimeout)
	drop(&s.current, forgetAfter*tm.DPDTimeout)
	if s != before {
		p.setSlotsLocked(&s)
	}
	return due
}

// confirmingLocked asks for the first record under next, as its initiator.
func (p *peer) confirmingLocked(now int64, after *actions) (due int64) {
	s := p.slots.Load()
	a := s.next
	if a == nil {
		return never
	}
	if s.current == nil && time.Since(a.born) >= confirmPatience {
		p.lastInbound.Store(now)
		waiting := p.promoteLocked(a)
		after.add(func() { p.t.sendWaiting(a, waiting) })
		return never
	}
	due = now + int64(confirmPatience)
	if a.initiator {
		if p.dpd.confirming == 0 || now-p.dpd.confirming >= int64(confirmRetry) {
			p.dpd.confirming = now
			p.askLocked(a, now, 0, after)
		}
		due = p.dpd.confirming + int64(confirmRetry)
	}
	return due
}

// livenessLocked asks after silence and keeps NATs open.
func (p *peer) livenessLocked(now int64, after *actions) (due int64) {
	a := p.slots.Load().current
	if a == nil {
		return never
	}
	tm := p.timing
	if p.session != nil {
		return min(p.session.watchLocked(a, now, after), p.keepaliveLocked(a, now, after))
	}
	heard := p.lastInbound.Load()
	if p.dpd.asked != 0 && heard > p.dpd.asked {
		p.dpd.asked = 0
	}
	due = heard + int64(tm.DPD)
	if now >= due {
		again := p.dpd.asked + int64(tm.DPD/4)
		if p.dpd.asked == 0 || now >= again {
			p.dpd.asked = now
			p.askLocked(a, now, 0, after)
			again = now + int64(tm.DPD/4)
			p.checkPathLocked(now, 0) // small requests may pass where full packets do not
		}
		due = again
	}
	return min(due, p.keepaliveLocked(a, now, after))
}

// keepaliveLocked keeps NATs open.
func (p *peer) keepaliveLocked(a *association, now int64, after *actions) (due int64) {
	pause := int64(p.timing.Keepalive)
	if pause <= 0 {
		return never
	}
	due = p.lastOutbound.Load() + pause
	if now >= due {
		after.add(func() { p.t.sendFrame(a, frameKeepalive, nil) })
		p.lastOutbound.Store(now)
		due = now + pause
	}
	return due
}

// streamLocked sees to the stream of a session, and to packets that have waited too long for one.
func (p *peer) streamLocked(now int64, after *actions) (due int64) {
	s := p.session
	if s == nil {
		return never
	}
	if s.stream != nil {
		return s.stream.livenessLocked(now, after)
	}
	if len(p.waiting.packets) == 0 {
		return never
	}
	if due = p.waiting.since + int64(p.timing.HandshakeTimeout); now < due {
		return due
	}
	p.t.drops.add(DropNoAssociation, len(p.waiting.take()))
	return never
}

// askLocked sends a DPD-REQ padded to size bytes of body (0: the shortest).
func (p *peer) askLocked(a *association, now int64, size int, after *actions) {
	body := make([]byte, max(size, dpdBodySize))
	binary.BigEndian.PutUint64(body, uint64(now))
	if p.session != nil {
		p.session.requests.add(dpdAnswer{sent: now, size: len(body)}, p.rtt)
	}
	after.add(func() { p.t.sendFrame(a, frameDPDRequest, body) })
}

// dpdBodySize is the body of the shortest request: our clock, for the round trip.
const dpdBodySize = 8

// answered takes a DPD-RESP: the echo of a request of ours, perhaps padded.
func (p *peer) answered(r dpdAnswer) {
	now := p.t.clock.now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.sent <= 0 || r.sent > now {
		return // a stranger's
	}
	p.answeredLocked(r, now)
}

func (p *peer) answeredLocked(r dpdAnswer, now int64) {
	p.rtt = time.Duration(now - r.sent)
	if p.session != nil {
		p.session.answeredLocked(r.sent, now)
	}
	if p.mtu.answered(r.size, r.sent, now) {
		p.wakeLocked()
	}
}

// checkPathLocked has the path proved again that it carries the packets in use, if
// any have left since the last time and that is pause ago.
func (p *peer) checkPathLocked(now int64, pause time.Duration) {
	packets := p.out.packets.Load()
	if packets == p.checked.packets || now-p.checked.at < int64(pause) {
		return
	}
	p.checked.packets, p.checked.at = packets, now
	p.mtu.suspect(now)
}

// mtuLocked moves the search for the path MTU on.
func (p *peer) mtuLocked(now int64, after *actions) (due int64) {
	a := p.slots.Load().current
	if counted := p.countedMTU(); counted != p.mtuCounted {
		p.mtuCounted = counted
		after.add(p.t.reportMTU)
	}
	if a == nil {
		return never
	}
	p.checkPathLocked(now, mtuCheck)
	due = p.mtu.step(now, p.rtt, func(size int) { p.askLocked(a, now, size, after) })
	if inner := int32(p.mtu.inner()); inner != p.innerMTU.Load() {
		p.t.log.Info("path MTU", "peer", p.name, "inner", inner)
		p.innerMTU.Store(inner)
		after.add(p.t.reportMTU)
	}
	return due
}

// tooBig is told that the system refused a record of an inner packet of size bytes.
func (p *peer) tooBig(size int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mtu.refused(size, p.t.clock.now()) {
		p.wakeLocked()
	}
}

// dialLocked starts a handshake when one is due: there is no association, the
// peer is dead, or the keys are old.
func (p *peer) dialLocked(now int64, after *actions) (due int64) {
	s := p.slots.Load()
	tm := p.timing
	want := never
	switch {
	case p.dialling:
		return never
	case !p.identity.calls():
		p.retireWornLocked(s.current, after)
		return never
	case p.session != nil && p.session.redial:
		want = 0
	case s.next != nil:
		return never
	case s.current == nil:
		if p.endpoint != "" {
			want = 0
		}
	case p.session != nil:
		if w := &p.session.watch; !w.alive {
			want = w.died + int64(2*tm.HandshakeRetry)
		}
		want = min(want, p.rekeyDueLocked(s.current, now))
	default:
		want = p.lastInbound.Load() + int64(tm.DPDTimeout)
		if p.endpoint == "" && now >= want && now-want > int64(tm.DPDTimeout) {
			want = never // it will call us
		}
		want = min(want, p.rekeyDueLocked(s.current, now))
	}
	due = max(want, p.nextDial)
	if now < due {
		return due
	}
	p.dialling = true
	after.add(func() { p.t.startDial(p) })
	return never
}

// retireWornLocked ends an association that has sealed as much as it may and that only the far end could have replaced. A client
// takes close_notify for a reason to begin anew.
func (p *peer) retireWornLocked(a *association, after *actions) {
	if a == nil || a.nextSeq.Load() < p.timing.RekeyAfterRecords {
		return
	}
	after.add(func() {
		p.t.sendCloseNotify(a)
		p.goodbye(a)
	})
}

// rekeyDueLocked is when a's keys are to be replaced. The responder waits a
// tenth longer, so that the two sides do not start at once.
func (p *peer) rekeyDueLocked(a *association, now int64) int64 {
	tm := p.timing
	if a.nextSeq.Load() >= tm.RekeyAfterRecords {
		return now
	}
	life := tm.RekeyAfter
	if !a.initiator {
		life += life / 10
	}
	return now + int64(life-time.Since(a.born))
}

// dialDone takes the end of a handshake that we started.
func (p *peer) dialDone(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialling = false
	if p.stopped {
		return
	}
	now := p.t.clock.now()
	switch {
	case p.session != nil && p.session.again: // it was given up for a new secret
		p.session.again = false
		p.nextDial = now
	case errors.Is(err, errYielded) || errors.Is(err, errBusy): // the peer calls us
		p.nextDial = now + int64(p.backoffLocked())
	case err != nil:
		if now-p.waiting.since > int64(p.timing.HandshakeTimeout) {
			// Nobody waits for these any more, and fresher ones want the room.
			p.t.drops.add(DropNoAssociation, len(p.waiting.take()))
		}
		p.lastErr = err
		p.nextDial = now + int64(p.backoffLocked())
		p.attempts++
		level := slog.LevelWarn
		if p.session != nil && p.attempts > 1 { // with datagrams blocked this goes on for ever, and packets have another way
			level = slog.LevelDebug
		}
		p.t.log.Log(context.Background(), level, "handshake failed", "peer", p.name, "err", err, "attempt", p.attempts, "retry_in", time.Duration(p.nextDial-now).Round(time.Millisecond))
	default:
		p.nextDial = now + int64(p.timing.HandshakeRetry)
	}
	p.wakeLocked()
}

// backoffLocked doubles from HandshakeRetry to HandshakeRetryMax, each with up to
// a third of jitter so that many peers of one that vanished do not come in step.
func (p *peer) backoffLocked() time.Duration {
	tm := p.timing
	d := tm.HandshakeRetry << min(p.attempts, 10)
	if d > tm.HandshakeRetryMax || d <= 0 {
		d = tm.HandshakeRetryMax
	}
	return d + time.Duration(rand.Int64N(int64(d)/3+1))
}
