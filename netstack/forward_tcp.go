package netstack

import (
	"container/list"
	"context"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// forwardTCP splices connections of the peers with connections of the system.
//
// The target comes first: a SYN waits, as a packet, until its target has accepted,
// and only then does the client get its SYN-ACK. So a client never sees a
// connection that does not exist, and a refusal or an unreachable target is told to
// it as such. The stack's own tcp.Forwarder has to have its goroutine and its slot
// for all that time and drops silently what is above its limit; here it gets a SYN
// only when the answer is known.
type forwardTCP struct {
	router *router
	engine *tcp.Forwarder

	mu       sync.Mutex
	pending  map[stack.TransportEndpointID]*tcpDial // waiting for their targets, or for the engine
	halfOpen halfOpenList                           // those waiting for their targets, oldest first
	targets  map[netip.Addr]int                     // of halfOpen
	flows    int                                    // half-open ones included

	total, completed   atomic.Uint64
	toTarget, toClient atomic.Uint64 // bytes
}

// engineInFlight never matters: what the engine gets is bounded by RouterLimits.TCP.
const engineInFlight = 1 << 30

func (f *forwardTCP) init(r *router) {
	f.router = r
	f.pending = map[stack.TransportEndpointID]*tcpDial{}
	f.targets = map[netip.Addr]int{}
	f.engine = tcp.NewForwarder(r.stack, r.node.cfg.TCP.Receive.or(defaultTCPReceive).Default, engineInFlight, f.answer)
	r.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, f.handle)
}

// A tcpDial is a SYN whose target is being dialled.
type tcpDial struct {
	forward *forwardTCP
	id      stack.TransportEndpointID
	peer    *routerPeer
	verdict verdict
	syn     *stack.PacketBuffer // one reference, released by forget
	cancel  context.CancelFunc
	request chan *tcp.ForwarderRequest // from the engine

	element *list.Element // in halfOpen; nil when it has left; guarded by forward.mu
	why     refusal       // why it was cancelled; guarded by forward.mu

	mu      sync.Mutex
	sides   [2]net.Conn // the target's and the client's, once they are there
	aborted bool
}

type halfOpenList = list.List

// handle is the stack's handler for segments without a connection. It borrows pkt.
// To return false makes the stack send a reset.
func (f *forwardTCP) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	r := f.router
	peer := r.peerOf(id.RemoteAddress)
	if peer == nil {
		r.refuse(refusedPeer)
		return true
	}
	flags := header.TCP(pkt.TransportHeader().Slice()).Flags()
	if flags.Contains(header.TCPFlagRst) {
		f.giveUp(id, failedClient)
		return true
	}
	v := r.policy.decide(peer.key, "tcp", targetOf(id))
	syn := flags.Contains(header.TCPFlagSyn) && !flags.Contains(header.TCPFlagAck)
	if v.refusal != notRefused {
		r.refuse(v.refusal)
		r.errs.send(errProhibited, pkt)
		return !syn || !alsoReset(errProhibited, id)
	}
	if !syn {
		return false // of a connection that is no more
	}
	return f.admit(id, peer, v, pkt)
}

// admit starts to dial the target of a SYN. It tells whether the SYN is to be left
// unanswered for now.
func (f *forwardTCP) admit(id stack.TransportEndpointID, peer *routerPeer, v verdict, pkt *stack.PacketBuffer) bool {
	r, limits := f.router, &f.router.cfg.Limits
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pending[id] != nil {
		return true // sent again
	}
	switch {
	case f.flows >= limits.TCP:
		r.refuse(refusedFlows)
		return false
	case peer.tcpFlows >= limits.TCPPerPeer:
		r.refuse(refusedPeerFlows)
		return false
	}
	target := addrOf(id.LocalAddress)
	f.makeRoom(peer, target)
	ctx, cancel := context.WithTimeout(r.ctx, r.cfg.Timeouts.Dial)
	d := &tcpDial{
		forward: f, id: id, peer: peer, verdict: v, syn: pkt.Clone(), cancel: cancel,
		request: make(chan *tcp.ForwarderRequest, 1),
	}
	if !r.enter(d) || !r.spawn(func() { d.run(ctx) }) {
		r.leave(d)
		cancel()
		d.syn.DecRef()
		return true
	}
	f.total.Add(1)
	f.pending[id] = d
	f.flows++
	peer.tcpFlows++
	d.element = f.halfOpen.PushBack(d)
	f.targets[target]++
	peer.halfOpen++
	return true
}

// makeRoom gives up half-open dials until one more to target is within the limits: each time
// the oldest of the peer that has most, so that no peer pushes out what others wait for. f.mu is held.
func (f *forwardTCP) makeRoom(peer *routerPeer, target netip.Addr) {
	limits := &f.router.cfg.Limits
	evict := func(fits func(*tcpDial) bool) {
		var victim *tcpDial
		for e := f.halfOpen.Front(); e != nil; e = e.Next() {
			if d := e.Value.(*tcpDial); fits(d) && (victim == nil || d.peer.halfOpen > victim.peer.halfOpen) {
				victim = d
			}
		}
		if victim != nil {
			f.cancelLocked(victim, evictedHalfOpen)
		}
	}
	if f.targets[target] >= limits.HalfOpenPerTarget {
		evict(func(d *tcpDial) bool { return addrOf(d.id.LocalAddress) == target })
	}
	if peer.halfOpen >= limits.HalfOpenPerPeer {
		evict(func(d *tcpDial) bool { return d.peer == peer })
	}
	if f.halfOpen.Len() >= limits.HalfOpen {
		evict(func(*tcpDial) bool { return true })
	}
}

