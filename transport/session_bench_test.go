package transport

import (
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"
)

// windowDevice gives packets of one size as fast as they arrive at another: at most window are under way, as TCP
// in the tunnel would have it. Lost ones are counted and not sent again.
type windowDevice struct {
	template []byte
	window   int64
	sent     atomic.Int64
	arrived  *atomic.Int64
	closed   chan struct{}
	left     atomic.Int64 // packets still to be sent
}

func (d *windowDevice) BatchSize() int { return 45 }

func (d *windowDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		select {
		case <-d.closed:
			return 0, os.ErrClosed
		default:
		}
		n := min(d.window-(d.sent.Load()-d.arrived.Load()), d.left.Load(), int64(d.BatchSize()))
		if n <= 0 {
			time.Sleep(20 * time.Microsecond)
			continue
		}
		for i := range n {
			sizes[i] = copy(bufs[i][offset:], d.template)
		}
		d.sent.Add(n)
		d.left.Add(-n)
		return int(n), nil
	}
}

func (d *windowDevice) Write(bufs [][]byte, _ int) (int, error) {
	d.arrived.Add(int64(len(bufs)))
	return len(bufs), nil
}

// BenchmarkSession carries packets of 1400 bytes from a client to a server over loopback, both in this process: by
// datagram, by stream, and by stream without a StreamConn, which is what crypto/tls makes of it by itself.
func BenchmarkSession(b *testing.B) {
	for _, c := range []struct {
		name         string
		path         SessionPath
		pack, direct bool
	}{
		{"dtls", PathDatagrams, false, false}, {"cstp", PathStream, false, false}, {"cstp packed", PathStream, true, false}, {"cstp unbatched", PathStream, false, true},
	} {
		b.Run(c.name, func(b *testing.B) { benchmarkSession(b, c.path, c.pack, c.direct) })
	}
}

func benchmarkSession(b *testing.B, path SessionPath, pack, direct bool) {
	const size = 1400
	var arrived atomic.Int64
	from, to := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	sending := &windowDevice{template: (&testNode{addr: from}).packet(to, 0, size), window: 300, arrived: &arrived, closed: make(chan struct{})}
	taking := &windowDevice{arrived: &arrived, closed: sending.closed} // it has nothing to send
	transports := make([]*Transport, 2)
	for i, dev := range []Device{sending, taking} {
		conn, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), SocketOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if transports[i], err = New(Config{Conns: []PacketConn{conn}, Device: dev}); err != nil {
			b.Fatal(err)
		}
	}
	client, server := transports[0], transports[1]
	defer func() {
		close(sending.closed)
		client.Close()
		server.Close()
	}()
	cl, sl := linkPair(b)
	if direct {
		cl.Stream, sl.Stream = tlsPairOver(b, func(c net.Conn) net.Conn { return c })
	}
	cl.PackFrames, sl.PackFrames = pack, pack
	if path == PathStream {
		cl.NoDatagrams, sl.NoDatagrams = "not wanted here", "not wanted here"
	}
	host := func(a netip.Addr) []netip.Prefix { return []netip.Prefix{netip.PrefixFrom(a, 32)} }
	s, err := server.AddSession(SessionConfig{Link: sl, AllowedIPs: host(from)})
	if err != nil {
		b.Fatal(err)
	}
	endpoint := server.conns[0].LocalAddr().String()
	sc, err := client.AddSession(SessionConfig{Client: true, Endpoint: endpoint, Link: cl, AllowedIPs: host(to)})
	if err != nil {
		b.Fatal(err)
	}
	eventually(b, "connected", func() bool { return sc.Status().Path == path && s.Status().Path == path })
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	sending.left.Store(int64(b.N))
	quiet := 0
	for last := int64(-1); ; {
		now := arrived.Load()
		if now >= int64(b.N) {
			break
		}
		if now == last { // lost packets hold the window shut
			if quiet++; quiet > 2000 {
				arrived.Add(sending.sent.Load() - now)
				b.ReportMetric(float64(sending.sent.Load()-now), "lost")
				quiet = 0
			}
		} else {
			quiet = 0
		}
		last = now
		time.Sleep(50 * time.Microsecond)
	}
	b.StopTimer()
	if drops := client.Status().Drops; len(drops) > 0 {
		b.Logf("drops: %v", drops)
	}
}
