package tunwrap

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// mixed is what a stack may have queued, and what must come out of Read.
func mixed() (pkts []*stack.PacketBuffer, want [][]byte) {
	super := func(s spec, size int, cuts ...int) {
		pkts = append(pkts, outboundPacket(s.partial(), s.hdrLen(), s.gso(size), cuts...))
		want = append(want, s.plainSegments(size)...)
	}
	plain := func(s spec) {
		pkts = append(pkts, outboundPacket(s.full(), s.hdrLen(), GSO{}))
		want = append(want, s.full())
	}
	tcp := spec{sport: 1, dport: 2, flags: ack | psh, seq: 5, tcpOptions: timestamps, id: 3}
	with := func(n int) spec { s := tcp; s.payload = payload(n); return s }
	six := func(s spec) spec { s.v6 = true; return s }

	super(with(0), 1348)         // a pure ACK
	super(with(65000), 88, 9999) // more segments than any batch
	plain(spec{udp: true, payload: payload(1200)})
	super(six(with(40000)), 1320, 1, 2, 3)
	super(with(1348), 1348) // exactly one segment
	super(with(1300), 1348) // less than one
	super(six(with(7)), 1320)
	plain(six(spec{udp: true, payload: payload(1)}))
	super(with(1349), 1348)
	return pkts, want
}

// Whatever the number of buffers, every segment comes out once and in order.
func TestReadResumes(t *testing.T) {
	for _, batch := range []int{1, 2, 3, 63, 64, 127, 128, 1000} {
		t.Run(fmt.Sprint(batch), func(t *testing.T) {
			pkts, want := mixed()
			w := New(&fakeLink{queue: pkts}, Options{BatchSize: batch})
			defer w.Close()
			got := readAll(t, w, batch, 1500+headroom)
			if err := differ(got, want); err != nil {
				t.Fatal(err)
			}
			if d := w.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
			var n uint64
			for _, b := range want {
				n += uint64(len(b))
			}
			s := w.Stats().Outbound
			if s.Packets != uint64(len(pkts)) || s.Superpackets != 3 || s.Segments != uint64(len(want)) || s.Bytes != n {
				t.Errorf("%+v", s)
			}
		})
	}
}

// A Read gives all that is queued, not a packet at a time.
func TestReadDrains(t *testing.T) {
	var pkts []*stack.PacketBuffer
	for range 100 {
		s := spec{udp: true, payload: payload(100)}
		pkts = append(pkts, outboundPacket(s.full(), s.hdrLen(), GSO{}))
	}
	w := New(&fakeLink{queue: pkts}, Options{})
	defer w.Close()
	bufs, sizes := buffers(w.BatchSize(), 1500)
	if n, err := w.Read(bufs, sizes, headroom); n != 100 || err != nil {
		t.Errorf("Read: %d, %v", n, err)
	}
}

func buffers(n, size int) ([][]byte, []int) {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, size)
	}
	return bufs, make([]int, n)
}

