package linkep

import (
	"errors"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// newPacket makes a packet of size bytes that belongs to the flow hash and carries
// seq in front. The caller owns its reference. released, if not nil, runs when the last
// reference goes.
func newPacket(hash uint32, seq byte, size int, released func()) *stack.PacketBuffer {
	b := make([]byte, size)
	b[0] = seq
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{
		Payload: buffer.MakeWithData(b), OnRelease: released,
	})
	p.Hash = hash
	return p
}

func seqOf(p *stack.PacketBuffer) byte {
	b, _ := p.Data().PullUp(1)
	return b[0]
}

// send writes one packet as the stack does: a list of one, whose reference the
// caller keeps and drops afterwards.
func send(e *Endpoint, p *stack.PacketBuffer) bool {
	var l stack.PacketBufferList
	l.PushBack(p)
	_, err := e.WritePackets(l)
	p.DecRef()
	return err == nil
}

// drain dequeues everything that is queued now, one packet a call.
func drain(t *testing.T, e *Endpoint) (flows []uint32, seqs []byte) {
	t.Helper()
	var one [1]*stack.PacketBuffer
	for e.Queues()[0].Stats().Depth > 0 {
		n, err := e.Dequeue(one[:])
		if n != 1 || err != nil {
			t.Fatalf("Dequeue = %d, %v", n, err)
		}
		flows, seqs = append(flows, one[0].Hash), append(seqs, seqOf(one[0]))
		one[0].DecRef()
	}
	return flows, seqs
}

// distinctFlows returns n hashes that fall into different buckets.
func distinctFlows(n int) []uint32 {
	var hs []uint32
	seen := map[int32]bool{}
	for h := uint32(1); len(hs) < n; h++ {
		if !seen[bucketOf(h)] {
			seen[bucketOf(h)] = true
			hs = append(hs, h)
		}
	}
	return hs
}

func TestQueueOrderWithinFlow(t *testing.T) {
	e := New(Options{})
	defer e.Close()
	flows := distinctFlows(5)
	for seq := range 40 {
		for i, f := range flows {
			send(e, newPacket(f, byte(seq), 100+9000*i, nil))
		}
	}
	got, seqs := drain(t, e)
	if len(got) != 5*40 {
		t.Fatalf("%d packets, want %d", len(got), 5*40)
	}
	next := map[uint32]byte{}
	for i, f := range got {
		if seqs[i] != next[f] {
			t.Fatalf("flow %d: packet %d after %d packets", f, seqs[i], next[f])
		}
		next[f]++
	}
}

// A packet of a flow that was idle overtakes the backlog of a bulk flow, and two
// bulk flows get the same number of bytes whatever their packet sizes.
func TestQueueFairness(t *testing.T) {
	e := New(Options{QueueBytes: 64 << 20})
	defer e.Close()
	f := distinctFlows(3)
	for range 100 {
		send(e, newPacket(f[0], 0, 60000, nil))
	}
	for range 4000 {
		send(e, newPacket(f[1], 1, 1400, nil))
	}
	var one [1]*stack.PacketBuffer
	bytes := map[uint32]int{}
	for range 500 {
		if _, err := e.Dequeue(one[:]); err != nil {
			t.Fatal(err)
		}
		bytes[one[0].Hash] += one[0].Size()
		one[0].DecRef()
	}
	if d := bytes[f[0]] - bytes[f[1]]; d > 2*quantum || -d > 2*quantum {
		t.Errorf("bytes of two bulk flows: %d and %d", bytes[f[0]], bytes[f[1]])
	}
	send(e, newPacket(f[2], 2, 84, nil))
	if _, err := e.Dequeue(one[:]); err != nil {
		t.Fatal(err)
	}
	defer one[0].DecRef()
	if one[0].Hash != f[2] {
		t.Errorf("next packet is of flow %d, want the idle flow %d", one[0].Hash, f[2])
	}
}

// A flow that always has just one packet queued must not starve the others.
func TestQueueNoStarvation(t *testing.T) {
	e := New(Options{})
	defer e.Close()
	f := distinctFlows(2)
	for range 10 {
		send(e, newPacket(f[0], 0, 1400, nil))
	}
	var one [1]*stack.PacketBuffer
	bulk := 0
	for range 40 {
		send(e, newPacket(f[1], 0, 1400, nil))
		if _, err := e.Dequeue(one[:]); err != nil {
			t.Fatal(err)
		}
		if one[0].Hash == f[0] {
			bulk++
		}
		one[0].DecRef()
	}
	if bulk != 10 {
		t.Errorf("%d of 10 packets of the waiting flow came out in 40", bulk)
	}
}

