package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"
)

// A Transport carries packets between a [Device] and peers. Its goroutines are
// one outbound pump per stream of packets, one inbound pump per socket, and one for every handshake
// under way; a peer at rest has a timer and no goroutine.
type Transport struct {
	cfg           Config
	public        PublicKey
	handshaker    *handshaker
	conns         []PacketConn
	log           *slog.Logger
	clock         clock
	drops         dropCounters
	halfOpen      *halfOpenTable
	helloVerifier helloVerifier
	remotes       remoteTable
	routes        atomic.Pointer[bart.Table[*peer]] // allowed prefixes; replaced whole under mu

	ctx    context.Context // ends with Close; handshakes run under it
	cancel context.CancelFunc
	wg     sync.WaitGroup // pumps and handshakes

	searchList atomic.Pointer[[]*peer] // every peer, for records from unknown addresses; replaced whole under mu

	apps appTable // sessions that a hello may name; changed under mu

	mu       sync.Mutex // guards peers, sessions, closed and the replacing of routes and searchList
	peers    map[PublicKey]*peer
	sessions map[*Session]struct{}
	closed   bool
	done     chan struct{} // closed when Close has finished

	spawnMu sync.Mutex // guards wg.Add against wg.Wait
	joining bool       // Close is in wg.Wait

	mtuMu    sync.Mutex // serialises PathMTUChanged
	smallest int        // the inner MTU last reported
}

// New starts the pumps. It takes cfg.Conns, also when it fails.
func New(cfg Config) (*Transport, error) {
	t, err := newTransport(cfg)
	if err != nil {
		for _, c := range cfg.Conns {
			c.Close()
		}
		return nil, err
	}
	for _, r := range append([]Reader{cfg.Device}, cfg.Readers...) {
		t.wg.Go(func() { t.outboundPump(r) })
	}
	for _, c := range t.conns {
		t.wg.Go(func() { t.inboundPump(c) })
	}
	return t, nil
}

func newTransport(cfg Config) (*Transport, error) {
	switch {
	case len(cfg.Conns) == 0:
		return nil, errors.New("transport: no socket")
	case cfg.Device == nil:
		return nil, errors.New("transport: no device")
	case cfg.InnerMTU < 0 || cfg.InnerMTU > MaxInnerMTU:
		return nil, fmt.Errorf("transport: inner MTU %d, at most %d", cfg.InnerMTU, MaxInnerMTU)
	}
	cfg.setDefaults()
	t := &Transport{
		cfg:      cfg,
		conns:    cfg.Conns,
		log:      cfg.Logger,
		clock:    newClock(),
		halfOpen: newHalfOpenTable(cfg.MaxHalfOpen, cfg.MaxHalfOpenPerSource),
		peers:    make(map[PublicKey]*peer),
		sessions: make(map[*Session]struct{}),
		done:     make(chan struct{}),
		smallest: cfg.InnerMTU,
	}
	if !cfg.Key.IsZero() {
		t.public = cfg.Key.Public()
	}
	t.apps.m = make(map[string]*Session)
	t.remotes.m = make(map[netip.AddrPort]*peer)
	t.routes.Store(new(bart.Table[*peer]))
	t.searchList.Store(new([]*peer))
	t.ctx, t.cancel = context.WithCancel(context.Background())
	var err error
	t.handshaker, err = newHandshaker(cfg.Key, cfg.CipherSuites, cfg.Timing.FlightInterval, cfg.Logger)
	if err != nil {
		t.cancel()
		return nil, fmt.Errorf("transport: %w", err)
	}
	return t, nil
}

// AddPeer makes a peer known; with an endpoint it is called at once. It fails
// for our own key, a known key, or a prefix that another peer has.
func (t *Transport) AddPeer(cfg PeerConfig) error {
	cfg.AllowedIPs = slices.Clone(cfg.AllowedIPs)
	for i, pfx := range cfg.AllowedIPs {
		cfg.AllowedIPs[i] = pfx.Masked()
	}
	p := newPeer(t, cfg)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return ErrClosed
	}
	if err := t.admitLocked(cfg); err != nil {
		return fmt.Errorf("peer %s: %w", p.name, err)
	}
	t.peers[cfg.PublicKey] = p
	t.enterLocked(p)
	p.start()
	return nil
}

