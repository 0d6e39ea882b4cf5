package transport

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// A peer is who is at the other end of a tunnel, and everything that lives as long as it is
// configured: a static peer, or the datagram half of a session. The pumps use the atomic fields; all else is
// guarded by mu and moved on by step, which the peer's timer calls.
type peer struct {
	t        *Transport
	name     string
	identity identity
	key      PublicKey // zero for a session
	session  *Session  // nil for a static peer
	endpoint string
	allowed  []netip.Prefix
	timing   *Timing

	slots    atomic.Pointer[slots]  // replaced under mu
	innerMTU atomic.Int32           // largest packet the path carries
	detour   atomic.Pointer[stream] // of a session: packets go there, not to an association; replaced under mu
	resting  atomic.Bool            // of a session: the next packet outbound is to wake step

	lastInbound  atomic.Int64 // clock reading of the last authenticated record
	lastOutbound atomic.Int64 // of the last record sent
	out, in      traffic
	roamings     atomic.Uint64

	mu            sync.Mutex
	stopped       bool
	timer         *time.Timer
	addresses     []netip.AddrPort // every entry of Transport.remotes that may be ours
	dialling      bool
	hangUp        context.CancelFunc // ends the call under way; nil before the first
	attempts      int                // failed handshakes in a row
	nextDial      int64              // clock reading before which none is tried
	lastErr       error
	lastHandshake time.Time
	handshakes    uint64
	rtt           time.Duration
	waiting       waitingRoom
	dpd           dpd
	mtu           pathMTU
	mtuCounted    int // countedMTU when reportMTU was last told
	checked       struct {
		packets uint64 // outbound, when the path was last checked
		at      int64  // clock reading of that
	}
	movedLogged int64 // clock reading of the last line about roaming
}

// traffic counts packets one way.
type traffic struct {
	packets, bytes atomic.Uint64
}

func (c *traffic) add(packets, bytes int) {
	c.packets.Add(uint64(packets))
	c.bytes.Add(uint64(bytes))
}

// newPeer makes a static peer. It takes cfg.
func newPeer(t *Transport, cfg PeerConfig) *peer {
	p := &peer{
		t: t, name: cfg.Name, identity: pinnedKey{t, cfg.PublicKey}, key: cfg.PublicKey,
		endpoint: cfg.Endpoint, allowed: cfg.AllowedIPs, timing: &t.cfg.Timing,
	}
	if p.name == "" {
		p.name = cfg.PublicKey.String()[:8]
	}
	p.init(t.cfg.InnerMTU)
	return p
}

// init makes p ready for start. Its path is taken to carry packets of mtu bytes, and not asked for more.
func (p *peer) init(mtu int) {
	p.slots.Store(new(slots))
	p.innerMTU.Store(int32(mtu))
	p.mtu.init(mtu)
}

// start arms the timer; a peer with an endpoint is called at once.
func (p *peer) start() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.startLocked()
}

func (p *peer) startLocked() {
	p.timer = time.AfterFunc(0, p.step)
}

// stop says goodbye, with body as the DISCONNECT unless it is nil, and forgets the associations.
func (p *peer) stop(body []byte) {
	p.mu.Lock()
	if p.stopped {
		p.mu.Unlock()
		return
	}
	p.stopped = true
	p.timer.Stop()
	if p.hangUp != nil {
		p.hangUp()
	}
	s := p.slots.Load()
	p.setSlotsLocked(&slots{})
	p.waiting = waitingRoom{}
	p.mu.Unlock()
	for a := range s.each {
		if body != nil {
			p.t.sendFrame(a, frameDisconnect, body)
		}
		p.t.sendCloseNotify(a)
		p.mu.Lock()
		p.retireLocked(a)
		p.mu.Unlock()
	}
}

// wake runs step soon: something has changed that it decides on.
func (p *peer) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeLocked()
}

