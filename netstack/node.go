package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"github.com/penstock-vpn/penstock/linkep"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// A Node is one member of the VPN. All its methods may be called from any goroutine.
//
// It starts from the inside out: stack, link endpoint, wrapper, transport, peers. It stops
// in the order that Close describes.
type Node struct {
	cfg      Config
	log      *slog.Logger
	public   PublicKey
	started  time.Time
	v4, v6   bool // the families it speaks
	resolver *net.Resolver
	dns      *dnsClient

	stack       *stack.Stack
	budget      *sendBudget
	link        *linkep.Endpoint
	wrapper     *tunwrap.Wrapper
	filter      *tunwrap.Filter // nil: everything passes
	transport   *transport.Transport
	router      *router            // nil: the node routes nothing
	openconnect *openconnectTunnel // nil: the node is no client of a server
	tun         kernelTUN          // nil: the node has no interface of the kernel
	fork        *tunwrap.Fork      // before wrapper and tun; nil if tun is

	portConflict string         // see TUNStatus
	lingering    sync.WaitGroup // of releaseUnused; added to under mu unless closed

	own     map[netip.Addr]bool // the node's addresses; never changes
	allowed atomic.Pointer[bart.Lite]

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	closed chan struct{} // closed when Close has ended

	mu           sync.Mutex
	peers        []Peer               // what AddPeer has admitted
	members      map[*member]struct{} // what AddSession has
	behindServer []netip.Prefix       // the OpenConnect one
	tunnelNAT    []tunwrap.NATRule    // towards it
	owned        map[*ownedCloser]struct{}
	err          error // of Close
}

// An ownedCloser is something that Close closes first.
type ownedCloser struct{ io.Closer }

// New validates cfg, reporting everything that is wrong with it as [ConfigError]s, and
// starts a node. It does not wait for peers, see [Node.WaitEstablished], but for the OpenConnect server if
// there is to be one.
func New(cfg Config) (*Node, error) {
	var o *openconnectTunnel
	var first *openconnect.Tunnel
	if cfg.OpenConnect != nil {
		var err error
		if o, first, err = connectOpenConnect(&cfg); err != nil {
			closeAll(cfg.Conns)
			cfg.TUN.takeFD()
			return nil, err
		}
	}
	n, err := newInner(cfg)
	if err != nil {
		closeAll(cfg.Conns)
		cfg.TUN.takeFD()
		o.giveUp(first)
		return nil, err
	}
	if err := n.startOuter(); err != nil {
		o.giveUp(first)
		n.Close()
		return nil, err
	}
	if o != nil {
		if err := o.start(n, first); err != nil {
			o.giveUp(nil)
			n.Close()
			return nil, err
		}
		n.openconnect = o
	}
	return n, nil
}

// newInner makes the node up to the link endpoint.
func newInner(cfg Config) (*Node, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.QueueBytes == 0 {
		cfg.QueueBytes = DefaultQueueBytes
	}
	n := &Node{
		cfg:     cfg,
		log:     cfg.Logger,
		public:  cfg.PrivateKey.Public(),
		started: time.Now(),
		own:     make(map[netip.Addr]bool),
		owned:   make(map[*ownedCloser]struct{}),
		members: make(map[*member]struct{}),
		closed:  make(chan struct{}),
	}
	for _, p := range cfg.Addresses {
		n.own[p.Addr()] = true
	}
	n.v4, n.v6 = cfg.families()
	n.allowed.Store(new(bart.Lite))
	n.dns = newDNSClient(&n.cfg.DNS, n.Dial)
	n.resolver = n.newResolver()
	n.link = linkep.New(linkep.Options{
		MTU: uint32(n.innerMTU()), GSOMaxSize: superpacketSize(n.innerMTU()), NoGSO: cfg.NoGSO, QueueBytes: cfg.QueueBytes, Queues: cfg.Queues,
	})
	var err error
	if n.stack, err = newStack(&n.cfg, n.link); err != nil {
		return nil, err
	}
	n.budget = newSendBudget(n.cfg.TCP.Send.or(defaultTCPSend))
	n.ctx, n.cancel = context.WithCancel(context.Background())
	return n, nil
}