// enterLocked makes the pumps find p, which is among peers or sessions already.
func (t *Transport) enterLocked(p *peer) {
	routes := t.routes.Load()
	for _, pfx := range p.allowed {
		routes = routes.InsertPersist(pfx, p)
	}
	t.routes.Store(routes)
	t.searchListLocked()
}

// leaveLocked undoes enterLocked for p, which is among peers or sessions no more.
func (t *Transport) leaveLocked(p *peer) {
	routes := t.routes.Load()
	for _, pfx := range p.allowed {
		routes = routes.DeletePersist(pfx)
	}
	t.routes.Store(routes)
	t.searchListLocked()
}

func (t *Transport) admitLocked(cfg PeerConfig) error {
	if !t.handshaker.hasKey() {
		return errors.New("this node has no private key")
	}
	if cfg.PublicKey.IsZero() {
		return errors.New("no public key")
	}
	if cfg.PublicKey == t.public {
		return errors.New("the public key is this node's own")
	}
	if _, ok := t.peers[cfg.PublicKey]; ok {
		return errors.New("the public key is another peer's already")
	}
	return t.admitPrefixesLocked(cfg.AllowedIPs)
}

// admitPrefixesLocked fails for a prefix that a peer has already.
func (t *Transport) admitPrefixesLocked(prefixes []netip.Prefix) error {
	routes := t.routes.Load()
	for _, pfx := range prefixes {
		if other, ok := routes.Get(pfx); ok {
			return fmt.Errorf("allowed prefix %v is peer %s's already", pfx, other.name)
		}
	}
	return nil
}

// RemovePeer says goodbye to a peer and forgets it.
func (t *Transport) RemovePeer(k PublicKey) error {
	t.mu.Lock()
	p, ok := t.peers[k]
	if ok {
		delete(t.peers, k)
		t.leaveLocked(p)
	}
	t.mu.Unlock()
	if !ok {
		return fmt.Errorf("transport: no peer with public key %v", k)
	}
	p.stop(disconnectBody)
	t.reportMTU()
	return nil
}

// Close says goodbye to every peer and session, closes the sockets and waits for the
// pumps; handshakes under way are broken off. The outbound pump ends when the
// Device is closed: close that first, or Close waits for it. A second Close
// waits for the first.
func (t *Transport) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		<-t.done
		return nil
	}
	t.closed = true
	peers := slices.Collect(maps.Values(t.peers))
	sessions := slices.Collect(maps.Keys(t.sessions))
	t.mu.Unlock()
	defer close(t.done)

	t.cancel()
	said := make(chan struct{})
	go func() {
		defer close(said)
		for _, p := range peers {
			p.stop(disconnectBody)
		}
		for _, s := range sessions {
			s.end(ErrClosed)
		}
	}()
	select {
	case <-said:
	case <-time.After(goodbyeTime): // a socket that takes nothing: closing it ends the wait
	}
	var errs []error
	for _, c := range t.conns {
		errs = append(errs, c.Close())
	}
	<-said
	t.spawnMu.Lock()
	t.joining = true
	t.spawnMu.Unlock()
	t.wg.Wait()
	return errors.Join(errs...)
}

// goodbyeTime bounds what Close waits for goodbyes to leave.
const goodbyeTime = time.Second

// enter makes Close wait for the caller, a timer's callback, until it calls
// wg.Done. It reports false once Close waits.
func (t *Transport) enter() bool {
	t.spawnMu.Lock()
	defer t.spawnMu.Unlock()
	if !t.joining {
		t.wg.Add(1)
	}
	return !t.joining
}

// spawn runs f in a goroutine that Close waits for. It reports false, and runs
// nothing, once Close waits.
func (t *Transport) spawn(f func()) bool {
	t.spawnMu.Lock()
	defer t.spawnMu.Unlock()
	if t.joining {
		return false
	}
	t.wg.Go(f)
	return true
}

