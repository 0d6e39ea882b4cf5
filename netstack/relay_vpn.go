package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/waiter"
)

var (
	_ readableWaiter = (*TCPConn)(nil)
	_ vpnBurster     = (*UDPConn)(nil)
	_ vpnPacketConn  = (*UDPConn)(nil)
)

// waitReadable waits until Read would not wait: for data, the end or an error.
func (s *socket) waitReadable() error {
	s.in.mu.Lock()
	defer s.in.mu.Unlock()
	for {
		if err := s.in.ready(s); err != nil {
			return s.opError("read", err)
		}
		if s.ep.Readiness(waiter.ReadableEvents|alwaysEvents) != 0 {
			return nil
		}
		if err := s.in.wait(s); err != nil {
			return s.opError("read", err)
		}
	}
}

// readBurst waits for datagrams and gives all that are there. The caller puts the
// burst back.
func (c *UDPConn) readBurst() (*burst, error) {
	if err := c.waitReadable(); err != nil {
		return nil, err
	}
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	b := newBurst()
	var w tcpip.SliceWriter
	for room := b.room(); room != nil; room = b.room() {
		w = room
		res, terr := c.ep.Read(&w, tcpip.ReadOptions{})
		if terr == nil {
			b.add(res.Count)
			continue
		}
		if _, empty := terr.(*tcpip.ErrWouldBlock); empty || b.n > 0 {
			break // an error is told again, or was about a datagram before these
		}
		bursts.Put(b)
		return nil, c.opError("read", errnoOf(terr))
	}
	return b, nil
}
