package netstack

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gaissmai/bart"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A router joins flows of the peers to sockets of the system:
//
//	peer ── VPN ── routerLink ┬ own address ── the node's stack
//	                          └ allowed ────── the router's stack ┬ TCP  forwardTCP ─┐
//	                                                              ├ UDP  forwardUDP ─┤ sockets
//	                                                              └ echo forwardICMP ┘
//
// It has a stack of its own that takes every address for its own (promiscuous,
// spoofing), so that no address is added or removed for a flow. The node's stack
// cannot do that: with HandleLocal, which lets programs of the node reach its own
// addresses, a promiscuous interface takes every source for one of its own and
// drops everything. Two stacks also keep what the peers want of the node and what
// they want of its networks apart: nothing that is not routed is ever answered by
// the node, and the handlers that consume forwarded echo requests do not consume
// the node's own.
type router struct {
	node   *Node
	cfg    RouterConfig // defaults filled in
	log    *slog.Logger
	policy *routerPolicy
	stack  *stack.Stack
	link   *routerLink
	errs   *icmpErrors

	tcp  forwardTCP
	udp  forwardUDP
	icmp forwardICMP

	byAddr atomic.Pointer[bart.Table[*routerPeer]] // by source address

	ctx    context.Context
	cancel context.CancelFunc

	mu    sync.Mutex
	peers map[PublicKey]*routerPeer
	// members are the sessions; their key is zero.
	members map[*routerPeer][]netip.Prefix
	closed  bool
	flows   map[routerFlow]struct{}
	tasks   sync.WaitGroup // every goroutine of the router; added to under mu unless closed
	done    chan struct{}  // closed when Close has ended
	err     error          // of Close

	refused  [refusals]atomic.Uint64
	switched atomic.Uint64 // packets from peer to peer
}

// A routerPeer counts what a peer has open. Each number is guarded by the lock of
// the part that it belongs to.
type routerPeer struct {
	key  PublicKey
	name string

	tcpFlows, halfOpen int          // forwardTCP.mu
	datagram           [2]flowQueue // the flowTables' mu: UDP, ICMP
}

// routerFlow is one TCP connection, UDP flow or echo flow.
type routerFlow interface {
	// abort ends the flow from any goroutine.
	abort()
	ofPeer() *routerPeer
}

// newRouter makes the router of n, which has its link and no transport yet.
func newRouter(n *Node) (*router, error) {
	r := &router{
		node: n, cfg: *n.cfg.Router, log: n.log.With("part", "router"),
		peers: map[PublicKey]*routerPeer{}, members: map[*routerPeer][]netip.Prefix{}, flows: map[routerFlow]struct{}{},
		done: make(chan struct{}),
	}
	r.cfg.Limits, r.cfg.Timeouts = r.cfg.Limits.orDefaults(), r.cfg.Timeouts.orDefaults()
	r.policy = newRouterPolicy(&r.cfg, n.cfg.Addresses)
	r.byAddr.Store(new(bart.Table[*routerPeer]))
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.link = newRouterLink(r, n.link)
	r.errs = newICMPErrors(r)
	var err error
	if r.stack, err = newRouterStack(&n.cfg, r.link); err != nil {
		r.cancel()
		return nil, err
	}
	r.tcp.init(r)
	r.udp.init(r)
	r.icmp.init(r)
	return r, nil
}

// setPeers replaces the peers. What a peer that is gone had open is aborted. The
// node's mu is held.
func (r *router) setPeers(peers []Peer) {
	table := new(bart.Table[*routerPeer])
	r.mu.Lock()
	known := make(map[PublicKey]*routerPeer, len(peers))
	for _, p := range peers {
		rp := r.peers[p.PublicKey]
		if rp == nil {
			rp = &routerPeer{key: p.PublicKey, name: p.Name}
			if rp.name == "" {
				rp.name = p.PublicKey.String()[:8]
			}
		}
		known[p.PublicKey] = rp
		for _, pfx := range p.AllowedIPs {
			table.Insert(pfx.Masked(), rp)
		}
	}
	r.peers = known
	for rp, allowed := range r.members {
		for _, pfx := range allowed {
			table.Insert(pfx.Masked(), rp)
		}
	}
	r.byAddr.Store(table)
	orphans := r.orphansLocked()
	r.mu.Unlock()
	for _, f := range orphans {
		f.abort()
	}
}

// orphansLocked are the flows whose peer is gone.
func (r *router) orphansLocked() (orphans []routerFlow) {
	for f := range r.flows {
		if !r.knownLocked(f.ofPeer()) {
			orphans = append(orphans, f)
		}
	}
	return orphans
}

// knownLocked tells whether p is there still.
func (r *router) knownLocked(p *routerPeer) bool {
	_, member := r.members[p]
	return member || r.peers[p.key] == p
}

// everyPeerLocked is an iterator over static peers and sessions.
func (r *router) everyPeerLocked(yield func(*routerPeer) bool) {
	for _, p := range r.peers {
		if !yield(p) {
			return
		}
	}
	for p := range r.members {
		if !yield(p) {
			return
		}
	}
}

// enterMember makes a session known; the node's mu is held.
func (r *router) enterMember(name string, allowed []netip.Prefix) *routerPeer {
	rp := &routerPeer{name: name}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.members[rp] = allowed
	table := r.byAddr.Load()
	for _, pfx := range allowed {
		table = table.InsertPersist(pfx.Masked(), rp)
	}
	r.byAddr.Store(table)
	return rp
}

