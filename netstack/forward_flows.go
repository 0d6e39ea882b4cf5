package netstack

import (
	"container/list"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A flowTable knows the UDP or echo flows of a router. Each flow has a socket of its
// own, connected to its target, and one goroutine.
//
// When a limit is reached, the flow that has been silent longest goes: of the same
// peer if that has its share, else of the peer that has most. (It is a second-chance
// queue, so silent means: not since it was last in front.)
type flowTable struct {
	router  *router
	index   int // in routerPeer.datagram
	limit   int
	perPeer int
	// looks is how often sweep looks within the idle time of the shortest-lived flows.
	tick time.Duration

	mu    sync.Mutex
	flows map[stack.TransportEndpointID]*datagramFlow

	total                                atomic.Uint64
	datagramsToTarget, datagramsToClient atomic.Uint64
	bytesToTarget, bytesToClient         atomic.Uint64
}

// A flowQueue is one peer's flows of a table.
type flowQueue struct{ list list.List }

func (t *flowTable) init(r *router, index, limit, perPeer int, shortest time.Duration) {
	t.router, t.index, t.limit, t.perPeer = r, index, limit, perPeer
	t.tick = max(shortest/4, time.Millisecond)
	t.flows = map[stack.TransportEndpointID]*datagramFlow{}
	r.spawn(t.sweep)
}

// A flowSocket is the system's side of a flow.
type flowSocket interface {
	// send never waits. It borrows datagram, whose packet had ttl hops left when the
	// router forwarded it, and may be fragmented or not. It tells what went wrong
	// with this or an earlier one.
	send(datagram []byte, ttl uint8, mayFragment bool) error
	// receive waits for datagrams and gives what is there; the caller puts the burst
	// back. An error may be about a datagram that was sent; net.ErrClosed is the
	// last.
	receive() (*burst, error)
	// troubles are what the network has said of datagrams that were sent.
	troubles() []trouble
	Close() error
}

// A trouble is an ICMP error about a flow, from the system.
type trouble struct {
	what icmpError // with from
	// head is the beginning of the datagram it is about, as far as known.
	head []byte
}

// A flowKind is what UDP and echo do differently.
type flowKind interface {
	open(ctx context.Context, f *datagramFlow) (flowSocket, error)
	// reply sends one datagram of the target to the client, which it borrows.
	reply(f *datagramFlow, route *stack.Route, datagram []byte) bool
	// cause makes the beginning of the client's packet that head was sent for.
	cause(f *datagramFlow, head []byte) []byte
}

// A datagramFlow is one client socket talking to one target.
type datagramFlow struct {
	table   *flowTable
	kind    flowKind
	id      stack.TransportEndpointID
	peer    *routerPeer
	verdict verdict
	idle    time.Duration
	head    []byte // of the first packet: IP header and what follows; for errors

	active  atomic.Bool // something was carried since sweep looked
	silent  time.Duration
	element *list.Element // in the peer's queue; nil when the flow is out of the table; under table.mu

	socket atomic.Pointer[flowSocket]
	cancel context.CancelFunc

	mu      sync.Mutex
	waiting []waitingDatagram // for the socket; copies
	aborted bool
}

type waitingDatagram struct {
	b           []byte
	ttl         uint8
	mayFragment bool
}

// find returns the flow id, which it marks as active; nil if there is none.
func (t *flowTable) find(id stack.TransportEndpointID) *datagramFlow {
	t.mu.Lock()
	f := t.flows[id]
	t.mu.Unlock()
	if f != nil && !f.active.Load() {
		f.active.Store(true)
	}
	return f
}

// admit makes a flow of f, which has its id, peer and kind, and starts it. It
// returns the one that there is already, if another pump was quicker, and nil if the router is closed.
func (t *flowTable) admit(f *datagramFlow) *datagramFlow {
	r := t.router
	f.table = t
	f.active.Store(true)
	var ctx context.Context
	ctx, f.cancel = context.WithTimeout(r.ctx, r.cfg.Timeouts.Dial)
	if !r.enter(f) {
		f.cancel()
		return nil
	}
	t.mu.Lock()
	if earlier := t.flows[f.id]; earlier != nil {
		t.mu.Unlock()
		r.leave(f)
		f.cancel()
		return earlier
	}
	victim := t.makeRoom(f.peer)
	t.flows[f.id] = f
	f.element = f.peer.datagram[t.index].list.PushBack(f)
	t.mu.Unlock()
	if victim != nil {
		r.refuse(evictedFlow)
		victim.abort()
	}
	if !r.spawn(func() { f.run(ctx) }) {
		t.forget(f)
		r.leave(f)
		f.cancel()
		return nil
	}
	t.total.Add(1)
	return f
}

// makeRoom takes a flow out of the table if one more of peer would be too many.
// t.mu is held.
func (t *flowTable) makeRoom(peer *routerPeer) *datagramFlow {
	q := &peer.datagram[t.index].list
	if q.Len() < t.perPeer {
		if len(t.flows) < t.limit {
			return nil
		}
		t.router.mu.Lock()
		for p := range t.router.everyPeerLocked {
			if l := &p.datagram[t.index].list; l.Len() > q.Len() {
				q = l
			}
		}
		t.router.mu.Unlock()
	}
	for range q.Len() {
		e := q.Front()
		f := e.Value.(*datagramFlow)
		// The first look at a flow that was active is its second chance, for a few
		// flows: what is left after that is a flood, in which nobody is old.
		if f.active.Swap(false) {
			q.MoveToBack(e)
			continue
		}
		t.forgetLocked(f)
		return f
	}
	if e := q.Front(); e != nil {
		f := e.Value.(*datagramFlow)
		t.forgetLocked(f)
		return f
	}
	return nil
}

func (t *flowTable) forget(f *datagramFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.forgetLocked(f)
}

func (t *flowTable) forgetLocked(f *datagramFlow) {
	if f.element == nil {
		return
	}
	f.peer.datagram[t.index].list.Remove(f.element)
	f.element = nil
	delete(t.flows, f.id)
}

// open is how many flows there are.
func (t *flowTable) open() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.flows)
}

