package transport

import (
	"bytes"
	"container/list"
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// helloRate bounds the handshakes started for addresses that no peer is known
// at, per second: each costs a few goroutines and, if it goes on, a signature.
const helloRate = 500

// A pending is a handshake under way with one remote address.
type pending struct {
	conn    *handshakeConn
	callee  *peer    // whom we call; nil when the remote called us
	session *Session // whose name the remote's hello bears; nil when it bears none
	remote  netip.AddrPort
	abandon context.CancelCauseFunc
	started time.Time
	random  [32]byte               // the client's, of a handshake that we serve
	cookie  atomic.Pointer[[]byte] // that pion asked the client to echo, once it has
	source  netip.Prefix           // of a handshake that we serve

	// Guarded by halfOpenTable.mu.
	proved    bool          // of a session: the remote has answered what was sent to it
	agreement *agreement    // set when complete and not yet confirmed
	queue     *list.List    // the one of the table's that it is in
	element   *list.Element // and where
}

// sent looks at a datagram of ours to the client, for pion's cookie.
func (p *pending) sent(d []byte) {
	if p.cookie.Load() == nil {
		if cookie, ok := peekCookie(d); ok {
			p.cookie.Store(&cookie)
		}
	}
}

// echoes tells whether a hello brings that cookie back: its sender receives at its address.
func (p *pending) echoes(hello *helloInfo) bool {
	cookie := p.cookie.Load()
	return cookie != nil && bytes.Equal(*cookie, hello.cookie)
}

// halfOpenTable is the handshakes under way, at most one per remote address,
// bounded in all and per source. The bounds are for those that remotes have started and not
// completed: of ours, and of those completed, there are no more than peers. When it is
// full the oldest from an address that has not been proven goes first, as a flood of forged hellos shall
// only displace itself; then the oldest that has, as a genuine one is done
// in a moment. Established associations are elsewhere and never touched from here.
type halfOpenTable struct {
	mu        sync.Mutex
	max       int
	perSource int
	m         map[netip.AddrPort]*pending
	sources   map[netip.Prefix]int
	unproven  *list.List // of netip.AddrPort, oldest first
	proven    *list.List // likewise, by the time of their proof
	trusted   *list.List // likewise, from the addresses of established peers
	limiter   *rate.Limiter
}

func newHalfOpenTable(max, perSource int) *halfOpenTable {
	return &halfOpenTable{
		max: max, perSource: perSource,
		m:        make(map[netip.AddrPort]*pending),
		sources:  make(map[netip.Prefix]int),
		unproven: list.New(),
		proven:   list.New(),
		trusted:  list.New(),
		limiter:  rate.NewLimiter(helloRate, helloRate/2),
	}
}

// sourceOf is the unit that the limit per source counts: an IPv4 address, or
// the /64 that one IPv6 host commonly has to itself.
func sourceOf(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	pfx, _ := a.WithZone("").Prefix(bits)
	return pfx
}

func (h *halfOpenTable) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.m)
}

func (h *halfOpenTable) get(remote netip.AddrPort) *pending {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.m[remote]
}

// addCall enters a handshake that we start. Ours are not limited: there is at
// most one for every peer configured. It takes the place of one that was begun in the remote's name and has shown for a while
// no sign of being the remote's: else a hello forged now and then would keep us from ever calling.
func (h *halfOpenTable) addCall(remote netip.AddrPort, p *pending) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if other := h.m[remote]; other != nil {
		if !h.isDoubtfulLocked(other) {
			return errBusy
		}
		h.removeLocked(remote, other)
		other.abandon(errReplaced)
	}
	p.started = time.Now()
	h.m[remote] = p
	return nil
}

// isDoubtfulLocked tells whether p may well be a forger's: the remote was answered long since and has not come back.
func (h *halfOpenTable) isDoubtfulLocked(p *pending) bool {
	return p.callee == nil && p.agreement == nil && !p.proved && p.queue != h.proven && time.Since(p.started) > helloPatience
}

// underLoad tells whether a stranger at remote has to prove its address before any
// state is made for it: half the table is taken by addresses not proven, hellos come fast, or its source has all that it may,
// which a forger may have taken in its name.
func (h *halfOpenTable) underLoad(remote netip.AddrPort) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.unproven.Len() >= h.max/2 || h.limiter.Tokens() < helloRate/4 || h.sources[sourceOf(remote.Addr())] >= h.perSource
}

