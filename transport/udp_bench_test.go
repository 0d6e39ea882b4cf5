package transport

import (
	"fmt"
	"sync/atomic"
	"testing"
)

// BenchmarkLoopback sends runs of 45 records of 1438 bytes (what a full superpacket
// becomes at an inner MTU of 1400) to a socket that drains as fast as it can.
// One operation is a run. GB/s is what was sent; received% tells how much of it a
// receiver without flow control caught.
func BenchmarkLoopback(b *testing.B) {
	for _, c := range []struct {
		name       string
		contiguous bool
		opts       SocketOptions
	}{
		{"gso", true, SocketOptions{}},
		{"gso-scattered", false, SocketOptions{}},
		{"plain", true, SocketOptions{DisableGSO: true, DisableGRO: true}},
	} {
		b.Run(c.name, func(b *testing.B) { benchmarkLoopback(b, c.contiguous, c.opts) })
	}
}

func benchmarkLoopback(b *testing.B, contiguous bool, opts SocketOptions) {
	const records, size = 45, 1438
	from, to := testSocket(b, "127.0.0.1:0", opts), testSocket(b, "127.0.0.1:0", opts)
	drained := make(chan struct{})
	var got atomic.Uint64
	go func() {
		defer close(drained)
		batch := inboundBatch(16, 64<<10)
		for {
			n, err := to.ReadBatch(batch)
			if err != nil {
				return
			}
			for i := range batch[:n] {
				got.Add(uint64(batch[i].N))
			}
		}
	}()
	stride := size
	if !contiguous {
		stride = 1500
	}
	arena := make([]byte, records*stride)
	run := Run{Remote: to.LocalAddr()}
	for i := range records {
		run.Segments = append(run.Segments, arena[i*stride:][:size:size])
	}
	runs := []Run{run}
	b.SetBytes(records * size)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if _, err := from.WriteBatch(runs); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	out := from.Stats()
	b.ReportMetric(float64(out.BytesOut)/1e9/b.Elapsed().Seconds(), "GB/s")
	b.ReportMetric(float64(out.DatagramsOut)/float64(out.Sends), "records/send")
	b.ReportMetric(100*float64(got.Load())/float64(out.BytesOut), "received%")
	to.Close()
	<-drained
}

// BenchmarkWriteBatchOverhead is WriteBatch without the kernel: what a send of 45
// records costs in this package.
func BenchmarkWriteBatchOverhead(b *testing.B) {
	for _, stride := range []int{1438, 1500} {
		b.Run(fmt.Sprintf("stride=%d", stride), func(b *testing.B) {
			s := testSocket(b, "0.0.0.0:0", SocketOptions{})
			skipKernel(b, s)
			arena := make([]byte, 45*stride)
			run := Run{Remote: reach("127.0.0.1", s), Local: reach("127.0.0.1", s).Addr()}
			for i := range 45 {
				run.Segments = append(run.Segments, arena[i*stride:][:1438:1438])
			}
			runs := []Run{run}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.WriteBatch(runs); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