// sweep ends flows that have been silent. It looks four times in the shortest idle
// time, so that no packet needs to look at the clock.
func (t *flowTable) sweep() {
	tick := time.NewTicker(t.tick)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-t.router.ctx.Done():
			return
		}
		var idle []*datagramFlow
		t.mu.Lock()
		for _, f := range t.flows {
			if f.active.Swap(false) {
				f.silent = 0
			} else if f.silent += t.tick; f.silent >= f.idle {
				t.forgetLocked(f)
				idle = append(idle, f)
			}
		}
		t.mu.Unlock()
		for _, f := range idle {
			f.abort()
		}
	}
}

// send hands a datagram of the client on, or keeps it until the socket is there. It
// borrows b.
func (f *datagramFlow) send(b []byte, ttl uint8, mayFragment bool) {
	if s := f.socket.Load(); s != nil {
		f.sendTo(*s, b, ttl, mayFragment)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.socket.Load(); s != nil {
		f.sendTo(*s, b, ttl, mayFragment)
		return
	}
	if f.aborted || len(f.waiting) >= maxWaiting {
		f.table.router.refuse(droppedWaiting)
		return
	}
	f.waiting = append(f.waiting, waitingDatagram{append([]byte(nil), b...), ttl, mayFragment})
}

func (f *datagramFlow) sendTo(s flowSocket, b []byte, ttl uint8, mayFragment bool) {
	err := s.send(b, ttl, mayFragment)
	for tries := 0; err != nil && tries < 2; tries++ {
		told := s.troubles()
		f.tell(told)
		if len(told) == 0 {
			f.table.router.refuse(droppedSend)
			f.tellLocal(err, b)
			return
		}
		err = s.send(b, ttl, mayFragment) // the error was about an earlier one
	}
	if err != nil {
		f.table.router.refuse(droppedSend)
		return
	}
	f.table.datagramsToTarget.Add(1)
	f.table.bytesToTarget.Add(uint64(len(b)))
}

// run is the life of one flow.
func (f *datagramFlow) run(ctx context.Context) {
	t, r := f.table, f.table.router
	defer r.leave(f)
	defer t.forget(f)
	s, err := f.kind.open(ctx, f)
	f.cancel()
	if err != nil {
		if r.ctx.Err() == nil && !f.isAborted() {
			f.fail(failureOf(err))
		}
		f.abort()
		return
	}
	defer s.Close()
	route, terr := r.stack.FindRoute(nicID, f.id.LocalAddress, f.id.RemoteAddress, f.proto(), false)
	if terr != nil {
		r.refuse(failedSystem)
		f.abort()
		return
	}
	defer route.Release()
	if !f.join(s) {
		return
	}
	for failures := 0; failures < 100; {
		b, err := s.receive()
		switch {
		case err == nil:
			failures = 0
			f.toClient(route, b)
			bursts.Put(b)
		case errors.Is(err, net.ErrClosed):
			return
		default:
			failures++
			told := s.troubles()
			f.tell(told)
			if len(told) == 0 {
				f.tellLocal(err, nil)
			}
		}
	}
}

func (f *datagramFlow) proto() tcpip.NetworkProtocolNumber {
	if f.id.LocalAddress.Len() == header.IPv4AddressSize {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

// join sends what waited, in order, and lets the rest pass by itself. It tells
// whether the flow goes on.
func (f *datagramFlow) join(s flowSocket) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.aborted {
		return false
	}
	for _, w := range f.waiting {
		f.sendTo(s, w.b, w.ttl, w.mayFragment)
	}
	f.waiting = nil
	f.socket.Store(&s)
	return true
}

// toClient borrows b.
func (f *datagramFlow) toClient(route *stack.Route, b *burst) {
	f.active.Store(true)
	datagrams, bytes := 0, 0
	for _, d := range b.datagrams[:b.n] {
		if f.kind.reply(f, route, d) {
			datagrams++
			bytes += len(d)
		}
	}
	f.table.datagramsToClient.Add(uint64(datagrams))
	f.table.bytesToClient.Add(uint64(bytes))
}

// fail tells the client that there is no socket to the target.
func (f *datagramFlow) fail(why refusal) {
	r := f.table.router
	r.refuse(why)
	what, ok := errorOf(why)
	if why == failedRefused {
		what, ok = errNoPort, true
		what.from = f.id.LocalAddress
	}
	if ok {
		r.errs.sendQuoting(what, f.head)
	}
}

// tell passes on what the network says.
func (f *datagramFlow) tell(told []trouble) {
	r := f.table.router
	for _, t := range told {
		if t.what.from.Len() != f.id.LocalAddress.Len() {
			t.what.from = tcpip.Address{}
			if t.what = t.what.inBoth(); t.what.type4 == errNoPort.type4 && t.what.code4 == errNoPort.code4 {
				t.what.from = f.id.LocalAddress
			}
		}
		// The peer takes packets only from addresses behind the router, and a hop on the
		// way to the target need not be one: then the router speaks for it.
		if from := addrOf(t.what.from); from.IsValid() && !r.policy.ever.Contains(from) {
			t.what.from = tcpip.Address{}
		}
		r.errs.sendQuoting(t.what, f.kind.cause(f, t.head))
	}
}

// tellLocal tells the client of an error that the system made by itself, about head.
func (f *datagramFlow) tellLocal(err error, head []byte) {
	var what icmpError
	switch why := failureOf(err); {
	case why == failedNetwork, why == failedHost, why == failedProhibited:
		what, _ = errorOf(why)
	default:
		return
	}
	f.table.router.errs.sendQuoting(what, f.kind.cause(f, head))
}

func (f *datagramFlow) isAborted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.aborted
}

// abort implements routerFlow.
func (f *datagramFlow) abort() {
	f.cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborted = true
	for range f.waiting {
		f.table.router.refuse(droppedWaiting)
	}
	f.waiting = nil
	if s := f.socket.Load(); s != nil {
		(*s).Close()
	}
}

func (f *datagramFlow) ofPeer() *routerPeer { return f.peer }