// Packets that do not fit a buffer are answered, packets that make no sense are dropped and counted; the
// others come out.
func TestReadDrops(t *testing.T) {
	big := spec{udp: true, df: true, payload: payload(1500)}
	super := spec{df: true, flags: ack, payload: payload(5200)} // segments of 2040 bytes, 2040, 1240
	tail := super
	tail.seq, tail.id, tail.payload = 4000, 2, payload(5200)[4000:]
	good := spec{udp: true, payload: payload(9)}
	zero := super.gso(0) // nothing says how to split it
	garbage := outboundPacket(bytes.Repeat([]byte{0xff}, 60), 40, GSO{NeedsCsum: true, GSOSize: 1000})
	link := &fakeLink{queue: []*stack.PacketBuffer{
		outboundPacket(big.full(), big.hdrLen(), GSO{}),
		outboundPacket(super.partial(), super.hdrLen(), super.gso(2000)),
		outboundPacket(super.partial(), super.hdrLen(), zero),
		garbage,
		outboundPacket(good.full(), good.hdrLen(), GSO{}),
	}}
	link.delivered = func(pkt *stack.PacketBuffer) {
		b := bytesOf(pkt)
		if l, _ := locate(b, len(b)); valid(b) != nil || be16(b, l.l4+6) != 1400 {
			t.Errorf("message %x", b[:40])
		}
	}
	w := New(link, Options{})
	defer w.Close()
	got := readAll(t, w, 10, 1400+headroom)
	if err := differ(got, [][]byte{tail.full(), good.full()}); err != nil {
		t.Error(err)
	}
	if n := w.Stats().TooBig; n != 2 {
		t.Errorf("%d messages, want one for each flow", n)
	}
	d := w.Drops()
	if d[DropOversize] != 1 || d[DropTooBigRate] != 1 || d[DropMalformed] != 1 || d.Total() != 3 {
		t.Errorf("drops %v", d)
	}
}

// What does not fit a buffer and may be fragmented is, every segment of a superpacket too.
func TestReadFragments(t *testing.T) {
	big := spec{udp: true, payload: payload(1500)}
	super := spec{flags: ack, payload: payload(5200)}
	w := New(&fakeLink{queue: []*stack.PacketBuffer{
		outboundPacket(big.full(), big.hdrLen(), GSO{}),
		outboundPacket(super.partial(), super.hdrLen(), super.gso(2000)),
	}}, Options{})
	defer w.Close()
	n := 0
	for _, b := range readAll(t, w, 10, 1400+headroom) {
		n += len(b) - 20
	}
	if want := 8 + 1500 + 3*20 + 5200; n != want || w.Stats().Fragments != 6 || w.Drops() != (Drops{}) {
		t.Errorf("%d bytes, want %d; %d fragments, drops %v", n, want, w.Stats().Fragments, w.Drops())
	}
}

func TestReadNAT(t *testing.T) {
	pkts, _ := mixed()
	w := New(&fakeLink{queue: pkts}, Options{})
	defer w.Close()
	out := [2]netip.Addr{netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("2001:db8::1")}
	if err := w.SetNAT([]NATRule{rule("10.0.0.1", out[0].String(), "0.0.0.0/0"), rule("fd00::1", out[1].String(), "::/0")}); err != nil {
		t.Fatal(err)
	}
	got := readAll(t, w, 50, 1500+headroom)
	if len(got) == 0 {
		t.Fatal("nothing")
	}
	for _, b := range got {
		if err := valid(b); err != nil {
			t.Fatal(err)
		}
		l, _ := locate(b, len(b))
		a := l.addresses(b)
		if !bytes.Equal(a[:len(a)/2], out[b2i(l.version == 6)].AsSlice()) {
			t.Fatalf("from %x", a[:len(a)/2])
		}
	}
}

func TestDevice(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	link := new(fakeLink)
	w := New(link, Options{MTU: 1390, Name: "ps0", BatchSize: 9})
	if m, err := w.MTU(); m != 1390 || err != nil {
		t.Error(m, err)
	}
	if n, err := w.Name(); n != "ps0" || err != nil {
		t.Error(n, err)
	}
	if w.BatchSize() != 9 || w.File() != nil {
		t.Error(w.BatchSize(), w.File())
	}
	w.SetMTU(1390) // no news
	w.SetMTU(1280)
	for i := range 100 { // more than anybody reads
		w.SetMTU(1281 + i)
	}
	if m, _ := w.MTU(); m != 1380 {
		t.Error(m)
	}
	if e := <-w.Events(); e != tun.EventUp {
		t.Error(e)
	}
	if e := <-w.Events(); e != tun.EventMTUUpdate {
		t.Error(e)
	}
	for range 2 {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	if !link.closed {
		t.Error("the link is open")
	}
	for range w.Events() {
	}
	w.SetMTU(1500)
	bufs, sizes := buffers(1, 100)
	if n, err := w.Read(bufs, sizes, 0); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read: %d, %v", n, err)
	}
	if n, err := w.Write(bufs, 0); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("Write: %d, %v", n, err)
	}
	if n, err := New(new(fakeLink), Options{}).Read(nil, nil, 0); n != 0 || err != nil {
		t.Errorf("Read into nothing: %d, %v", n, err)
	}
	if m, _ := New(new(fakeLink), Options{}).MTU(); m != 1280 {
		t.Errorf("default MTU %d", m)
	}
}

