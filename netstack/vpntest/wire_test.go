package vpntest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

// run makes a run of datagrams of the given sizes, each starting with its number.
func run(to transport.PacketConn, first int, sizes ...int) transport.Run {
	r := transport.Run{Remote: to.LocalAddr()}
	for i, n := range sizes {
		b := bytes.Repeat([]byte{byte(first + i)}, n)
		binary.BigEndian.PutUint16(b, uint16(first+i))
		r.Segments = append(r.Segments, b)
	}
	return r
}

func repeat(n, size int) []int { return slices.Repeat([]int{size}, n) }

func send(t *testing.T, from transport.PacketConn, runs ...transport.Run) {
	t.Helper()
	if n, err := from.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatalf("WriteBatch = %d, %v", n, err)
	}
}

func newBatch(n int) []transport.Inbound {
	b := make([]transport.Inbound, n)
	for i := range b {
		b[i].Buf = make([]byte, 65536)
	}
	return b
}

// numbers reads until want datagrams have come, or no more do, and returns their
// numbers in order of arrival. It runs in a synctest bubble.
func numbers(t *testing.T, c transport.PacketConn, patience time.Duration) (got []int, buffers int) {
	t.Helper()
	stop := time.AfterFunc(patience, func() { c.Close() })
	defer stop.Stop()
	batch := newBatch(8)
	for {
		n, err := c.ReadBatch(batch)
		if errors.Is(err, net.ErrClosed) {
			return got, buffers
		}
		for _, in := range batch[:n] {
			buffers++
			for b := in.Buf[:in.N]; len(b) > 0; {
				size := min(in.SegmentSize, len(b))
				got = append(got, int(binary.BigEndian.Uint16(b)))
				b = b[size:]
			}
		}
	}
}

func TestPerfectWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := NewNetwork(t, Wire{})
		a, b := nw.Listen(), nw.Listen()
		defer a.Close()
		sizes := append(repeat(40, 1400), 100)             // 41 in one buffer: the last is shorter
		sizes = append(sizes, append(repeat(5, 90), 5)...) // a second run
		send(t, a, run(b, 0, sizes[:41]...), run(b, 41, sizes[41:]...))
		batch := newBatch(4)
		n, err := b.ReadBatch(batch)
		if n != 2 || err != nil {
			t.Fatalf("ReadBatch = %d, %v; want 2 buffers", n, err)
		}
		for i, want := range []struct{ n, segment int }{{40*1400 + 100, 1400}, {5*90 + 5, 90}} {
			in := batch[i]
			if in.N != want.n || in.SegmentSize != want.segment || in.Remote != a.LocalAddr() || in.Local != b.LocalAddr().Addr() {
				t.Errorf("buffer %d: %d bytes of segments of %d from %v at %v", i, in.N, in.SegmentSize, in.Remote, in.Local)
			}
		}
		// Limits of one buffer: 64 segments and 65,400 bytes.
		send(t, a, run(b, 0, repeat(64, 20)...), run(b, 64, repeat(10, 20)...), run(b, 74, repeat(46, 1400)...), run(b, 120, 1400, 1400))
		got, buffers := numbers(t, b, time.Second)
		if !slices.IsSorted(got) || len(got) != 122 || buffers != 4 {
			t.Errorf("%d datagrams in %d buffers: %v", len(got), buffers, got)
		}
		if _, err := b.ReadBatch(batch); !errors.Is(err, net.ErrClosed) {
			t.Errorf("ReadBatch after Close: %v", err)
		}
		if _, err := b.WriteBatch([]transport.Run{run(a, 0, 100)}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("WriteBatch after Close: %v", err)
		}
		if n, err := a.WriteBatch([]transport.Run{run(b, 0, 100), run(b, 0, 65508)}); n != 1 || !errors.Is(err, transport.ErrDatagramTooBig) {
			t.Errorf("WriteBatch of a datagram beyond UDP's size = %d, %v", n, err)
		}
	})
}

// impaired sends count datagrams of 1,000 bytes at one instant over w and returns those
// that arrive.
func impaired(t *testing.T, w Wire, count int) (got []int) {
	synctest.Test(t, func(t *testing.T) {
		nw := NewNetwork(t, w)
		a, b := nw.Listen(), nw.Listen()
		for i := 0; i < count; i += 50 {
			send(t, a, run(b, i, repeat(50, 1000)...))
		}
		got, _ = numbers(t, b, time.Minute)
		a.Close()
	})
	return got
}

