package transport

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// helloRate bounds the handshakes started for addresses that no peer is known
// at, per second: each costs a few goroutines and, if it goes on, a signature.
const helloRate = 500

// A pending is a handshake under way with one remote address.
type pending struct {
	conn    *handshakeConn
	callee  *peer // whom we call; nil when the remote called us
	abandon context.CancelCauseFunc
	started time.Time
	random  [32]byte // the client's, of a handshake that we serve
	session *session // set when complete and not yet confirmed
	source  netip.Prefix
	element *list.Element // in halfOpenTable.unproven, until the remote has shown that its address is no forgery
}

// halfOpenTable is the handshakes under way, at most one per remote address,
// bounded in all and per source. When it is full the oldest from an address that has not
// been proven goes first: a flood of forged hellos only displaces itself.
// Established associations are elsewhere and never touched from here.
type halfOpenTable struct {
	mu        sync.Mutex
	max       int
	perSource int
	m         map[netip.AddrPort]*pending
	sources   map[netip.Prefix]int
	unproven  *list.List // of netip.AddrPort, oldest first; served ones only
	limiter   *rate.Limiter
}

func newHalfOpenTable(max, perSource int) *halfOpenTable {
	return &halfOpenTable{
		max: max, perSource: perSource,
		m:        make(map[netip.AddrPort]*pending),
		sources:  make(map[netip.Prefix]int),
		unproven: list.New(),
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
// most one for every peer configured.
func (h *halfOpenTable) addCall(remote netip.AddrPort, p *pending) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.m[remote] != nil {
		return errBusy
	}
	p.started = time.Now()
	h.m[remote] = p
	return nil
}

// underLoad tells whether strangers have to prove their address before any
// state is made for them: half the table is taken by addresses not proven, or hellos come fast.
func (h *halfOpenTable) underLoad() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.unproven.Len() >= h.max/2 || h.limiter.Tokens() < helloRate/4
}

// addServed enters a handshake that the remote has started. known says that a
// peer is established at the address: then the limit per source is not for it. proven says
// that the address is no forgery: then the rate is not.
func (h *halfOpenTable) addServed(remote netip.AddrPort, p *pending, known, proven bool) (drop DropReason, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.started, p.source = time.Now(), sourceOf(remote.Addr())
	if !known && h.sources[p.source] >= h.perSource {
		return DropHalfOpen, false
	}
	if !known && !proven && !h.limiter.AllowN(p.started, 1) {
		return DropHalfOpenRate, false
	}
	if len(h.m) >= h.max && !h.evictLocked() {
		return DropHalfOpen, false
	}
	h.m[remote] = p
	h.sources[p.source]++
	if !known && !proven {
		p.element = h.unproven.PushBack(remote)
	}
	return 0, true
}

func (h *halfOpenTable) evictLocked() bool {
	oldest := h.unproven.Front()
	if oldest == nil {
		return false
	}
	remote := oldest.Value.(netip.AddrPort)
	victim := h.m[remote]
	h.removeLocked(remote, victim)
	victim.abandon(errEvicted)
	return true
}

// prove marks that the remote of p has answered what was sent to it.
func (h *halfOpenTable) prove(p *pending) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.element != nil {
		h.unproven.Remove(p.element)
		p.element = nil
	}
}

// completed notes the session of a served handshake. It reports false when the
// handshake has lost its place in the meantime.
func (h *halfOpenTable) completed(remote netip.AddrPort, p *pending, s *session) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p.session = s
	return h.m[remote] == p
}

// finished removes the handshake at remote that led to s, if it is still there.
func (h *halfOpenTable) finished(remote netip.AddrPort, s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.m[remote]; p != nil && p.session == s {
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
	if p.element != nil {
		h.unproven.Remove(p.element)
		p.element = nil
	}
}
