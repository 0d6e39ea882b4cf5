package netstack

import (
	"errors"
	"net"
	"sync"
)

// serveTCP takes l and relays what it accepts until the relay is closed. It is to
// be called before the relay is handed out.
func (r *Relay) serveTCP(l net.Listener) {
	r.addr = l.Addr()
	r.listeners = append(r.listeners, l)
	r.spawn(func() { r.acceptTCP(l) })
}

func (r *Relay) acceptTCP(l net.Listener) {
	for failures := 0; ; {
		client, err := l.Accept()
		switch {
		case err == nil:
			failures = 0
			r.admitTCP(client)
		case errors.Is(err, net.ErrClosed):
			return
		default: // out of file descriptors, or a client that went away again
			failures++
			if !r.pause(failures) {
				return
			}
		}
	}
}

// admitTCP takes client.
func (r *Relay) admitTCP(client net.Conn) {
	f := &tcpFlow{client: client}
	if r.enter(f) != nil {
		reset(client)
		return
	}
	if !r.spawn(func() { r.handle(f) }) {
		f.abort()
		r.leave(f)
	}
}

// runTCP is the life of one connection.
func (r *Relay) runTCP(f *tcpFlow) {
	defer r.leave(f)
	service, err := r.reach()
	if err != nil {
		// The client hears of it at once, as if the service itself had refused.
		f.abort()
		return
	}
	if !f.join(service) {
		return
	}
	// Both connections send keepalives by default, in the net package and here, so
	// that a flow whose far side has vanished ends.
	splice(f.client, service, &r.count.bytesToService, &r.count.bytesToClient)
}

// A tcpFlow is a client's connection and, once it is made, the one to the
// service.
type tcpFlow struct {
	client net.Conn

	mu      sync.Mutex
	service net.Conn
	aborted bool
}

// join takes service. It tells whether the flow goes on; if not, service is closed.
func (f *tcpFlow) join(service net.Conn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.aborted {
		reset(service)
		return false
	}
	f.service = service
	return true
}

func (f *tcpFlow) abort() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.aborted = true
	reset(f.client)
	if f.service != nil {
		reset(f.service)
	}
}

// reset closes a TCP connection so that its far side does not take what has
// arrived for everything.
func reset(c net.Conn) {
	if c, ok := c.(interface{ SetLinger(sec int) error }); ok {
		c.SetLinger(0)
	}
	c.Close()
}