// startOuter makes the rest of the path and admits the peers. On failure the node is to be
// closed.
func (n *Node) startOuter() error {
	conns, err := n.cfg.open()
	if err != nil {
		n.cfg.TUN.takeFD()
		return fmt.Errorf("netstack: %w", err)
	}
	link := tunwrap.Link(n.link)
	if n.cfg.Router != nil {
		if n.router, err = newRouter(n); err != nil {
			closeAll(conns)
			n.cfg.TUN.takeFD()
			return err
		}
		link = n.router.link
		if _, err := n.adopt(n.router); err != nil {
			closeAll(conns)
			n.cfg.TUN.takeFD()
			return err
		}
	}
	n.wrapper = tunwrap.New(link, tunwrap.Options{MTU: n.innerMTU(), BatchSize: batchPackets(n.innerMTU()), Logger: n.log})
	if n.filter, err = n.cfg.newFilter(); err != nil {
		closeAll(conns)
		n.cfg.TUN.takeFD()
		return fmt.Errorf("netstack: %w", err)
	}
	n.wrapper.SetFilter(n.filter)
	if n.cfg.TUN != nil {
		if err := n.startTUN(); err != nil {
			closeAll(conns)
			return err
		}
	}
	device, readers := n.device()
	n.transport, err = transport.New(transport.Config{
		Key:             n.cfg.PrivateKey,
		Conns:           conns,
		Device:          device,
		Readers:         readers,
		TooBig:          n.tooBig,
		PathMTUChanged:  n.pathMTUChanged,
		InnerMTU:        n.innerMTU(),
		ResolveEndpoint: n.cfg.ResolveEndpoint,
		EarlyDrop:       n.earlyDrop(),
		Logger:          n.log,
		CipherSuites:    n.cfg.CipherSuites,
		Timing:          n.cfg.Timing,
	})
	if err != nil {
		return fmt.Errorf("netstack: %w", err)
	}
	for _, p := range n.cfg.Peers {
		if err := n.AddPeer(p); err != nil {
			return err
		}
	}
	return nil
}

// innerMTU is the largest packet at the start.
func (n *Node) innerMTU() int {
	switch {
	case n.cfg.MTU != 0:
		return n.cfg.MTU
	case n.cfg.tunnelMTU != 0:
		return min(n.cfg.tunnelMTU, maxMTU)
	}
	return transport.DefaultInnerMTU
}

// pathMTUChanged follows the path unless the configuration says otherwise. Connections
// that are open learn of a smaller path by the "too big" messages that their packets
// meet.
func (n *Node) pathMTUChanged(mtu int) {
	if n.cfg.MTU != 0 {
		return
	}
	if n.v6 {
		mtu = max(mtu, minMTU6) // IPv6 does not work over less
	}
	n.log.Info("path MTU changed", "inner_mtu", mtu)
	n.link.SetMTU(uint32(mtu))
	n.wrapper.SetMTU(mtu)
	n.interfaceMTU(mtu)
}

// AddPeer makes a peer known and calls it if it has an endpoint. It fails for the
// node's own key, a known key, and a prefix that another peer has.
func (n *Node) AddPeer(p Peer) error {
	var errs []error
	p.validate("Peer", n.public, n.cfg.Addresses, func(key, value, want string) {
		errs = append(errs, &ConfigError{Key: key, Value: value, Want: want})
	})
	if len(errs) > 0 {
		return fmt.Errorf("netstack: %w", errors.Join(errs...))
	}
	p.AllowedIPs, p.KnownAs = slices.Clone(p.AllowedIPs), slices.Clone(p.KnownAs)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.isClosed() {
		return net.ErrClosed
	}
	peers := append(slices.Clip(n.peers), p)
	if err := errors.Join(n.applyNAT(peers), n.applyACL(peers)); err != nil {
		return errors.Join(fmt.Errorf("netstack: %w", err), n.applyNAT(n.peers), n.applyACL(n.peers))
	}
	err := n.transport.AddPeer(transport.PeerConfig{
		Name: p.Name, PublicKey: p.PublicKey, Endpoint: p.Endpoint, AllowedIPs: p.AllowedIPs,
	})
	if err != nil {
		return errors.Join(fmt.Errorf("netstack: %w", err), n.applyNAT(n.peers), n.applyACL(n.peers))
	}
	n.peers = peers
	n.applyAllowed()
	return nil
}

