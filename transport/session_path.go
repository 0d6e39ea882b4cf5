package transport

import (
	"fmt"
	"slices"
	"time"
)

// SessionPath is the channel that a session's packets take outbound.
type SessionPath string

const (
	PathDatagrams SessionPath = "dtls" // records in datagrams
	PathStream    SessionPath = "cstp" // frames in the TLS connection
	PathNone      SessionPath = "none" // neither: packets wait, some of them
)

const (
	// suspicion is how long packets may leave as datagrams with nothing coming back before it is asked why: far
	// less than any DPD interval, as there is another way.
	suspicion = 500 * time.Millisecond
	// deadAsks is how many requests in a row stay unanswered when datagrams are given up. With a
	// fifth of the datagrams lost one way and the other, one verdict in 170 is wrong; it costs one round trip by the stream.
	deadAsks = 5
	// askSpacing and its ends are those of the requests before a verdict: the answer is given the time of two round trips.
	askSpacingMin = 150 * time.Millisecond
	askSpacingMax = time.Second
	// mirrorAfter is for how long no packet may have come by datagram before
	// one by the stream means that the client has given them up: the last ones by the stream may still come
	// when it has just taken to datagrams.
	mirrorAfter = 500 * time.Millisecond
	// probePause is the time between two requests once datagrams are given up; it grows by half each time, up to probePauseMax.
	probePause    = 500 * time.Millisecond
	probePauseMax = 10 * time.Second
)

// datagramWatch decides whether datagrams arrive. Only what has gone there and back brings them into use: an answer to
// a request of ours; the first record under an association, as the far end cannot have made its keys without our
// last flight; and for a server packets, which its client sends only by a channel on which it hears us. In
// use they stay as long as there are packets or answers. Requests and keepalives of the far end are no
// evidence: it sends them when it hears nothing.
//
// It is guarded by peer.mu.
type datagramWatch struct {
	alive    bool
	mirrored bool // given up because the client has: its packets alone bring them back

	died     int64         // clock reading of the last verdict
	answered int64         // of the last answer to a request
	from     int64         // clock reading since when something may be unanswered; 0: nothing is
	sent     bool          // and something is
	asks     int           // requests in a row, unanswered
	asked    int64         // clock reading of the first of those
	lastAsk  int64         // and of the last
	pause    time.Duration // before the next, once given up
}

// watchLocked asks where there is doubt, gives datagrams up, and tries them again. a is the current association.
func (s *Session) watchLocked(a *association, now int64, after *actions) (due int64) {
	p, w := s.peer, &s.watch
	heard := max(s.lastPacket.Load(), w.answered)
	if !w.alive {
		if due = w.lastAsk + int64(w.pause); now < due {
			return due
		}
		w.lastAsk, w.pause = now, min(max(w.pause+w.pause/2, probePause), probePauseMax, s.timing.DPD)
		p.askLocked(a, now, 0, after)
		return now + int64(w.pause)
	}
	if w.asks > 0 && heard > w.asked {
		w.asks = 0
	}
	if w.asks > 0 {
		spacing := int64(min(max(2*p.rtt+50*time.Millisecond, askSpacingMin), askSpacingMax))
		switch due = w.lastAsk + spacing; {
		case now < due:
			return due
		case w.asks >= deadAsks:
			s.giveUpLocked("datagrams are not answered", now)
			return now
		}
		return s.doubtLocked(a, now, after) + spacing
	}
	doubt := int64(min(suspicion, s.timing.DPD/2))
	switch idle := heard + int64(s.timing.DPD); {
	case now >= idle:
		due = now
	case w.from == 0 && !p.resting.Load(): // the pump has woken us
		w.from, w.sent = now, true
		due = now + doubt
	case w.from == 0:
		due = idle
	case now < w.from+doubt:
		due = w.from + doubt
	case heard > w.from:
		w.from, w.sent = now, false
		due = now + doubt
	case w.sent || p.lastOutbound.Load() >= w.from:
		due = now
	default: // nothing has left for a while: the next packet begins anew
		w.from = 0
		p.resting.Store(true)
		due = idle
	}
	if now < due {
		return due
	}
	return s.doubtLocked(a, now, after) + int64(askSpacingMin)
}

