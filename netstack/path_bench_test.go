package netstack_test

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/vpntest"
)

// paths are what tunnels cross outside of a data centre.
var paths = []struct {
	name string
	wire vpntest.Wire
}{
	{"20Mbit-50ms", vpntest.Wire{Bandwidth: 20e6, Latency: 25 * time.Millisecond}},
	{"20Mbit-50ms-jitter", vpntest.Wire{Bandwidth: 20e6, Latency: 25 * time.Millisecond, Jitter: 10 * time.Millisecond}},
	{"20Mbit-50ms-loss0.1", vpntest.Wire{Bandwidth: 20e6, Latency: 25 * time.Millisecond, Loss: 0.001}},
	{"20Mbit-50ms-reorder0.2", vpntest.Wire{Bandwidth: 20e6, Latency: 25 * time.Millisecond, Reorder: 0.002}},
	{"100Mbit-10ms", vpntest.Wire{Bandwidth: 100e6, Latency: 5 * time.Millisecond}},
	{"200Mbit-100ms", vpntest.Wire{Bandwidth: 200e6, Latency: 50 * time.Millisecond}},
	{"50ms-bad", badWire},
	{"perfect", vpntest.Wire{}},
}

// BenchmarkPathTCP carries one and eight TCP flows over an in-memory wire; an operation is one write of
// 64 KiB. Mbit/s is of payload from start to end, slow start included, so give it seconds
// (-benchtime 10s); timeouts are retransmission timeouts, of which a good run has none.
// variant=rack is with [netstack.TCPOptions].RACK.
func BenchmarkPathTCP(b *testing.B) {
	for _, p := range paths {
		for _, flows := range []int{1, 8} {
			for _, rack := range []bool{false, true} {
				name := "path=" + p.name + map[int]string{1: "/flows=1", 8: "/flows=8"}[flows]
				if rack {
					name += "/variant=rack"
				}
				b.Run(name, func(b *testing.B) { benchPath(b, p.wire, flows, rack) })
			}
		}
	}
}

func benchPath(b *testing.B, w vpntest.Wire, flows int, rack bool) {
	x, y := vpntest.Pair(b, w, vpntest.Configure(func(_ int, c *netstack.Config) { c.TCP.RACK = rack }))
	l, err := y.Listen("tcp", "10.66.0.2:80")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	var conns []net.Conn
	for range flows {
		c, err := x.Dial(b.Context(), "tcp", "10.66.0.2:80")
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		s, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		wg.Go(func() {
			defer s.Close()
			if _, err := io.Copy(io.Discard, s); err != nil {
				b.Errorf("receive: %v", err)
			}
		})
	}
	const write = 64 << 10
	b.SetBytes(write)
	b.ResetTimer()
	for i, c := range conns {
		wg.Go(func() {
			buf := make([]byte, write)
			for range (b.N + i) / flows {
				if _, err := c.Write(buf); err != nil {
					b.Errorf("send: %v", err)
					return
				}
			}
			c.(*netstack.TCPConn).CloseWrite()
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)*write*8/1e6/b.Elapsed().Seconds(), "Mbit/s")
	st := x.Status().TCP
	b.ReportMetric(float64(st.Timeouts), "timeouts")
}