// leaveMember forgets a session. What it had open is aborted. The node's mu is held.
func (r *router) leaveMember(rp *routerPeer) {
	r.mu.Lock()
	table := r.byAddr.Load()
	for _, pfx := range r.members[rp] {
		if now, _ := table.Get(pfx.Masked()); now == rp { // else it is the next session's already
			table = table.DeletePersist(pfx.Masked())
		}
	}
	r.byAddr.Store(table)
	delete(r.members, rp)
	orphans := r.orphansLocked()
	r.mu.Unlock()
	for _, f := range orphans {
		f.abort()
	}
}

// peerOf is the peer that a packet's source belongs to; the transport has checked
// that it came from that one.
func (r *router) peerOf(src tcpip.Address) *routerPeer {
	p, _ := r.byAddr.Load().Lookup(addrOf(src))
	return p
}

// addrOf converts an address of the stack.
func addrOf(a tcpip.Address) netip.Addr {
	switch a.Len() {
	case 4:
		return netip.AddrFrom4(a.As4())
	case 16:
		return netip.AddrFrom16(a.As16())
	}
	return netip.Addr{}
}

// targetOf and clientOf are the two ends of a flow as the stack names them: the
// target is "local" to the router's stack.
func targetOf(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(addrOf(id.LocalAddress), id.LocalPort)
}

func clientOf(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(addrOf(id.RemoteAddress), id.RemotePort)
}

// flow describes id for the hook.
func (p *routerPeer) flow(network string, id stack.TransportEndpointID) Flow {
	return Flow{Peer: p.key, PeerName: p.name, Network: network, Src: clientOf(id), Dst: targetOf(id)}
}

// open dials the target of f as the hook or else the system does. Its errors are
// those of the system, ErrRefuse, refusal and context errors.
func (r *router) open(ctx context.Context, f Flow, v verdict) (net.Conn, error) {
	if r.cfg.Flow != nil {
		c, err := r.cfg.Flow(ctx, f)
		if c != nil || err != nil {
			return c, err
		}
	}
	if pfx, ok := r.byAddrPrefix(f.Dst.Addr()); ok && pfx.Bits() > 0 {
		// The system does not know the way to other members of the VPN, and would
		// send what is meant for them anywhere.
		return nil, refusedInsideVPN
	}
	var d net.Dialer // its connections send keepalives
	c, err := d.DialContext(ctx, f.Network, f.Dst.String())
	if err != nil {
		return nil, err
	}
	if !v.onRouter && onThisHost(c) {
		reset(c)
		return nil, refusedRouterItself
	}
	return c, nil
}

// byAddrPrefix is the prefix of a peer that covers a.
func (r *router) byAddrPrefix(a netip.Addr) (netip.Prefix, bool) {
	pfx, _, ok := r.byAddr.Load().LookupPrefixLPM(netip.PrefixFrom(a, a.BitLen()))
	return pfx, ok
}

// failureOf says which of the reasons err is, for the counters and for what the
// client is told.
func failureOf(err error) refusal {
	var why refusal
	var timeout net.Error
	switch {
	case errors.As(err, &why):
		return why
	case errors.Is(err, ErrRefuse), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return failedRefused
	case errors.Is(err, syscall.ENETUNREACH):
		return failedNetwork
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EHOSTDOWN):
		return failedHost
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return failedProhibited
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOBUFS),
		errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EADDRNOTAVAIL):
		return failedSystem
	case errors.Is(err, syscall.ETIMEDOUT), errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return failedTimeout
	}
	return failedRefused
}

// refuse counts a refusal.
func (r *router) refuse(why refusal) { r.refused[why].Add(1) }

// spawn runs task unless the router is closed.
func (r *router) spawn(task func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.tasks.Go(task)
	return true
}

// enter makes f known to Close and setPeers. It fails when the router is closed or
// the flow's peer is gone.
func (r *router) enter(f routerFlow) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !r.knownLocked(f.ofPeer()) {
		return false
	}
	r.flows[f] = struct{}{}
	return true
}

func (r *router) leave(f routerFlow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.flows, f)
}

// routerClosing bounds Close: for the goroutines, and again for the stack's.
const routerClosing = 5 * time.Second

// Close resets the connections, closes the sockets and waits for the goroutines.
// It implements [io.Closer] for Node.adopt; a second call waits for the first.
func (r *router) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		<-r.done
		return r.err
	}
	r.closed = true
	flows := make([]routerFlow, 0, len(r.flows))
	for f := range r.flows {
		flows = append(flows, f)
	}
	r.mu.Unlock()
	defer close(r.done)

	r.cancel() // ends dials and sweeps
	r.link.shut.Store(true)
	for _, f := range flows {
		f.abort()
	}
	ended := endsWithin(routerClosing, func() {
		r.stack.Close() // ends handshakes
		r.tasks.Wait()
		r.stack.Destroy()
	})
	if !ended {
		r.err = fmt.Errorf("netstack: the router did not end within %v", routerClosing)
	}
	return r.err
}

// sourceFor is the router's own address of the family of a, from which it sends
// ICMP errors; a itself when it has none.
func (r *router) sourceFor(a tcpip.Address) tcpip.Address {
	if own := firstOf(r.node.cfg.Addresses, a.Len() == header.IPv4AddressSize); own.IsValid() {
		return stackAddr(own)
	}
	return a
}