// retire lets go of an agreement's handshake; Close waits for the goroutines of it.
func (t *Transport) retire(s *agreement) {
	gone := s.retire()
	t.spawn(func() { <-gone })
}

func (t *Transport) searchListLocked() {
	list := t.peerListLocked()
	t.searchList.Store(&list)
}

func (t *Transport) peerListLocked() []*peer {
	list := make([]*peer, 0, len(t.peers)+len(t.sessions))
	for _, p := range t.peers {
		list = append(list, p)
	}
	for s := range t.sessions {
		list = append(list, s.peer)
	}
	return list
}

// sortedPeers is the static peers by name, then key.
func (t *Transport) sortedPeers() []*peer {
	t.mu.Lock()
	list := slices.Collect(maps.Values(t.peers))
	t.mu.Unlock()
	slices.SortFunc(list, func(a, b *peer) int {
		if a.name != b.name {
			return bytes.Compare([]byte(a.name), []byte(b.name))
		}
		return bytes.Compare(a.key[:], b.key[:])
	})
	return list
}

func (t *Transport) peerByKey(k PublicKey) *peer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers[k]
}

// knownPeer is the handshake's check of a certificate's key.
func (t *Transport) knownPeer(k PublicKey) error {
	if t.peerByKey(k) == nil {
		return fmt.Errorf("%w: %v", errUnknownPeer, k)
	}
	return nil
}

// socketFor picks the first socket of remote's family, else the first that takes both. A socket on [::] may be for IPv6
// alone and does not show it; then there is one for IPv4 beside it.
func (t *Transport) socketFor(remote netip.AddrPort) PacketConn {
	var both PacketConn
	for _, c := range t.conns {
		local := c.LocalAddr().Addr()
		switch {
		case local.Is4() == remote.Addr().Is4():
			return c
		case both == nil && local.Is6() && local.IsUnspecified():
			both = c
		}
	}
	return both
}

// reportMTU tells the owner when the smallest inner MTU over all established peers has
// changed. It must not be called with a peer's mu held.
func (t *Transport) reportMTU() {
	if t.cfg.PathMTUChanged == nil {
		return
	}
	t.mtuMu.Lock()
	defer t.mtuMu.Unlock()
	smallest := t.cfg.InnerMTU
	t.mu.Lock()
	for _, p := range *t.searchList.Load() {
		if mtu := p.countedMTU(); mtu != 0 {
			smallest = min(smallest, mtu)
		}
	}
	t.mu.Unlock()
	if smallest != t.smallest {
		t.smallest = smallest
		t.cfg.PathMTUChanged(smallest)
	}
}

// countedMTU is what p has to say to reportMTU, 0 for nothing. A server's sessions have nothing to: one client behind a narrow
// path must not hold down all others, it has the errors that TooBig makes.
func (p *peer) countedMTU() int {
	switch session := p.session; {
	case session != nil && !session.cfg.Client:
		return 0
	case p.slots.Load().current != nil:
		return int(p.innerMTU.Load())
	case session != nil:
		return int(session.mtu.Load())
	}
	return 0
}

// remoteTable finds the peer that lives at a remote address. The inbound pumps
// read it once per receive.
type remoteTable struct {
	mu sync.RWMutex
	m  map[netip.AddrPort]*peer
}

func (r *remoteTable) get(a netip.AddrPort) *peer {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.m[a]
}

// put gives the address to p, whoever had it: the newest authenticated peer at
// an address is the one that is there.
func (r *remoteTable) put(a netip.AddrPort, p *peer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m[a] = p
}

// keepOnly removes every address of p but those that its associations use.
func (r *remoteTable) keepOnly(p *peer, s *slots) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range p.addresses {
		if r.m[a] != p {
			continue
		}
		used := false
		for assoc := range s.each {
			used = used || assoc.path.Load().remote == a
		}
		if !used {
			delete(r.m, a)
		}
	}
}
