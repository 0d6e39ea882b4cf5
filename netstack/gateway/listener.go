package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

// A doorman is a TCP listener that looks at who comes before a byte is read: banned addresses, those that
// come too often, and too many at once are turned away.
type doorman struct {
	net.Listener
	s *Server
}

// Accept implements [net.Listener].
func (d *doorman) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		remote := remoteAddr(c)
		verdict := d.s.scores.connection(remote.Addr(), time.Now())
		if verdict != admitted {
			d.s.refused[verdict].Add(1)
			c.Close()
			continue
		}
		return d.s.strangers.enter(c, remote.Addr(), d.s.scores), nil
	}
}

func remoteAddr(c net.Conn) netip.AddrPort {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		ap := a.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// strangers are the connections on which nobody has signed in. When there are too many the oldest
// is closed: who means it is quick.
type strangers struct {
	max int

	mu    sync.Mutex
	first *guestConn // a list, the oldest first
	last  *guestConn
	n     int
	full  uint64 // how many had to go
}

// A guestConn is an accepted connection.
type guestConn struct {
	net.Conn
	all    *strangers
	addr   netip.Addr
	scores *scoreboard

	// Guarded by all.mu.
	settled    bool
	prev, next *guestConn
}

// enter takes c.
func (all *strangers) enter(c net.Conn, addr netip.Addr, scores *scoreboard) net.Conn {
	g := &guestConn{all: all, addr: addr, scores: scores}
	// TLS lies on a stream connection, so that many records become one system call.
	g.Conn = transport.NewStreamConn(c)
	all.mu.Lock()
	g.prev = all.last
	if all.last != nil {
		all.last.next = g
	} else {
		all.first = g
	}
	all.last = g
	all.n++
	var oldest *guestConn
	if all.n > all.max {
		oldest = all.first
		all.full++
	}
	all.mu.Unlock()
	if oldest != nil {
		oldest.Close()
	}
	return g
}

// settle takes g off the list: somebody has signed in on it, or it has ended.
func (g *guestConn) settle(good bool) {
	g.all.mu.Lock()
	if g.settled {
		g.all.mu.Unlock()
		return
	}
	g.settled = true
	if g.prev != nil {
		g.prev.next = g.next
	} else {
		g.all.first = g.next
	}
	if g.next != nil {
		g.next.prev = g.prev
	} else {
		g.all.last = g.prev
	}
	g.prev, g.next = nil, nil
	g.all.n--
	g.all.mu.Unlock()
	g.scores.settled(g.addr, good, time.Now())
}

// NetConn is the connection below.
func (g *guestConn) NetConn() net.Conn { return g.Conn }

// Close implements [net.Conn].
func (g *guestConn) Close() error {
	g.settle(false)
	return g.Conn.Close()
}

type guestKey struct{}

// withGuest is for [http.Server.ConnContext].
func withGuest(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if g, ok := c.(*guestConn); ok {
		return context.WithValue(ctx, guestKey{}, g)
	}
	return ctx
}

// settle tells that somebody has signed in on the connection of a request.
func settle(ctx context.Context, good bool) {
	if g, ok := ctx.Value(guestKey{}).(*guestConn); ok {
		g.settle(good)
	}
}

// listenTCP opens the addresses. 0.0.0.0 and [::] at one port each take their own family. A port 0 becomes
// the one that the system chose.
func listenTCP(addrs []netip.AddrPort) (ls []net.Listener, err error) {
	for _, a := range addrs {
		network := "tcp"
		switch {
		case a.Addr().Is4():
			network = "tcp4"
		case a.Addr() != netip.IPv6Unspecified():
			network = "tcp6"
		default:
			for _, b := range addrs {
				if b.Addr() == netip.IPv4Unspecified() && b.Port() == a.Port() {
					network = "tcp6"
				}
			}
		}
		l, err := net.Listen(network, a.String())
		if err != nil {
			closeListeners(ls)
			return nil, err
		}
		ls = append(ls, l)
	}
	return ls, nil
}

func closeListeners(ls []net.Listener) (err error) {
	for _, l := range ls {
		err = errors.Join(err, l.Close())
	}
	return err
}

// portsOf are the addresses of listeners, for UDP.
func portsOf(ls []net.Listener, addrs []netip.AddrPort) (udp []netip.AddrPort) {
	for i, l := range ls {
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		udp = append(udp, netip.AddrPortFrom(addrs[i].Addr(), port))
	}
	return udp
}