// RemovePeer says goodbye to a peer and forgets it. It returns [ErrUnknownPeer] if
// there is none.
func (n *Node) RemovePeer(k PublicKey) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	i := slices.IndexFunc(n.peers, func(p Peer) bool { return p.PublicKey == k })
	if i < 0 {
		return fmt.Errorf("netstack: %w: %v", ErrUnknownPeer, k)
	}
	n.peers = slices.Delete(slices.Clone(n.peers), i, i+1)
	n.applyAllowed()
	return errors.Join(n.transport.RemovePeer(k), n.applyNAT(n.peers), n.applyACL(n.peers))
}

// applyAllowed makes the prefixes of n.peers and n.members the ones that reachable knows. n.mu is held.
func (n *Node) applyAllowed() {
	t := new(bart.Lite)
	for _, p := range n.peers {
		for _, pfx := range p.AllowedIPs {
			t.Insert(pfx.Masked())
		}
	}
	for _, pfx := range n.behindServer {
		t.Insert(pfx)
	}
	for m := range n.members {
		for _, pfx := range m.allowed {
			t.Insert(pfx.Masked())
		}
	}
	n.allowed.Store(t)
	if n.router != nil {
		n.router.setPeers(n.peers)
	}
}

// applyNAT makes the translations of peers those of the wrapper and the kernel's interface.
func (n *Node) applyNAT(peers []Peer) error {
	rules := slices.Clone(n.tunnelNAT)
	for _, p := range peers {
		for _, a := range p.KnownAs {
			rules = append(rules, tunwrap.NATRule{
				Peer: p.AllowedIPs, Inside: firstOf(n.cfg.Addresses, a.Is4()), Outside: a,
			})
		}
	}
	if err := n.wrapper.SetNAT(rules); err != nil || n.tun == nil {
		return err
	}
	n.fork.SetNAT(rules)
	return n.tun.SetNAT(rules) // it accepts what the wrapper does
}

// setBehindServer says what is behind the OpenConnect server, and by which addresses that knows the node, if
// others than its own.
func (n *Node) setBehindServer(behind []netip.Prefix, known []netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.behindServer, n.tunnelNAT = behind, nil
	n.applyAllowed()
	for _, a := range known {
		n.tunnelNAT = append(n.tunnelNAT, tunwrap.NATRule{Peer: behind, Inside: firstOf(n.cfg.Addresses, a.Is4()), Outside: a})
	}
	return errors.Join(n.applyNAT(n.peers), n.applyACL(n.peers))
}

// OpenConnect is the state of the tunnel of Config.OpenConnect, nil if there is none.
func (n *Node) OpenConnect() *OpenConnectStatus { return n.openconnect.snapshot() }

// Addresses are the node's own, inside the VPN.
func (n *Node) Addresses() []netip.Prefix { return slices.Clone(n.cfg.Addresses) }

// PublicKey names the node to its peers.
func (n *Node) PublicKey() PublicKey { return n.public }

// LocalAddrs are the UDP sockets' addresses, with the ports that the system chose.
func (n *Node) LocalAddrs() []netip.AddrPort {
	var addrs []netip.AddrPort
	for _, s := range n.transport.Status().Sockets {
		addrs = append(addrs, s.Local)
	}
	return addrs
}

// WaitEstablished waits until packets can flow to peer. It returns the context's error
// with the reason of the last failed handshake, [ErrUnknownPeer], or [net.ErrClosed].
func (n *Node) WaitEstablished(ctx context.Context, peer PublicKey) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		st, ok := n.peerStatus(peer)
		switch {
		case n.isClosed():
			return net.ErrClosed
		case !ok:
			return fmt.Errorf("netstack: %w: %v", ErrUnknownPeer, peer)
		case st.State == transport.PeerEstablished:
			return nil
		}
		select {
		case <-tick.C:
		case <-n.ctx.Done():
			return net.ErrClosed
		case <-ctx.Done():
			if st.LastError != "" {
				return fmt.Errorf("netstack: peer %s: %w: %s", st.Name, ctx.Err(), st.LastError)
			}
			return fmt.Errorf("netstack: peer %s: %w", st.Name, ctx.Err())
		}
	}
}