func TestQueueFullDropsFattestOldest(t *testing.T) {
	const bound = 1 << 20
	e := New(Options{QueueBytes: bound})
	defer e.Close()
	f := distinctFlows(2)
	send(e, newPacket(f[1], 77, 84, nil)) // the ping, queued first
	released := 0
	for seq := range 100 {
		if !send(e, newPacket(f[0], byte(seq), 60000, func() { released++ })) {
			t.Fatal("a full queue refused a packet")
		}
		if s := e.Queues()[0].Stats(); s.DepthBytes > bound {
			t.Fatalf("%d bytes charged, bound %d", s.DepthBytes, bound)
		}
	}
	s := e.Queues()[0].Stats()
	if s.DroppedFull == 0 || int(s.DroppedFull) != released || s.DroppedBytes != s.DroppedFull*60000 {
		t.Errorf("stats %+v, %d packets released", s, released)
	}
	if s.Packets != 101 || s.Bytes != 84+100*60000 {
		t.Errorf("accepted %d packets, %d bytes", s.Packets, s.Bytes)
	}
	_, seqs := drain(t, e)
	pings := 0
	want := byte(s.DroppedFull) // the oldest went
	for _, q := range seqs {
		if q == 77 && pings == 0 {
			pings++
			continue
		}
		if q != want {
			t.Fatalf("bulk packet %d, want %d", q, want)
		}
		want++
	}
	if pings != 1 || want != 100 {
		t.Errorf("%d pings, bulk up to %d", pings, want)
	}
}

// The payload of TCP connections is not charged, so it is not dropped; that of other packets
// is.
func TestQueueChargesNoTCPPayload(t *testing.T) {
	e := New(Options{QueueBytes: 1 << 20})
	defer e.Close()
	f := distinctFlows(1)
	for range 500 { // 30 MB
		p := newPacket(f[0], 0, 60000, nil)
		p.TransportProtocolNumber = header.TCPProtocolNumber
		send(e, p)
	}
	if s := e.Queues()[0].Stats(); s.DroppedFull != 0 || s.Depth != 500 || s.DepthBytes < 500*stack.PacketBufferStructSize {
		t.Errorf("connection: %+v", s)
	}
	drain(t, e)
	for range 500 { // nobody's: forwarded, or a reset that the stack made
		p := newPacket(0, 0, 60000, nil)
		p.TransportProtocolNumber = header.TCPProtocolNumber
		send(e, p)
	}
	if s := e.Queues()[0].Stats(); s.DroppedFull < 480 || s.DepthBytes > 1<<20 {
		t.Errorf("no connection: %+v", s)
	}
}

// The bound holds for small packets too, whose memory is mostly overhead, and when one
// large packet displaces many small ones.
func TestQueueBoundCountsOverhead(t *testing.T) {
	const bound = 256 << 10
	e := New(Options{QueueBytes: bound})
	defer e.Close()
	f := distinctFlows(2)
	for range 20000 {
		send(e, newPacket(f[0], 0, 40, nil))
	}
	if s := e.Queues()[0].Stats(); s.DepthBytes > bound || s.Depth > bound/stack.PacketBufferStructSize {
		t.Errorf("stats %+v", s)
	}
	send(e, newPacket(f[1], 0, 65000, nil))
	if s := e.Queues()[0].Stats(); s.DepthBytes > bound {
		t.Errorf("stats %+v", s)
	}
}

func TestDequeueEndsBatch(t *testing.T) {
	e := New(Options{})
	defer e.Close()
	for range 10 {
		send(e, newPacket(1, 0, 60000, nil))
	}
	var pkts [64]*stack.PacketBuffer
	n, err := e.Dequeue(pkts[:])
	if n != 3 || err != nil { // 3 x 60,000 is the first sum of at least 128 KiB
		t.Errorf("Dequeue = %d, %v; want 3", n, err)
	}
	for _, p := range pkts[:n] {
		p.DecRef()
	}
}

// A sleeping reader is woken by the first packet of a burst and by no other, and
// none is lost over many naps.
func TestOneWakeupPerBurst(t *testing.T) {
	e := New(Options{})
	defer e.Close()
	q := e.Queues()[0]
	q.waiting = true // as a reader leaves it that goes to sleep
	for i := range 20 {
		send(e, newPacket(uint32(i+1), 0, 1000, nil))
	}
	if w := q.Stats().Wakeups; w != 1 {
		t.Errorf("%d wake-ups for one burst", w)
	}
	if flows, _ := drain(t, e); len(flows) != 20 {
		t.Errorf("%d of 20 packets", len(flows))
	}
	send(e, newPacket(1, 0, 1000, nil))
	if w := q.Stats().Wakeups; w != 1 {
		t.Errorf("a reader that is awake was woken, %d", w)
	}
	drain(t, e)

	synctest.Test(t, func(t *testing.T) {
		e := New(Options{})
		got := 0
		var reader sync.WaitGroup
		reader.Go(func() {
			var pkts [64]*stack.PacketBuffer
			for {
				n, err := e.Dequeue(pkts[:])
				if err != nil {
					return
				}
				for _, p := range pkts[:n] {
					p.DecRef()
				}
				got += n
			}
		})
		for burst := 1; burst <= 50; burst++ {
			synctest.Wait() // the reader sleeps
			for i := range 20 {
				send(e, newPacket(uint32(i+1), 0, 1000, nil))
			}
			synctest.Wait()
			if got != 20*burst {
				t.Fatalf("%d packets after %d bursts of 20", got, burst)
			}
		}
		e.Close()
		reader.Wait()
	})
}

func TestCloseWakesReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, stop := range []func(*Endpoint){(*Endpoint).Close, (*Endpoint).Shutdown} {
			e := New(Options{Queues: 2})
			var errs [2]error
			var wg sync.WaitGroup
			for i, q := range e.Queues() {
				wg.Go(func() {
					var pkts [4]*stack.PacketBuffer
					_, errs[i] = q.Dequeue(pkts[:])
				})
			}
			synctest.Wait()
			stop(e)
			wg.Wait()
			stop(e)
			for _, err := range errs {
				if !errors.Is(err, os.ErrClosed) {
					t.Errorf("Dequeue after stop: %v", err)
				}
			}
		}
	})
}

func TestCloseReleases(t *testing.T) {
	e := New(Options{})
	released := 0
	for i := range 10 {
		send(e, newPacket(uint32(i+1), 0, 100, func() { released++ }))
	}
	e.Close()
	if released != 10 {
		t.Errorf("Close released %d of 10", released)
	}
	if send(e, newPacket(1, 0, 100, func() { released++ })) {
		t.Error("a packet was accepted after Close")
	}
	e.Deliver(newPacket(1, 0x45, 100, func() { released++ }))
	if released != 12 {
		t.Errorf("%d of 12 released", released)
	}
	if s := e.Stats(); s.Queues[0].Refused != 11 || s.NotAttached != 1 {
		t.Errorf("stats %+v", s)
	}
}

func TestShutdownLetsQueuedPacketsOut(t *testing.T) {
	e := New(Options{})
	send(e, newPacket(1, 0, 100, nil))
	send(e, newPacket(2, 0, 100, nil))
	e.Shutdown()
	if send(e, newPacket(1, 0, 100, nil)) {
		t.Error("a packet was accepted after Shutdown")
	}
	var pkts [4]*stack.PacketBuffer
	n, err := e.Dequeue(pkts[:])
	if n != 2 || err != nil {
		t.Fatalf("Dequeue = %d, %v; want the 2 queued", n, err)
	}
	for _, p := range pkts[:n] {
		p.DecRef()
	}
	if _, err := e.Dequeue(pkts[:]); !errors.Is(err, os.ErrClosed) {
		t.Errorf("then %v, want ErrClosed", err)
	}
}

// A flow keeps to one queue, and many flows use all of them.
func TestQueuesByFlow(t *testing.T) {
	e := New(Options{Queues: 4})
	defer e.Close()
	for h := uint32(1); h <= 64; h++ {
		for range 3 {
			send(e, newPacket(h*0x9E3779B1, 0, 100, nil))
		}
	}
	for i, q := range e.Queues() {
		d := q.Stats().Depth
		if d == 0 || d%3 != 0 {
			t.Errorf("queue %d holds %d packets", i, d)
		}
	}
}

func TestConcurrentWritersAndClose(t *testing.T) {
	e := New(Options{QueueBytes: 64 << 10})
	var wg sync.WaitGroup
	var released sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 2000 {
				released.Add(1)
				send(e, newPacket(uint32(w+1), byte(i), 1000, released.Done))
			}
		})
	}
	var reader sync.WaitGroup
	reader.Go(func() {
		var pkts [16]*stack.PacketBuffer
		for {
			n, err := e.Dequeue(pkts[:])
			if err != nil {
				return
			}
			for _, p := range pkts[:n] {
				p.DecRef()
			}
		}
	})
	time.Sleep(2 * time.Millisecond)
	e.Close()
	wg.Wait()
	reader.Wait()
	released.Wait() // every packet was released exactly once, or DecRef panicked
}

func TestSteadyStateAllocations(t *testing.T) {
	e := New(Options{QueueBytes: 256 << 10})
	defer e.Close()
	var pkts [64]*stack.PacketBuffer
	var list stack.PacketBufferList
	for i := range 32 {
		p := newPacket(uint32(i%5), 0, 1400, nil)
		p.Hash = uint32(i % 5) // 0 goes through flowHash
		list.PushBack(p)
	}
	defer list.Reset()
	cycle := func() {
		e.WritePackets(list)
		for left := list.Len(); left > 0; {
			n, err := e.Dequeue(pkts[:])
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range pkts[:n] {
				p.DecRef()
			}
			left -= n
		}
	}
	cycle()
	if a := testing.AllocsPerRun(100, cycle); a != 0 {
		t.Errorf("%v allocations for 32 packets", a)
	}
	full := func() { // drops as many as it adds
		for range 10 {
			e.WritePackets(list)
		}
	}
	full()
	if a := testing.AllocsPerRun(100, full); a != 0 {
		t.Errorf("%v allocations for 320 packets into a full queue", a)
	}
}

func BenchmarkQueue(b *testing.B) {
	e := New(Options{})
	defer e.Close()
	var pkts [1]*stack.PacketBuffer
	var list stack.PacketBufferList
	list.PushBack(newPacket(7, 0, 1400, nil))
	defer list.Reset()
	b.ReportAllocs()
	for b.Loop() {
		e.WritePackets(list)
		e.Dequeue(pkts[:])
		pkts[0].DecRef()
	}
}
