package netstack

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// udpFront is the side of a UDP relay that clients send to.
type udpFront interface {
	// receive waits for datagrams and lends them to take one by one, which is done
	// with a datagram when it returns. It returns net.ErrClosed after Close.
	receive(take func(from udpClient, datagram []byte)) error
	// reply sends the datagrams of b to a client from the address that it asked, and
	// tells how many were sent, with how many bytes. It borrows b.
	reply(to udpClient, b *burst) (datagrams, bytes int)
	localAddr() net.Addr
	Close() error
}

// udpClient is who sent a datagram, and to which address of ours; invalid when
// there is no choice.
type udpClient struct {
	remote netip.AddrPort
	local  netip.Addr
}

// serveUDP takes front and relays what it receives until the relay is closed. It
// is to be called before the relay is handed out, once for each front.
func (r *Relay) serveUDP(front udpFront) {
	if r.addr == nil {
		r.addr = front.localAddr()
	}
	r.listeners = append(r.listeners, front)
	t := &udpTable{relay: r, front: front, flows: map[udpClient]*udpFlow{}}
	r.spawn(t.receive)
	r.spawn(t.sweep)
}

// A udpTable knows the clients of one front.
type udpTable struct {
	relay *Relay
	front udpFront

	mu    sync.Mutex
	flows map[udpClient]*udpFlow
}

// receive hands on what clients send. One service that takes nothing holds all
// its clients up, not those of another relay.
func (t *udpTable) receive() {
	for failures := 0; ; {
		err := t.front.receive(t.take)
		switch {
		case err == nil:
			failures = 0
		case errors.Is(err, net.ErrClosed):
			return
		default:
			failures++
			if !t.relay.pause(failures) {
				return
			}
		}
	}
}

// take borrows datagram.
func (t *udpTable) take(from udpClient, datagram []byte) {
	t.mu.Lock()
	f := t.flows[from]
	t.mu.Unlock()
	if f == nil {
		f = t.admit(from)
	}
	if f == nil || !f.toService(datagram) {
		t.relay.count.dropped.Add(1)
	}
}

// admit makes the flow of a new client; nil when there are too many.
func (t *udpTable) admit(from udpClient) *udpFlow {
	f := &udpFlow{table: t, client: from}
	f.active.Store(true)
	if t.relay.enter(f) != nil {
		return nil
	}
	t.mu.Lock()
	t.flows[from] = f
	t.mu.Unlock()
	if !t.relay.spawn(f.run) {
		f.abort()
		t.forget(f)
		return nil
	}
	return f
}

func (t *udpTable) forget(f *udpFlow) {
	t.mu.Lock()
	if t.flows[f.client] == f {
		delete(t.flows, f.client)
	}
	t.mu.Unlock()
	t.relay.leave(f)
}

// sweep ends flows that have been silent. It looks four times in the idle time,
// so that no packet needs to look at the clock.
func (t *udpTable) sweep() {
	const looks = 4
	tick := time.NewTicker(max(t.relay.limits.udpIdle/looks, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-t.relay.ctx.Done():
			return
		}
		t.mu.Lock()
		var idle []*udpFlow
		for _, f := range t.flows {
			if f.active.Swap(false) {
				f.silent = 0
			} else if f.silent++; f.silent >= looks {
				idle = append(idle, f)
			}
		}
		t.mu.Unlock()
		for _, f := range idle {
			f.abort()
		}
	}
}

// A udpFlow is one client and its own socket towards the service.
type udpFlow struct {
	table  *udpTable
	client udpClient
	active atomic.Bool // something was relayed since sweep looked
	silent int         // looks without; sweep's

	service atomic.Pointer[net.Conn] // nil while it is dialled

	mu      sync.Mutex
	waiting [][]byte // for the dialling to end; copies
	aborted bool
}

// maxWaiting datagrams of a client are kept while its service is dialled, the first
// ones. More are dropped, as by any short queue.
const maxWaiting = 16

// toService sends or keeps a datagram, which it borrows. It tells whether it did.
func (f *udpFlow) toService(datagram []byte) bool {
	f.active.Store(true)
	if c := f.service.Load(); c != nil {
		return f.send(*c, datagram)
	}
	f.mu.Lock()
	if c := f.service.Load(); c != nil {
		f.mu.Unlock()
		return f.send(*c, datagram)
	}
	defer f.mu.Unlock()
	if f.aborted || len(f.waiting) >= maxWaiting {
		return false
	}
	f.waiting = append(f.waiting, append([]byte(nil), datagram...))
	return true
}

func (f *udpFlow) send(c net.Conn, datagram []byte) bool {
	_, err := c.Write(datagram)
	if errors.Is(err, syscall.ECONNREFUSED) {
		// That was about an earlier datagram, and told instead of sending this one.
		_, err = c.Write(datagram)
	}
	if err != nil {
		return false
	}
	count := &f.table.relay.count
	count.datagramsToService.Add(1)
	count.bytesToService.Add(uint64(len(datagram)))
	return true
}

// run is the life of one flow.
func (f *udpFlow) run() {
	r := f.table.relay
	defer f.table.forget(f)
	c, err := r.reach()
	if err != nil {
		f.abort()
		return
	}
	defer c.Close()
	if !f.join(c) {
		return
	}
	receive := burstReader(c)
	for failures := 0; failures < 100; {
		b, err := receive()
		switch {
		case err == nil:
			failures = 0
			f.toClient(b)
			bursts.Put(b)
		case errors.Is(err, net.ErrClosed):
			return
		default:
			// Nobody listens there now (ICMP port unreachable); somebody may later.
			failures++
			r.count.failed.Add(1)
		}
	}
}

// join sends what waited, in order, and lets the rest pass by itself.
func (f *udpFlow) join(c net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.aborted {
		return false
	}
	for _, d := range f.waiting {
		if !f.send(c, d) {
			f.table.relay.count.dropped.Add(1)
		}
	}
	f.waiting = nil
	f.service.Store(&c)
	return true
}

// toClient borrows b.
func (f *udpFlow) toClient(b *burst) {
	f.active.Store(true)
	datagrams, bytes := f.table.front.reply(f.client, b)
	count := &f.table.relay.count
	count.dropped.Add(uint64(b.n - datagrams))
	count.datagramsToClient.Add(uint64(datagrams))
	count.bytesToClient.Add(uint64(bytes))
}

func (f *udpFlow) abort() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.aborted {
		f.aborted = true
		f.table.relay.count.dropped.Add(uint64(len(f.waiting)))
		f.waiting = nil
	}
	if c := f.service.Load(); c != nil {
		(*c).Close()
	}
}
