package tunwrap

import (
	"bytes"
	"errors"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// taken reads what the TUN has written: packets with their offload metadata.
func taken(t testing.TB, kernel int) (ds []delivery) {
	t.Helper()
	buf := make([]byte, 70000)
	for {
		n, err := unix.Read(kernel, buf)
		if errors.Is(err, unix.EAGAIN) {
			return ds
		}
		if err != nil || n < vnetHeaderSize {
			t.Fatal(n, err)
		}
		g := (*vnetHeader)(buf).get()
		ds = append(ds, delivery{b: bytes.Clone(buf[vnetHeaderSize:n]), gso: g})
	}
}

// resplitTaken takes what the TUN has written apart again as a kernel would.
func resplitTaken(t testing.TB, ds []delivery) (out [][]byte) {
	t.Helper()
	for i, d := range ds {
		if d.gso.Type == GSONone {
			if d.gso != (GSO{}) {
				t.Fatalf("packet %d: %+v", i, d.gso)
			}
			out = append(out, d.b)
			continue
		}
		l, _ := locate(d.b, len(d.b))
		g := d.gso
		if n, drop := g.complete(d.b, len(d.b)); drop != DropNone || n != l || g != d.gso {
			t.Fatalf("packet %d: %+v, of the headers %+v", i, d.gso, g)
		}
		out = append(out, split(t, d.b, d.gso, nil, nil)...)
	}
	return out
}

// withRoom copies packets to where Write finds them.
func withRoom(packets [][]byte) [][]byte {
	out := make([][]byte, len(packets))
	for i, b := range packets {
		out[i] = append(make([]byte, headroom), b...)
	}
	return out
}

// What is written comes out as superpackets that stand for the packets written, in order.
func TestTUNWrites(t *testing.T) {
	for seed := range uint64(40) {
		dev, kernel := pipeTUN(t, TUNOptions{NoGRO: seed%8 == 7})
		in := mixedFlows(seed, 5, 9000, 1000, nil)
		// One with a wrong checksum is the kernel's to judge.
		bad := bytes.Clone(in[0])
		bad[len(bad)-1]++
		if n, err := dev.Write(withRoom(append([][]byte{bad, {}, bad[:10]}, in...)), headroom); n != len(in)+3 || err != nil {
			t.Fatal(n, err)
		}
		ds := taken(t, kernel)
		got := resplitTaken(t, ds)
		if len(got) == 0 || !bytes.Equal(got[0], bad) {
			t.Fatal("the bad packet is not the first")
		}
		if err := sameStreams(got[1:], in); err != nil {
			t.Fatal(err)
		}
		s := dev.Stats().Inbound
		supers := uint64(0)
		for _, d := range ds {
			supers += uint64(b2i(d.gso.Type != GSONone))
		}
		if s.Packets != uint64(len(ds)) || s.Segments != uint64(len(in)+3) || s.Superpackets != supers || (supers == 0) != (seed%8 == 7) {
			t.Errorf("%+v for %d packets, %d of them super", s, len(ds), supers)
		}
		if d := dev.Drops(); d[DropMalformed] != 2 || d.Total() != 2 {
			t.Errorf("drops %v", d)
		}
	}
}

// A kernel that refuses superpackets gets the packets one by one, and after a while no more superpackets.
func TestTUNRefusals(t *testing.T) {
	dev, kernel := pipeTUN(t, TUNOptions{})
	refused := 0
	dev.writev = func(fd uintptr, vectors []unix.Iovec) unix.Errno {
		if h := vectors[0]; h.Len >= vnetHeaderSize && (*vnetHeader)(vectorBytes(h)).get().Type == GSOUDPL4 {
			if refused++; refused == 3 {
				return writev(fd, vectors) // one that passes ends the row
			}
			return unix.EINVAL
		}
		return writev(fd, vectors)
	}
	udp := spec{udp: true, payload: payload(3000)}
	tcp := spec{flags: ack, payload: payload(3000)}
	in := append(udp.plainSegments(1000), tcp.plainSegments(1000)...)
	for i := range 2 * refusals {
		if _, err := dev.Write(withRoom(in), headroom); err != nil {
			t.Fatal(err)
		}
		ds := taken(t, kernel)
		if err := sameStreams(resplitTaken(t, ds), in); err != nil {
			t.Fatal(i, err)
		}
		if n := len(ds); n != 4 && (n != 2 || i != 2) {
			t.Errorf("%d packets", n)
		}
	}
	if refused != 3+refusals || dev.groUDP.Load() || !dev.groTCP.Load() || dev.Capabilities().GROUDP.On {
		t.Errorf("%d refused, UDP GRO %v", refused, dev.groUDP.Load())
	}
	if d := dev.Drops(); d.Total() != 0 {
		t.Errorf("drops %v", d)
	}
}

// vectorBytes lends what v points to.
func vectorBytes(v unix.Iovec) []byte { return unsafe.Slice(v.Base, v.Len) }

// An interface that takes nothing costs the packets, counted, and not the tunnel.
func TestTUNWriteFails(t *testing.T) {
	dev, _ := pipeTUN(t, TUNOptions{})
	dev.writev = func(uintptr, []unix.Iovec) unix.Errno { return unix.EIO }
	tcp := spec{flags: ack, payload: payload(3000)}
	udp := spec{udp: true}
	in := append(tcp.plainSegments(1000), udp.full())
	if n, err := dev.Write(withRoom(in), headroom); n != 4 || err != nil {
		t.Error(n, err)
	}
	if d := dev.Drops(); d[DropKernel] != 4 || d.Total() != 4 {
		t.Errorf("drops %v", d)
	}
	if s := dev.Stats().Inbound; s.Packets != 0 || s.Segments != 4 {
		t.Errorf("%+v", s)
	}
}

// Close ends everything that goes on, and nothing else does.
func TestTUNCloseInUse(t *testing.T) {
	leavesNothing(t)
	for range 5 {
		dev, kernel := pipeTUN(t, TUNOptions{})
		s := spec{flags: ack, payload: payload(20000)}
		in, message := s.plainSegments(1360), append(vnetBytes(s.gso(1360)), s.partial()...)
		big := spec{udp: true, payload: payload(3000)}
		var wg sync.WaitGroup
		repeat := func(what string, f func() error) {
			wg.Go(func() {
				for {
					if err := f(); errors.Is(err, os.ErrClosed) {
						return
					} else if err != nil {
						t.Errorf("%s: %v", what, err)
						return
					}
				}
			})
		}
		bufs, sizes := buffers(dev.BatchSize(), 1500)
		repeat("read", func() error { _, err := dev.Read(bufs, sizes, headroom); return err })
		for range 3 {
			repeat("write", func() error { _, err := dev.Write(withRoom(in), headroom); return err })
		}
		repeat("kernel", func() error {
			buf := make([]byte, 70000)
			unix.Read(kernel, buf)
			if _, err := unix.Write(kernel, message); errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
				return os.ErrClosed
			}
			dev.TooBig(big.full(), 1300)
			return nil
		})
		time.Sleep(10 * time.Millisecond)
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
	}
}