func TestImpairments(t *testing.T) {
	const count = 10000 // 10 MB, which the receiver's buffer holds
	t.Run("loss", func(t *testing.T) {
		w := Wire{Loss: 0.1, Seed: 1}
		got := impaired(t, w, count)
		if lost := count - len(got); lost < 900 || lost > 1100 || !slices.IsSorted(got) {
			t.Errorf("%d of %d lost", lost, count)
		}
		again := impaired(t, w, count)
		w.Seed = 2
		other := impaired(t, w, count)
		if !slices.Equal(got, again) || slices.Equal(got, other) {
			t.Error("the seed does not decide which are lost")
		}
	})
	t.Run("duplicate", func(t *testing.T) {
		got := impaired(t, Wire{Duplicate: 0.1}, count)
		twice := len(got) - count
		if uniq := slices.Compact(slices.Sorted(slices.Values(got))); len(uniq) != count || twice < 900 || twice > 1100 {
			t.Errorf("%d different ones, %d twice", len(uniq), twice)
		}
	})
	t.Run("reorder", func(t *testing.T) {
		got := impaired(t, Wire{Reorder: 0.05, Latency: 10 * time.Millisecond}, count)
		// Those on time come first, in order, then the late ones.
		late := slices.IndexFunc(got, func(n int) bool { return n == count-1 }) + 1
		onTime := got[:late]
		if n := len(got) - late; len(got) != count || !slices.IsSorted(onTime) || n < 400 || n > 600 {
			t.Errorf("%d arrived, of these %d late", len(got), n)
		}
	})
	t.Run("mtu", func(t *testing.T) {
		if got := impaired(t, Wire{MTU: 1027}, 100); len(got) != 0 {
			t.Errorf("%d datagrams of 1,028 bytes passed", len(got))
		}
		if got := impaired(t, Wire{MTU: 1028}, 100); len(got) != 100 {
			t.Errorf("%d of 100 datagrams of 1,028 bytes passed", len(got))
		}
	})
}

func TestLatencyJitterBandwidth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		arrival := func(w Wire, sizes ...int) (first, last time.Duration, n int) {
			nw := NewNetwork(t, w)
			a, b := nw.Listen(), nw.Listen()
			defer a.Close()
			defer b.Close()
			begin := time.Now()
			send(t, a, run(b, 0, sizes...))
			batch := newBatch(64)
			stop := time.AfterFunc(time.Minute, func() { b.Close() })
			defer stop.Stop()
			for {
				k, err := b.ReadBatch(batch)
				if err != nil {
					return first, last, n
				}
				if last = time.Since(begin); first == 0 {
					first = last
				}
				for _, in := range batch[:k] {
					n += (in.N + in.SegmentSize - 1) / in.SegmentSize
				}
			}
		}
		if first, last, n := arrival(Wire{Latency: 30 * time.Millisecond}, repeat(20, 972)...); first != 30*time.Millisecond || last != first || n != 20 {
			t.Errorf("latency of 30 ms: %d datagrams from %v to %v", n, first, last)
		}
		if first, last, n := arrival(Wire{Latency: 30 * time.Millisecond, Jitter: 10 * time.Millisecond}, repeat(20, 972)...); first < 30*time.Millisecond || last > 40*time.Millisecond || last == first || n != 20 {
			t.Errorf("and jitter of 10 ms: %d datagrams from %v to %v", n, first, last)
		}
		// 1,000 bytes at 8 Mbit/s are 1 ms each.
		if first, last, n := arrival(Wire{Bandwidth: 8e6}, repeat(20, 972)...); first != time.Millisecond || last != 20*time.Millisecond || n != 20 {
			t.Errorf("8 Mbit/s: %d datagrams from %v to %v", n, first, last)
		}
		// The sender's queue holds 100 ms.
		if _, last, n := arrival(Wire{Bandwidth: 8e6}, repeat(500, 972)...); n < 100 || n > 102 || last > 103*time.Millisecond {
			t.Errorf("8 Mbit/s: %d of 500 datagrams arrived, the last after %v", n, last)
		}
	})
}