// doubtLocked asks once more. It returns now.
func (s *Session) doubtLocked(a *association, now int64, after *actions) int64 {
	p, w := s.peer, &s.watch
	if w.asks == 0 {
		w.asked = now
		p.checkPathLocked(now, 0) // small requests may pass where full packets do not
	}
	w.asks++
	w.lastAsk = now
	p.askLocked(a, now, 0, after)
	return now
}

// giveUpLocked moves packets to the stream, if there is one.
func (s *Session) giveUpLocked(why string, now int64) {
	w := &s.watch
	*w = datagramWatch{died: now, lastAsk: now, pause: probePause}
	s.routeLocked(why)
	s.peer.wakeLocked()
}

// reviveLocked moves packets to datagrams.
func (s *Session) reviveLocked(why string) {
	if w := &s.watch; !w.alive && s.peer.slots.Load().current != nil && !s.peer.stopped {
		now := s.t.clock.now()
		*w = datagramWatch{alive: true, answered: now}
		s.lastPacket.Store(now)
		s.peer.resting.Store(false)
		s.routeLocked(why)
		s.peer.wakeLocked()
	}
}

// answeredLocked is told of an answer by datagram to a request made at sent.
func (s *Session) answeredLocked(sent, now int64) {
	w := &s.watch
	w.answered = now
	if !w.mirrored && sent >= w.died {
		s.reviveLocked("datagrams are answered")
	}
}

// answeredShortly is told of an answer by datagram that does not say to what: openconnect (9.01, seen) answers every
// request with the type alone.
func (s *Session) answeredShortly() {
	p := s.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	now := s.t.clock.now()
	if r, ok := s.requests.takeSmallest(now, p.rtt); ok {
		p.answeredLocked(r, now)
	}
}

// openRequests are the DPD-REQs that may still be answered. There is one answer to each request that arrives, so
// the number of answers says how many arrived, and as what arrives of small requests and large ones is at least the
// small ones, each answer is taken for one to the smallest that is open. If another was lost that is too low a
// guess, never too high, and the next round corrects it.
type openRequests []dpdAnswer

// maxOpenRequests is more than a step of the search for the path MTU makes, several times.
const maxOpenRequests = 64

func (o *openRequests) add(r dpdAnswer, rtt time.Duration) {
	o.expire(r.sent, rtt)
	if len(*o) < maxOpenRequests {
		*o = append(*o, r)
	}
}

// takeSmallest is the request that an answer is for.
func (o *openRequests) takeSmallest(now int64, rtt time.Duration) (r dpdAnswer, ok bool) {
	o.expire(now, rtt)
	if len(*o) == 0 {
		return r, false
	}
	at := 0
	for i := range *o {
		if (*o)[i].size < (*o)[at].size {
			at = i
		}
	}
	r = (*o)[at]
	*o = slices.Delete(*o, at, at+1)
	return r, true
}

// expire forgets what will not be answered any more.
func (o *openRequests) expire(now int64, rtt time.Duration) {
	oldest := now - int64(max(time.Second, 4*rtt))
	*o = slices.DeleteFunc(*o, func(r dpdAnswer) bool { return r.sent < oldest })
}

// heardDatagrams is called by an inbound pump when packets came by datagram under a.
func (s *Session) heardDatagrams(a *association, now int64) {
	s.lastPacket.Store(now)
	if s.peer.detour.Load() == nil || s.cfg.Client || a != s.peer.slots.Load().current {
		return // to a client what reaches it proves nothing about what it sends
	}
	s.peer.mu.Lock()
	defer s.peer.mu.Unlock()
	s.reviveLocked("the client sends datagrams")
}

