package netstack

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// joinPorts joins two nodes whose ends are sockets of the system: a forward before one,
// a publish behind the other. Set beside engine=penstock it tells what the two relays
// and four crossings of the kernel cost.
func joinPorts(b testing.TB, mtu int) *joined {
	x, y := pair(b, func(x, y *Config) { x.MTU, y.MTU = mtu, mtu })
	var forward *Relay
	return &joined{
		dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, forward.Addr().String())
		},
		listen: func(port int) (net.Listener, error) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			at := fmt.Sprintf("%s:%d", serverIP, port)
			if _, err := y.Publish("tcp", at, l.Addr().String()); err != nil {
				return nil, err
			}
			forward, err = x.Forward("tcp", "127.0.0.1:0", at)
			return l, err
		},
		sends: func() (records, calls uint64) {
			for _, s := range x.Status().Tunnel.Sockets {
				records += s.Stats.DatagramsOut
				calls += s.Stats.Sends
			}
			return records, calls
		},
	}
}

// BenchmarkPortsTCP is BenchmarkTunnelTCP between programs of the system.
func BenchmarkPortsTCP(b *testing.B) {
	for _, flows := range []int{1, 8} {
		b.Run(fmt.Sprintf("through=tunnel/flows=%d", flows), func(b *testing.B) {
			benchTCP(b, joinPenstock(b, 1400, true), flows, 128<<10)
		})
		b.Run(fmt.Sprintf("through=ports/flows=%d", flows), func(b *testing.B) {
			benchTCP(b, joinPorts(b, 1400), flows, 128<<10)
		})
	}
}

// BenchmarkPortsUDP sends datagrams of 1,200 bytes from one socket of the system to
// another through a forward and a publish, at most 256 of them under way, since UDP
// has no flow control of its own.
func BenchmarkPortsUDP(b *testing.B) {
	const size, window = 1200, 256
	x, y := pair(b, func(x, y *Config) { x.MTU, y.MTU = 1400, 1400 })
	service, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	service.SetReadBuffer(8 << 20)
	if _, err := y.Publish("udp", serverIP+":53", service.LocalAddr().String()); err != nil {
		b.Fatal(err)
	}
	forward, err := x.Forward("udp", "127.0.0.1:0", serverIP+":53")
	if err != nil {
		b.Fatal(err)
	}
	c, err := net.Dial("udp", forward.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var got atomic.Int64
	received := make(chan struct{}, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 2*size)
		for {
			if _, err := service.Read(buf); err != nil {
				return
			}
			got.Add(1)
			select {
			case received <- struct{}{}:
			default:
			}
		}
	}()
	payload := make([]byte, size)
	sent, lost := int64(0), int64(0)
	send := func(n int64) {
		for end := sent + n; sent < end; {
			if sent-lost-got.Load() < window {
				if _, err := c.Write(payload); err != nil {
					b.Fatal(err)
				}
				sent++
				continue
			}
			select {
			case <-received:
			case <-time.After(100 * time.Millisecond):
				lost = sent - got.Load() // what is not there now will not come
			}
		}
	}
	send(10 * window)
	b.SetBytes(size)
	b.ReportAllocs()
	m := startMeter(b, &joined{})
	b.ResetTimer()
	before := got.Load()
	send(int64(b.N))
	b.StopTimer()
	m.report((got.Load() - before) * size)
	b.ReportMetric(100*float64(lost)/float64(sent), "%lost")
	service.Close()
	<-ended
}
