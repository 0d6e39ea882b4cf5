package netstack

import (
	"context"
	"fmt"
	"net"
	"testing"
)

// BenchmarkRouterTCP carries TCP flows from one node through another to a socket of the
// system on loopback, and beside it the same between the two nodes alone: what the
// router adds is its own splice, the kernel's TCP twice and the reader's system calls, all in
// this process or on its account. "down" is from the target to the client.
func BenchmarkRouterTCP(b *testing.B) {
	for _, flows := range []int{1, 8} {
		b.Run(fmt.Sprintf("path=plain/flows=%d", flows), func(b *testing.B) {
			benchTCP(b, joinPenstock(b, 1400, true), flows, defaultWrite)
		})
		b.Run(fmt.Sprintf("path=routed/flows=%d", flows), func(b *testing.B) {
			benchTCP(b, joinRouted(b, false), flows, defaultWrite)
		})
		b.Run(fmt.Sprintf("path=routed-down/flows=%d", flows), func(b *testing.B) {
			benchTCP(b, joinRouted(b, true), flows, defaultWrite)
		})
	}
}

// joinRouted dials from a node through the router to a listener of the system. With
// down the two sides are exchanged once they are connected: the "dialler" writes at the
// target.
func joinRouted(b testing.TB, down bool) *joined {
	targets := make(chan net.Conn, 64)
	x, y := routedPair(b, func(x, y *Config) { x.MTU, y.MTU = 1400, 1400 })
	j := &joined{
		sends: func() (uint64, uint64) {
			n := x
			if down {
				n = y
			}
			s := n.transport.Status().Sockets[0].Stats
			return s.DatagramsOut, s.Sends
		},
	}
	var l net.Listener
	clients := make(chan net.Conn, 64)
	j.listen = func(port int) (net.Listener, error) {
		var err error
		l, err = net.Listen("tcp", "127.0.0.1:0")
		if down && err == nil {
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					targets <- c
				}
			}()
			return &chanListener{Listener: l, conns: clients}, nil
		}
		return l, err
	}
	j.dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		c, err := x.Dial(ctx, network, hostPort("203.0.113.9", l.Addr()))
		if err != nil || !down {
			return c, err
		}
		clients <- c
		return <-targets, nil
	}
	return j
}

// chanListener accepts what it is sent.
type chanListener struct {
	net.Listener
	conns chan net.Conn
}

func (l *chanListener) Accept() (net.Conn, error) { return <-l.conns, nil }