func (p *peer) wakeLocked() {
	if !p.stopped && p.timer != nil {
		p.timer.Reset(0)
	}
}

// setSlotsLocked swaps the associations and drops the addresses no longer used.
func (p *peer) setSlotsLocked(s *slots) {
	p.slots.Store(s)
	if p.session != nil && s.current == nil {
		p.session.disassociatedLocked()
	}
	p.t.remotes.keepOnly(p, s)
	kept := p.addresses[:0]
	for _, a := range p.addresses {
		if p.t.remotes.get(a) == p {
			kept = append(kept, a)
		}
	}
	p.addresses = kept
}

// claimLocked makes the inbound pumps find p at a.
func (p *peer) claimLocked(a netip.AddrPort) {
	p.t.remotes.put(a, p)
	for _, known := range p.addresses {
		if known == a {
			return
		}
	}
	p.addresses = append(p.addresses, a)
}

// install takes a completed handshake. The association opens records at once,
// and seals from the first record of the peer under it: only then is it certain
// that the peer has it too (RFC 6347 4.2.4; a record sent earlier would be lost).
func (p *peer) install(s *agreement, at *path) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return ErrClosed
	}
	a := &association{
		peer: p, suite: s.suite, sealer: &s.sealer, opener: &s.opener,
		initiator: s.initiator, agreement: s, born: time.Now(),
	}
	a.servedAt = at.remote
	a.lingering.Store(true)
	a.nextSeq.Store(s.nextSeq)
	a.path.Store(at)
	a.lastInbound.Store(p.t.clock.now())
	old := p.slots.Load()
	if rival := old.next; rival != nil {
		if rival.initiator == p.identity.prevails() && a.initiator != rival.initiator && time.Since(rival.born) < confirmPatience {
			return errYielded
		}
		p.retireLocked(rival)
	}
	if p.session != nil && s.secret == p.session.secret.Load() {
		p.session.redial = false
	}
	p.claimLocked(at.remote)
	p.setSlotsLocked(&slots{current: old.current, next: a, previous: old.previous})
	p.dpd.confirming = 0
	p.wakeLocked()
	return nil
}

// confirm is called when a has opened its first record: the peer has it too.
func (p *peer) confirm(a *association) {
	p.mu.Lock()
	p.retireLocked(a)
	waiting := p.promoteLocked(a)
	if p.session != nil {
		p.session.reviveLocked("datagrams arrive")
	}
	p.mu.Unlock()
	p.t.sendWaiting(a, waiting)
}

// promoteLocked makes next the one that seals. It returns what has waited for
// it, for the caller to send once mu is released.
func (p *peer) promoteLocked(a *association) (waiting [][]byte) {
	s := p.slots.Load()
	if s.next != a || p.stopped {
		return nil
	}
	if s.previous != nil {
		p.retireLocked(s.previous)
	}
	if s.current != nil { // may have been silent for long: what is under way gets its Overlap from now
		s.current.lastInbound.Store(p.t.clock.now())
	}
	p.setSlotsLocked(&slots{current: a, previous: s.current})
	p.attempts, p.lastErr = 0, nil
	p.handshakes++
	p.lastHandshake = time.Now()
	p.dpd = dpd{}
	at := a.path.Load()
	if s.current == nil || s.current.path.Load().remote != at.remote {
		p.mtu.restart(p.t.clock.now())
	}
	p.t.log.Info("peer established", "peer", p.name, "remote", at.remote, "suite", a.suite, "rekey", s.current != nil)
	p.wakeLocked()
	return p.waiting.take()
}

// retireLocked ends what is left of a's handshake: pion, and the place in the
// half-open table.
func (p *peer) retireLocked(a *association) {
	if a.lingering.CompareAndSwap(true, false) {
		p.t.halfOpen.finished(a.servedAt, a.agreement)
		p.t.retire(a.agreement)
	}
}

