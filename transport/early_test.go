package transport

import (
	"net/netip"
	"testing"
	"time"
)

// The pace of early drops: none below the limit, one at once, then sooner and sooner while it
// lasts, at most 200 a second; a pause forgives.
func TestEarlyDropPace(t *testing.T) {
	e := &earlyDrop{limit: 1000}
	now := int64(time.Hour)
	count := func(d time.Duration, bytes int) (drops int) {
		for end := now + int64(d); now < end; now += int64(100 * time.Microsecond) {
			if e.now(bytes, now) {
				drops++
			}
		}
		return drops
	}
	for _, step := range []struct {
		bytes    int
		d        time.Duration
		min, max int
	}{
		{999, time.Second, 0, 0},
		{1000, 10 * time.Millisecond, 1, 1},
		{1000, 100 * time.Millisecond, 2, 3}, // after 50 and 85 ms
		{1000, 10 * time.Second, 1500, 2010},
		{1000, time.Second, 190, 201},
		{0, time.Second, 0, 0},
		{1 << 20, 10 * time.Millisecond, 1, 1},
		{1 << 20, 45 * time.Millisecond, 1, 1},
	} {
		if got := count(step.d, step.bytes); got < step.min || got > step.max {
			t.Errorf("%v with %d bytes: %d drops, want %d to %d", step.d, step.bytes, got, step.min, step.max)
		}
	}
}

// An early drop takes one packet of those that fill the queue, and allocates nothing.
func TestEarlyDrop(t *testing.T) {
	o, in, sink, dev := joined(t, AES128GCM)
	in.drop = &earlyDrop{limit: 2000}
	batch := []Inbound{{Buf: make([]byte, 1<<17)}}
	receive := func(n, size int) {
		fill(o, n, size)
		o.batch(n)
		batch[0] = Inbound{Buf: batch[0].Buf, Remote: netip.MustParseAddrPort("192.0.2.2:2"), N: copy(batch[0].Buf, sink.wire), SegmentSize: sink.size}
		in.receive(batch)
	}
	dropped := func() uint64 { return in.t.Status().Drops[DropEarly.String()] }
	receive(1, 1400)
	receive(40, 84) // more than the limit, but nothing that is large
	if dev.packets != 41 || dropped() != 0 {
		t.Fatalf("%d packets came through, want 41; drops %v", dev.packets, in.t.Status().Drops)
	}
	*in.drop = earlyDrop{limit: 2000}
	receive(10, 1400)
	if dev.packets != 41+9 || dropped() != 1 {
		t.Fatalf("%d packets came through, want 50; drops %v", dev.packets, in.t.Status().Drops)
	}
	if allocs := testing.AllocsPerRun(100, func() {
		*in.drop = earlyDrop{limit: 2000}
		receive(10, 1400)
	}); allocs != 0 {
		t.Errorf("%v allocations a receive", allocs)
	}
	if got := dropped(); got != 1+101 {
		t.Errorf("%d early drops, want 102", got)
	}
}