// heardStream is called when packets came by the stream while ours go by datagram.
func (s *Session) heardStream(now int64) {
	p, w := s.peer, &s.watch
	if now-s.lastPacket.Load() < int64(mirrorAfter) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !w.alive || p.stopped:
	case !s.cfg.Client:
		s.giveUpLocked("the client has taken to the stream", now)
		w.mirrored = true
	case w.asks == 0 && w.from == 0: // the server may have given datagrams up: find out
		w.from, w.sent = now-int64(suspicion), true
		p.wakeLocked()
	}
}

// routeLocked decides which way packets go from now on, and tells the owner if that has changed.
func (s *Session) routeLocked(why string) {
	p := s.peer
	if p.stopped {
		p.detour.Store(nil)
		return
	}
	var via *stream
	path := PathDatagrams
	switch associated := p.slots.Load().current != nil; {
	case s.watch.alive && associated:
	case s.stream != nil:
		via, path = s.stream, PathStream
	case !associated:
		path = PathNone
	}
	p.detour.Store(via)
	if path == s.path {
		return
	}
	if path == PathStream && s.noDatagrams != "" {
		why = s.noDatagrams // which says more than when
	}
	s.path, s.why = path, why
	s.t.log.Info("session path", "session", p.name, "path", path, "why", why)
	if changed := s.cfg.Events.PathChanged; changed != nil {
		s.events.add(s.t, func() { changed(path, why) })
	}
}

// disassociatedLocked is called when there is no association that seals.
func (s *Session) disassociatedLocked() {
	if s.watch.alive {
		s.giveUpLocked("there is no association", s.t.clock.now())
	}
}

// tieLocked gives datagrams up for good, until Renew, where they go with their stream.
func (s *Session) tieLocked(why string) {
	p := s.peer
	if !s.cfg.TiedChannels || s.secret.Load() == nil || p.stopped {
		return
	}
	s.secret.Store(nil)
	s.noDatagrams = why
	if p.hangUp != nil {
		p.hangUp()
	}
	old := p.slots.Load()
	p.setSlotsLocked(&slots{})
	for a := range old.each {
		p.retireLocked(a)
	}
}

// setStreamLocked gives the session a stream, in place of the one it may have, and starts what reads it.
func (s *Session) setStreamLocked(st *stream, why string) {
	if old := s.stream; old != nil {
		s.old = append(s.old, old)
		// The client closes: it knows that the server has changed over, as it has the answer to its CONNECT.
		old.finish(nil, s.cfg.Client, retiredStreamTime)
	}
	s.stream = st
	s.routeLocked(why)
}

// streamEnded is called once for every stream, when nothing more comes from it.
func (s *Session) streamEnded(st *stream, reason error) {
	p := s.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, old := range s.old {
		if old == st {
			s.old = append(s.old[:i:i], s.old[i+1:]...)
			break
		}
	}
	if s.stream != st {
		return
	}
	s.stream = nil
	if p.stopped {
		return
	}
	s.tieLocked("the stream is lost")
	s.routeLocked(fmt.Sprintf("the stream is lost: %v", reason))
	s.t.log.Info("session stream lost", "session", p.name, "err", reason)
	if s.renewing { // the owner is at work on another
		s.untold = reason
		return
	}
	s.tellLost(reason)
}

func (s *Session) tellLost(reason error) {
	if lost := s.cfg.Events.StreamLost; lost != nil {
		s.events.add(s.t, func() { lost(reason) })
	}
}

// goodbye is called when the far end has said that it ends the session, by its stream st or its association a.
// What comes by an older stream or association ends only that.
func (s *Session) goodbye(st *stream, a *association, g *Goodbye) {
	p := s.peer
	p.mu.Lock()
	slots := p.slots.Load()
	current := st != nil && st == s.stream || a != nil && (a == slots.current && a.agreement.secret == s.secret.Load() || a == slots.next)
	renewing := s.renewing
	p.mu.Unlock()
	switch {
	case current && !renewing:
		s.t.log.Info("peer ended the session", "session", p.name, "code", g.Code, "text", g.Text)
		s.end(g)
	case st != nil:
		st.fail(g)
	default:
		p.goodbye(a)
	}
}