// goodbye is called when the peer has ended a: an authenticated DISCONNECT,
// TERMINATE or close_notify.
func (p *peer) goodbye(a *association) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := *p.slots.Load()
	switch a {
	case s.current:
		s.current = nil
		p.t.log.Info("peer said goodbye", "peer", p.name)
		// It may come back at once, but gets a moment first.
		p.nextDial = p.t.clock.now() + int64(p.timing.HandshakeRetry)
	case s.next:
		s.next = nil
	case s.previous:
		s.previous = nil
	default:
		return
	}
	p.retireLocked(a)
	p.setSlotsLocked(&s)
	p.wakeLocked()
}

// roam moves a to where its newest record came from. Only an authenticated
// record newer than all before it gets here, so a replay cannot.
func (p *peer) roam(a *association, to *path) {
	p.mu.Lock()
	defer p.mu.Unlock()
	from := a.path.Load()
	if p.stopped || *from == *to {
		return
	}
	if from.remote == to.remote { // only our own address or socket is another
		a.path.Store(to)
		return
	}
	a.path.Store(to)
	p.claimLocked(to.remote)
	p.setSlotsLocked(p.slots.Load())
	p.roamings.Add(1)
	now := p.t.clock.now()
	p.mtu.restart(now)
	if now-p.movedLogged >= int64(time.Second) || p.movedLogged == 0 { // a peer can move with every record
		p.movedLogged = now
		p.t.log.Info("peer moved", "peer", p.name, "from", from.remote, "to", to.remote)
	}
	p.wakeLocked()
}

// livePath is the way by which p is heard, nil if it is not.
func (p *peer) livePath() *path {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.slots.Load().current
	if a == nil {
		return nil
	}
	alive := p.t.clock.now()-p.lastInbound.Load() < int64(p.timing.DPDTimeout)
	if p.session != nil {
		alive = p.session.watch.alive
	}
	if !alive {
		return nil
	}
	return a.path.Load()
}

// reclaim makes the inbound pumps find p where a is, after another peer was heard from there.
func (p *peer) reclaim(a *association, at netip.AddrPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped || a.path.Load().remote != at {
		return
	}
	p.claimLocked(at)
	p.setSlotsLocked(p.slots.Load())
}

// stageLocked keeps a copy of a packet for a peer that is not connected yet; step
// calls such a peer as soon as it may anyhow. It reports whether the packet was kept.
func (p *peer) stageLocked(packet []byte) bool {
	if p.stopped || (p.endpoint == "" && p.session == nil && p.slots.Load().newest() == nil) {
		return false
	}
	return p.waiting.add(packet, p.t.clock.now())
}

// A waitingRoom holds outbound packets until a peer is connected, so that the
// packet that caused the call is not the one that is lost. When it is full the
// newest is refused: the first of a connection are worth more than its retries.
type waitingRoom struct {
	packets [][]byte
	bytes   int
	since   int64 // clock reading of the oldest
}

const (
	maxWaitingPackets = 128
	maxWaitingBytes   = 128 << 10
)

func (w *waitingRoom) add(packet []byte, now int64) bool {
	if len(w.packets) >= maxWaitingPackets || w.bytes+len(packet) > maxWaitingBytes {
		return false
	}
	if len(w.packets) == 0 {
		w.since = now
	}
	w.packets = append(w.packets, append([]byte(nil), packet...))
	w.bytes += len(packet)
	return true
}

func (w *waitingRoom) take() [][]byte {
	packets := w.packets
	*w = waitingRoom{}
	return packets
}

func (p *peer) stateLocked() PeerState {
	s := p.slots.Load()
	silent := p.t.clock.now() - p.lastInbound.Load()
	switch {
	case p.session != nil && p.session.stream != nil:
		return PeerEstablished
	case s.current != nil && silent < int64(p.timing.DPDTimeout)+int64(time.Second):
		return PeerEstablished
	case s.next != nil || p.dialling || p.endpoint != "":
		return PeerConnecting
	}
	return PeerIdle
}