func (n *Node) peerStatus(peer PublicKey) (transport.PeerStatus, bool) {
	for _, p := range n.transport.Status().Peers {
		if p.PublicKey == peer {
			return p, true
		}
	}
	return transport.PeerStatus{}, false
}

func (n *Node) isClosed() bool { return n.ctx.Err() != nil }

// adopt makes Close close c first. The caller calls disown when it has closed c itself. After
// Close has begun c is refused, and the caller closes it.
func (n *Node) adopt(c io.Closer) (disown func(), err error) {
	o := &ownedCloser{c}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.isClosed() {
		return nil, net.ErrClosed
	}
	n.owned[o] = struct{}{}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.owned, o)
	}, nil
}

// Times within Close. None of them is waited out on a path that works.
const (
	drainTimeout = 200 * time.Millisecond // for the last packets to leave the queue
	stackTimeout = 5 * time.Second        // for the stack's goroutines to end
	closePoll    = time.Millisecond
)

// Close stops the node: forwarders first; then, for at most Config.CloseTimeout, it waits
// for data on connections that the program has closed to be acknowledged; then it
// resets the connections that are open, lets the last packets out, closes the kernel's
// interface, says goodbye to the peers and frees everything. Operations under way return [net.ErrClosed]. A
// second Close waits for the first and returns the same.
func (n *Node) Close() error {
	n.mu.Lock()
	if n.isClosed() {
		n.mu.Unlock()
		<-n.closed
		return n.err
	}
	n.cancel()
	owned := n.owned
	n.owned = nil
	n.mu.Unlock()
	defer close(n.closed)

	n.dns.Close() // what still waits for a name ends now
	for c := range owned {
		c.Close()
	}
	linger := n.cfg.CloseTimeout
	if linger == 0 {
		linger = DefaultCloseTimeout
	}
	n.waitFor(linger, n.nothingUnacknowledged)
	n.stack.Close() // resets
	n.link.Shutdown()
	n.waitFor(drainTimeout, n.queueEmpty)
	var errs []error
	if n.wrapper != nil {
		errs = append(errs, n.wrapper.Close())
	}
	if n.tun != nil {
		errs = append(errs, n.tun.Close())
	}
	n.link.Close()
	if n.openconnect != nil {
		n.openconnect.stop()
	}
	if n.transport != nil {
		errs = append(errs, n.transport.Close())
	}
	n.lingering.Wait()
	errs = append(errs, n.endStack())
	n.err = errors.Join(errs...)
	return n.err
}

// waitFor waits until ok or a timeout.
func (n *Node) waitFor(timeout time.Duration, ok func() bool) {
	for end := time.Now().Add(timeout); !ok() && time.Now().Before(end); {
		time.Sleep(closePoll)
	}
}

// nothingUnacknowledged tells whether no connection that the program has closed has data
// or a FIN under way. One that is open is not waited for.
func (n *Node) nothingUnacknowledged() bool {
	if n.transport == nil {
		return true
	}
	for _, e := range n.stack.RegisteredEndpoints() {
		if e, ok := e.(*tcp.Endpoint); ok {
			switch e.EndpointState() {
			case tcp.StateFinWait1, tcp.StateClosing, tcp.StateLastAck:
				return false
			}
		}
	}
	return true
}

func (n *Node) queueEmpty() bool {
	if n.transport == nil {
		return true
	}
	for _, q := range n.link.Queues() {
		if q.Stats().Depth > 0 {
			return false
		}
	}
	return true
}

// endStack waits for the stack's goroutines.
func (n *Node) endStack() error {
	if !endsWithin(stackTimeout, n.stack.Destroy) {
		return errors.New("netstack: the stack did not end in time")
	}
	return nil
}

// endsWithin runs wait, which ends when something else has, for at most d and reports
// whether it has ended. If not, its goroutine stays until it does.
func endsWithin(d time.Duration, wait func()) bool {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wait()
	}()
	late := time.NewTimer(d)
	defer late.Stop()
	select {
	case <-ended:
		return true
	case <-late.C:
		return false
	}
}