// giveUp ends the dial for id, if there is one.
func (f *forwardTCP) giveUp(id stack.TransportEndpointID, why refusal) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d := f.pending[id]; d != nil && d.element != nil {
		f.cancelLocked(d, why)
	}
}

// cancelLocked takes d out of everything, so that the client may try again. f.mu is
// held.
func (f *forwardTCP) cancelLocked(d *tcpDial, why refusal) {
	d.why = why
	d.cancel()
	f.dialledLocked(d)
	delete(f.pending, d.id)
}

// dialledLocked notes that d waits for its target no more. f.mu is held.
func (f *forwardTCP) dialledLocked(d *tcpDial) {
	if d.element == nil {
		return
	}
	f.halfOpen.Remove(d.element)
	d.element = nil
	d.peer.halfOpen--
	target := addrOf(d.id.LocalAddress)
	if f.targets[target]--; f.targets[target] == 0 {
		delete(f.targets, target)
	}
}

// run is the life of one connection.
func (d *tcpDial) run(ctx context.Context) {
	f, r := d.forward, d.forward.router
	defer r.leave(d)
	defer d.end()
	conn, err := r.open(ctx, d.peer.flow("tcp", d.id), d.verdict)
	d.cancel()
	f.mu.Lock()
	f.dialledLocked(d)
	why := d.why
	f.mu.Unlock()
	switch {
	case why != notRefused || r.ctx.Err() != nil || d.isAborted():
		if conn != nil {
			reset(conn)
		}
		if why != notRefused {
			r.refuse(why)
		}
		return
	case err != nil:
		d.refuse(failureOf(err))
		return
	case !d.hold(0, conn):
		return
	}
	if client := d.accept(); client != nil {
		f.completed.Add(1)
		splice(client, conn, &f.toTarget, &f.toClient)
	} else {
		r.refuse(failedClient)
		reset(conn)
	}
}

// end releases what run held.
func (d *tcpDial) end() {
	d.cancel()
	d.forget()
	f := d.forward
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dialledLocked(d)
	if f.pending[d.id] == d {
		delete(f.pending, d.id)
	}
	f.flows--
	d.peer.tcpFlows--
}

// forget releases the SYN.
func (d *tcpDial) forget() {
	if d.syn != nil {
		d.syn.DecRef()
		d.syn = nil
	}
}

// refuse tells the client that the target cannot be had.
func (d *tcpDial) refuse(why refusal) {
	r := d.forward.router
	r.refuse(why)
	if e, ok := errorOf(why); ok {
		r.errs.send(e, d.syn)
		if !alsoReset(e, d.id) {
			return
		}
	}
	if req := d.ask(); req != nil {
		req.Complete(true) // a reset
	}
}

// alsoReset tells whether a client that connects gets a reset after the ICMP error
// e. Of the codes of ICMPv6's "destination unreachable" gVisor knows but "no route" and
// "port", and its clients, other nodes like this one, would wait in vain; to others
// the reset comes second and says nothing new.
func alsoReset(e icmpError, id stack.TransportEndpointID) bool {
	return id.LocalAddress.Len() == header.IPv6AddressSize && e.type6 == errNoNetwork.type6 && e.code6 != errNoNetwork.code6
}

// accept completes the client's handshake; nil if the client does not.
func (d *tcpDial) accept() net.Conn {
	req := d.ask()
	if req == nil {
		return nil
	}
	wq := new(waiter.Queue)
	d.forget()
	ep, terr := req.CreateEndpoint(wq) // waits; ended by the stack's Close
	req.Complete(false)
	// From here on the connection is the stack's to find.
	f := d.forward
	f.mu.Lock()
	if f.pending[d.id] == d {
		delete(f.pending, d.id)
	}
	f.mu.Unlock()
	if terr != nil {
		return nil
	}
	c := newTCPConn(f.router.node, ep, wq)
	if !d.hold(1, c) {
		return nil
	}
	return c
}

// ask gives the SYN to the engine and returns its request; nil if the engine does
// not want it, so malformed is it.
func (d *tcpDial) ask() *tcp.ForwarderRequest {
	if !d.forward.engine.HandlePacket(d.id, d.syn) {
		return nil
	}
	return <-d.request // at once: ids are in pending once, so never twice in the engine
}

// answer is called by the engine, on a goroutine of its own, for a SYN that ask has
// given it.
func (f *forwardTCP) answer(req *tcp.ForwarderRequest) {
	f.mu.Lock()
	d := f.pending[req.ID()]
	f.mu.Unlock()
	if d == nil {
		req.Complete(false)
		return
	}
	d.request <- req
}

// hold takes one side of the connection. It tells whether the flow goes on; if not,
// c is closed.
func (d *tcpDial) hold(side int, c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.aborted {
		reset(c)
		return false
	}
	d.sides[side] = c
	return true
}

func (d *tcpDial) isAborted() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.aborted
}

// abort implements routerFlow.
func (d *tcpDial) abort() {
	d.cancel()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.aborted = true
	for _, c := range d.sides {
		if c != nil {
			reset(c)
		}
	}
}

func (d *tcpDial) ofPeer() *routerPeer { return d.peer }
