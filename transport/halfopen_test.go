package transport

import (
	"context"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// memoryInUse is what the heap and the stacks take, after the garbage is gone.
func memoryInUse() uint64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
		time.Sleep(10 * time.Millisecond)
	}
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// halfOpen begins n server handshakes with a hello each, and returns once all have
// answered. stop ends them.
func halfOpen(b testing.TB, n int, verified bool) (stop func()) {
	h, _ := testHandshaker(b)
	h.flightInterval = time.Hour
	hello := pionHello(b)
	ctx, cancel := context.WithCancel(b.Context())
	var answered atomic.Int64
	var wg sync.WaitGroup
	for range n {
		var once sync.Once
		conn := newHandshakeConn(netip.AddrPort{}, verifierRemote, func([]byte) { once.Do(func() { answered.Add(1) }) })
		conn.addressVerified = verified
		conn.push(hello)
		wg.Go(func() { h.server(ctx, conn, anyKey) })
	}
	for answered.Load() < int64(n) {
		time.Sleep(100 * time.Microsecond)
	}
	return func() { cancel(); wg.Wait() }
}

// BenchmarkHalfOpen is what a hello from a stranger costs when pion gets it: bytes kept until it
// is given up, and the time until the answer has left, with the HelloVerifyRequest
// (state=waits-for-cookie) and with the whole flight 4 (state=flight-sent).
// BenchmarkChallenge is the same without state.
func BenchmarkHalfOpen(b *testing.B) {
	for name, verified := range map[string]bool{"waits-for-cookie": false, "flight-sent": true} {
		b.Run("state="+name, func(b *testing.B) {
			const n = 500
			for b.Loop() {
				before := memoryInUse()
				start := time.Now()
				stop := halfOpen(b, n, verified)
				took := time.Since(start)
				b.ReportMetric(float64(memoryInUse()-before)/n, "bytes/half-open")
				b.ReportMetric(float64(took.Microseconds())/n, "µs/half-open")
				stop()
			}
		})
	}
}

// BenchmarkHandshake is a whole handshake, both sides.
func BenchmarkHandshake(b *testing.B) {
	c, _ := testHandshaker(b)
	s, _ := testHandshaker(b)
	b.ReportAllocs()
	for b.Loop() {
		_, server, err1, err2 := shakeBoth(b.Context(), newWire(nil), c, s, anyKey, anyKey)
		if err1 != nil || err2 != nil {
			b.Fatal(err1, err2)
		}
		<-server.retire()
	}
}

// BenchmarkUnretired is what a server's agreement keeps until it lets go of pion, and after.
func BenchmarkUnretired(b *testing.B) {
	c, _ := testHandshaker(b)
	s, _ := testHandshaker(b)
	const n = 200
	for b.Loop() {
		before := memoryInUse()
		servers := make([]*agreement, 0, n)
		for range n {
			_, server, err1, err2 := shakeBoth(b.Context(), newWire(nil), c, s, anyKey, anyKey)
			if err1 != nil || err2 != nil {
				b.Fatal(err1, err2)
			}
			servers = append(servers, server)
		}
		b.ReportMetric(float64(memoryInUse()-before)/n, "bytes/unretired")
		for _, server := range servers {
			<-server.retire()
		}
		b.ReportMetric(float64(int64(memoryInUse())-int64(before))/n, "bytes/retired")
		runtime.KeepAlive(servers)
	}
}