// Close releases what has been dequeued but not yet read. The leak check in TestMain sees the rest.
func TestCloseReleases(t *testing.T) {
	pkts, _ := mixed()
	w := New(&fakeLink{queue: pkts}, Options{})
	more, _ := mixed()
	r := w.NewReader(&fakeLink{queue: more})
	bufs, sizes := buffers(10, 1500)
	for _, r := range []interface {
		Read([][]byte, []int, int) (int, error)
	}{w, r} {
		if n, err := r.Read(bufs, sizes, headroom); n != 10 || err != nil {
			t.Fatal(n, err)
		}
	}
	w.Close()
	if d := w.Drops(); d[DropClosed] != 2*8 || d.Total() != 2*8 {
		t.Errorf("drops %v", d)
	}
	if n, err := r.Read(bufs, sizes, headroom); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("Read: %d, %v", n, err)
	}
}

// Close ends a Read that waits, and one that is busy releases what it has.
func TestCloseWakes(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	for range 20 {
		w := New(newChanLink(1400), Options{})
		done := make(chan error)
		go func() {
			bufs, sizes := buffers(4, 1500)
			var err error
			for err == nil {
				_, err = w.Read(bufs, sizes, headroom)
			}
			done <- err
		}()
		link := w.link.(*chanLink)
		for range 3 {
			s := spec{flags: ack, payload: payload(30000)}
			var list stack.PacketBufferList
			list.PushBack(outboundPacket(s.partial(), s.hdrLen(), s.gso(100)))
			link.WritePackets(list)
			list.DecRef()
		}
		w.Close()
		select {
		case err := <-done:
			if !errors.Is(err, os.ErrClosed) {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("still reading")
		}
		// What the link had queued when it was closed is the link's.
		link.Drain()
	}
}

// Any number of goroutines may write.
func TestWriteConcurrently(t *testing.T) {
	link := new(fakeLink)
	w := New(link, Options{})
	defer w.Close()
	var mu sync.Mutex
	var n, bytes atomic.Uint64
	link.delivered = func(pkt *stack.PacketBuffer) {
		mu.Lock() // two deliveries at once would find this lock; none is held by us
		defer mu.Unlock()
		n.Add(1)
		bytes.Add(uint64(pkt.Size()))
	}
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			s := spec{sport: uint16(g), flags: ack, payload: payload(14000)}
			for range 100 {
				var bufs [][]byte
				for _, p := range s.plainSegments(1400) {
					bufs = append(bufs, append(make([]byte, headroom), p...))
				}
				if n, err := w.Write(bufs, headroom); n != 10 || err != nil {
					t.Errorf("Write: %d, %v", n, err)
				}
				w.SetNAT(nil)
			}
		})
	}
	wg.Wait()
	if n.Load() != 400 || bytes.Load() != 400*14040 {
		t.Errorf("%d packets, %d bytes", n.Load(), bytes.Load())
	}
}

func TestDropNames(t *testing.T) {
	seen := map[string]bool{}
	for d := range NumDrops {
		s := d.String()
		if s == "" || s == "unknown" || seen[s] {
			t.Errorf("%d: %q", d, s)
		}
		seen[s] = true
	}
	if NumDrops.String() != "unknown" {
		t.Error(NumDrops)
	}
}