// addServed enters a handshake that the remote has started. known says that a
// peer is established at the address: then the limit per source is not for it. proven says
// that the address is no forgery: then the rate is not, and the limit per source is kept by giving up an older one.
func (h *halfOpenTable) addServed(remote netip.AddrPort, p *pending, known, proven bool) (drop DropReason, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.started, p.source = time.Now(), sourceOf(remote.Addr())
	if !known && h.sources[p.source] >= h.perSource && !(proven && h.evictLocked(p.source)) {
		return DropHalfOpen, false
	}
	if !known && !proven && !h.limiter.AllowN(p.started, 1) {
		return DropHalfOpenRate, false
	}
	if h.unproven.Len()+h.proven.Len()+h.trusted.Len() >= h.max && !h.evictLocked(netip.Prefix{}) {
		return DropHalfOpen, false
	}
	h.m[remote] = p
	h.sources[p.source]++
	switch {
	case known:
		h.enqueueLocked(h.trusted, remote, p)
	case proven:
		h.enqueueLocked(h.proven, remote, p)
	default:
		h.enqueueLocked(h.unproven, remote, p)
	}
	return 0, true
}

func (h *halfOpenTable) enqueueLocked(q *list.List, remote netip.AddrPort, p *pending) {
	h.dequeueLocked(p)
	p.queue, p.element = q, q.PushBack(remote)
}

func (h *halfOpenTable) dequeueLocked(p *pending) {
	if p.element != nil {
		p.queue.Remove(p.element)
		p.queue, p.element = nil, nil
	}
}

// evictLocked gives up the oldest handshake of a source, or of any for the zero Prefix, that is not proven, else the
// oldest that is. It reports false if there is none. Within a source what is proven has its moment: else whoever
// receives there could begin as many a second as he likes.
func (h *halfOpenTable) evictLocked(source netip.Prefix) bool {
	for _, queue := range [...]*list.List{h.unproven, h.proven} {
		for e := queue.Front(); e != nil; e = e.Next() {
			remote := e.Value.(netip.AddrPort)
			victim := h.m[remote]
			if source.IsValid() && (victim.source != source || queue == h.proven && time.Since(victim.started) < helloPatience) {
				continue
			}
			h.removeLocked(remote, victim)
			victim.abandon(errEvicted)
			return true
		}
	}
	return false
}

// maxSessionHandshakes is how many a session may have half open: one that goes on, one
// that was given up, and room for those that somebody on the path sends under its name.
const maxSessionHandshakes = 4

// addSession enters a handshake that bears the name of p.session. The name is 32 random bytes that only the two ends
// have seen, and those who see their datagrams. So the bounds for strangers are not for it, but one for the session; when
// that is reached the oldest that has not been proven goes, then the oldest. It reports
// false if there is none.
func (h *halfOpenTable) addSession(p *pending) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.started = time.Now()
	s := p.session
	if len(s.halfOpen) >= maxSessionHandshakes {
		victim := s.halfOpen[0]
		for _, q := range s.halfOpen {
			if !q.proved {
				victim = q
				break
			}
		}
		if victim.proved && time.Since(victim.started) < helloPatience {
			return false // it may be the one that goes on
		}
		h.removeLocked(victim.remote, victim)
		victim.abandon(errEvicted)
	}
	h.m[p.remote] = p
	s.halfOpen = append(s.halfOpen, p)
	return true
}

// prove marks that the remote of p has answered what was sent to it.
func (h *halfOpenTable) prove(remote netip.AddrPort, p *pending) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.proved = true
	if p.queue == h.unproven && p.element != nil {
		h.enqueueLocked(h.proven, remote, p)
	}
}

// isCompleted tells whether the handshake, which we serve, is complete.
func (h *halfOpenTable) isCompleted(p *pending) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return p.agreement != nil
}

// completed notes the agreement of a served handshake. It reports false when the
// handshake has lost its place in the meantime.
func (h *halfOpenTable) completed(remote netip.AddrPort, p *pending, s *agreement) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.agreement = s
	h.dequeueLocked(p)
	p.leaveSession()
	return h.m[remote] == p
}

// finished removes the handshake at remote that led to s, if it is still there.
func (h *halfOpenTable) finished(remote netip.AddrPort, s *agreement) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.m[remote]; p != nil && p.agreement == s {
		h.removeLocked(remote, p)
	}
}

func (h *halfOpenTable) remove(remote netip.AddrPort, p *pending) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.removeLocked(remote, p)
}

func (h *halfOpenTable) removeLocked(remote netip.AddrPort, p *pending) {
	if h.m[remote] != p {
		return
	}
	delete(h.m, remote)
	if p.source.IsValid() {
		if h.sources[p.source]--; h.sources[p.source] <= 0 {
			delete(h.sources, p.source)
		}
	}
	h.dequeueLocked(p)
	p.leaveSession()
}

// leaveSession takes p out of the bound of its session. The table's mu is held.
func (p *pending) leaveSession() {
	if s := p.session; s != nil {
		s.halfOpen = slices.DeleteFunc(s.halfOpen, func(q *pending) bool { return q == p })
	}
}
