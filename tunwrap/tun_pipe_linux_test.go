package tunwrap

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pipeTUN is a TUN whose kernel is the test: every message on the socket kernel is a packet with its vnet
// header. It needs no privilege.
func pipeTUN(t testing.TB, o TUNOptions) (dev *TUN, kernel int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds { // a superpacket is larger than the default
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	dev = newTUN(o)
	dev.vnet = !o.NoVnetHdr
	dev.groTCP.Store(dev.vnet && !o.NoGRO)
	dev.groUDP.Store(dev.vnet && !o.NoGRO)
	if err := dev.poll(fds[:1]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close(); unix.Close(fds[1]) })
	return dev, fds[1]
}

// give has the kernel send a packet.
func give(t testing.TB, kernel int, g GSO, b []byte) {
	t.Helper()
	if _, err := unix.Write(kernel, append(vnetBytes(g), b...)); err != nil {
		t.Fatal(err)
	}
}

// readUntil reads until a packet equal to last has come, and returns those before it. The buffers have room bytes
// and guards around it.
func readUntil(t testing.TB, dev *TUN, batch, room int, last []byte) (out [][]byte) {
	t.Helper()
	const guard = 7
	const fill = 0xa5
	bufs, sizes := make([][]byte, batch), make([]int, batch)
	for i := range bufs {
		b := bytes.Repeat([]byte{fill}, headroom+room+guard)
		bufs[i] = b[:headroom+room]
	}
	for {
		n, err := dev.Read(bufs, sizes, headroom)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			t.Fatal("Read gave nothing")
		}
		for i, buf := range bufs {
			whole := buf[:cap(buf)]
			if i < n {
				b := buf[headroom : headroom+sizes[i]]
				if bytes.Equal(b, last) {
					if i != n-1 {
						t.Fatal("packets behind the last")
					}
					return out
				}
				out = append(out, bytes.Clone(b))
			}
			if bytes.Count(whole[:headroom], []byte{fill}) != headroom || bytes.Count(whole[headroom+room:headroom+room+guard], []byte{fill}) != guard {
				t.Fatalf("buffer %d: written outside", i)
			}
		}
	}
}

// sentinel is a packet that comes last.
func sentinel() []byte {
	s := spec{udp: true, sport: 0xdead, dport: 0xbeef, src: netip.MustParseAddr("192.0.2.1")}
	return s.full()
}

// Every superpacket comes out as the segments it stands for, whatever the number and size of
// the buffers, and whatever hdr_len says.
func TestTUNReads(t *testing.T) {
	for _, room := range []int{1400, 1401, 1500, 9000, 20000} {
		for _, batch := range []int{1, 2, 7, 128} {
			t.Run(fmt.Sprintf("room %d, batch %d", room, batch), func(t *testing.T) {
				dev, kernel := pipeTUN(t, TUNOptions{})
				var want [][]byte
				supers := uint64(0)
				n := uint64(0)
				for i, c := range segmentCases() {
					s := &c.spec
					if s.hdrLen()+min(c.size, len(s.payload)) > 1400 {
						continue
					}
					g := s.gso(c.size)
					g.CsumStart = uint16(s.l4Offset())
					g.HdrLen = uint16([]int{s.hdrLen(), 0, 20, 9000}[i%4])
					if s.flags&cwr != 0 && !s.udp && i%2 == 0 {
						g.Type |= GSOECN
					}
					give(t, kernel, g, s.partial())
					plain := s.plainSegments(c.size)
					want = append(want, plain...)
					supers += uint64(b2i(len(plain) > 1))
					n++
					// A plain packet between, with a checksum to finish, and one without.
					p := spec{udp: true, id: uint16(i), payload: payload(i)}
					g = GSO{NeedsCsum: true, CsumStart: uint16(p.l4Offset()), CsumOffset: udpChecksum}
					give(t, kernel, g, p.partial())
					give(t, kernel, GSO{}, p.full())
					want = append(want, p.full(), p.full())
					n += 2
					give(t, kernel, GSO{}, sentinel())
					n++
					got := readUntil(t, dev, batch, room, sentinel())
					if err := differ(got, want); err != nil {
						t.Fatalf("%s: %v", c.name, err)
					}
					want = want[:0]
				}
				if d := dev.Drops(); d.Total() != 0 {
					t.Errorf("drops %v", d)
				}
				if s := dev.Stats().Outbound; s.Packets != n || s.Superpackets != supers {
					t.Errorf("%+v, want %d packets, %d of them super", s, n, supers)
				}
			})
		}
	}
}

// Superpackets of several shapes, plain packets and some that do not pass, mixed: nothing is out of place.
func TestTUNReadsMixed(t *testing.T) {
	shapes := []struct {
		spec spec
		size int
	}{
		{spec: spec{flags: ack, tcpOptions: timestamps}, size: 1348},
		{spec: spec{flags: ack | psh | cwr, tcpOptions: timestamps, v6: true}, size: 1328},
		{spec: spec{flags: ack | fin}, size: 500},
		{spec: spec{udp: true}, size: 1200},
		{spec: spec{udp: true}}, // plain
		{spec: spec{flags: ack}, size: 1360},
	}
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		room, batch := 1400+rnd.IntN(3)*rnd.IntN(300), 1+rnd.IntN(150)
		dev, kernel := pipeTUN(t, TUNOptions{})
		if seed%4 == 3 {
			// One shape does not pass.
			f, err := NewFilter(FilterOptions{Rules: []FilterRule{{Protocol: "tcp"}}})
			if err != nil {
				t.Fatal(err)
			}
			dev.SetFilter(f)
		}
		shape := 0
		for range 30 {
			var want [][]byte
			for range 1 + rnd.IntN(4) {
				if rnd.IntN(4) == 0 {
					shape = rnd.IntN(len(shapes))
				}
				s := shapes[shape].spec
				s.sport, s.seq, s.id = uint16(rnd.IntN(3)), rnd.Uint32(), uint16(rnd.Uint32())
				g := s.gso(shapes[shape].size)
				if g.GSOSize == 0 {
					g.Type = GSONone
					s.payload = payload(rnd.IntN(1372))
				} else {
					s.payload = payload(1 + rnd.IntN([]int{60000, 5000, 2 * int(g.GSOSize)}[rnd.IntN(3)]))
				}
				g.CsumStart, g.HdrLen = uint16(s.l4Offset()), 60
				give(t, kernel, g, s.partial())
				switch {
				case s.udp && seed%4 == 3:
				case g.GSOSize == 0:
					want = append(want, s.full())
				default:
					want = append(want, s.plainSegments(int(g.GSOSize))...)
				}
			}
			last := spec{sport: 9, flags: ack, payload: []byte("last")}
			give(t, kernel, GSO{}, last.full())
			if err := differ(readUntil(t, dev, batch, room, last.full()), want); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		}
		if d := dev.Drops(); d.Total() != d[DropFilter] || (d[DropFilter] > 0) != (seed%4 == 3) {
			t.Errorf("drops %v", d)
		}
	}
}

// What makes no sense, or does not fit, is dropped and counted.
func TestTUNReadDrops(t *testing.T) {
	super := spec{flags: ack, payload: payload(5200)}
	plain := spec{udp: true, payload: payload(100)}
	df := super // its sender is told, of the first segment
	df.df = true
	for _, c := range []struct {
		name   string
		change func(*GSO)
		b      []byte
		want   Drop
		n      uint64
	}{
		{"no segment size", func(g *GSO) { g.GSOSize = 0 }, super.partial(), DropGSO, 1},
		{"the checksum elsewhere", func(g *GSO) { g.CsumStart = 60000 }, super.partial(), DropGSO, 1},
		{"the checksum field elsewhere", func(g *GSO) { g.CsumOffset = 6 }, super.partial(), DropGSO, 1},
		{"another protocol", func(g *GSO) { g.Type = GSOUDPL4 }, super.partial(), DropGSO, 1},
		{"another version", func(g *GSO) { g.Type = GSOTCPv6 }, super.partial(), DropGSO, 1},
		{"UFO", func(g *GSO) { g.Type = 3 }, super.partial(), DropGSO, 1},
		{"a short packet", func(*GSO) {}, super.partial()[:30], DropMalformed, 1},
		{"a longer packet", func(*GSO) {}, append(super.partial(), 0), DropGSO, 1},
		{"segments that do not fit", func(g *GSO) { g.GSOSize = 2600 }, df.partial(), DropOversize, 1},
		{"a checksum behind the end", func(g *GSO) { *g = GSO{NeedsCsum: true, CsumStart: 127, CsumOffset: 6} }, plain.partial(), DropGSO, 1},
		{"a checksum far behind the end", func(g *GSO) { *g = GSO{NeedsCsum: true, CsumStart: 65535, CsumOffset: 65535} }, plain.partial(), DropGSO, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			dev, kernel := pipeTUN(t, TUNOptions{})
			g := super.gso(1360)
			c.change(&g)
			give(t, kernel, g, c.b)
			give(t, kernel, GSO{}, sentinel())
			if got := readUntil(t, dev, 8, 1400, sentinel()); len(got) != 0 {
				t.Errorf("%d packets", len(got))
			}
			if d := dev.Drops(); d[c.want] != c.n || d.Total() != c.n {
				t.Errorf("drops %v, want %d for being %v", d, c.n, c.want)
			}
		})
	}
}

// An interface with a larger MTU than the tunnel's is no black hole: what does not fit is answered or fragmented.
func TestTUNReadTooLong(t *testing.T) {
	udp := spec{udp: true, payload: payload(3000)}
	df := udp
	df.df = true
	six := spec{v6: true, flags: ack, payload: payload(20000)}
	four := spec{flags: ack, payload: payload(20000)}
	for _, c := range []struct {
		name      string
		s         spec
		gso       int
		fragments int
	}{
		{"plain", df, 0, 0},
		{"larger than what is read to the buffer", spec{udp: true, df: true, payload: payload(30000)}, 0, 0},
		{"without DF", udp, 0, 3},
		{"superpacket", six, 8000, 0},
		{"superpacket without DF", four, 8000, 15},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, room := range []int{1400, 17000} {
				dev, kernel := pipeTUN(t, TUNOptions{})
				g := GSO{NeedsCsum: true, CsumStart: uint16(c.s.l4Offset()), CsumOffset: udpChecksum}
				if c.gso > 0 {
					g = c.s.gso(c.gso)
				}
				give(t, kernel, g, c.s.partial())
				give(t, kernel, GSO{}, sentinel())
				got := readUntil(t, dev, 20, room, sentinel())
				if err := dev.drained(t, room, c.fragments, &got); err != nil {
					t.Fatal(err)
				}
				told := taken(t, kernel)
				if fits := len(c.s.full()) <= room || c.gso > 0 && c.gso+60 <= room; fits {
					if len(told) > 0 || dev.Drops() != (Drops{}) {
						t.Errorf("room %d: %d messages, drops %v", room, len(told), dev.Drops())
					}
					continue
				}
				if len(told) != b2i(c.fragments == 0) || len(got) != c.fragments {
					t.Fatalf("room %d: %d messages, %d fragments", room, len(told), len(got))
				}
				for _, m := range told {
					if err := valid(m.b); err != nil {
						t.Error(err)
					}
					l, _ := locate(m.b, len(m.b))
					mtu := int(be16(m.b, l.l4+6))
					inner := m.b[l.l4+8:]
					if mtu != room || !bytes.Equal(inner[l.l4:][:8], c.s.full()[l.l4:][:8]) && !c.s.udp {
						t.Errorf("MTU %d, about %x", mtu, inner[:60])
					}
				}
				if d := dev.Drops(); d.Total() != d[DropOversize] || d[DropOversize] != uint64(2*b2i(c.gso > 0 && c.fragments == 0)) {
					t.Errorf("room %d: drops %v", room, d)
				}
			}
		})
	}
}

// drained reads the fragments that were left for the next Read.
func (t *TUN) drained(tb testing.TB, room, fragments int, got *[][]byte) error {
	if len(t.readers[0].pending) == 0 {
		return nil
	}
	t.mustPend(sentinel())
	*got = append(*got, readUntil(tb, t, 20, room, sentinel())...)
	if len(*got) != fragments {
		return fmt.Errorf("%d fragments", len(*got))
	}
	return nil
}

// The checksum that the kernel leaves to us may be that of a packet inside another; NAT changes the
// outer one.
func TestTUNReadInnerChecksum(t *testing.T) {
	inner := spec{v6: true, udp: true, payload: payload(77)}
	outer := spec{udp: true, dport: 4789, payload: inner.full()}
	want := outer
	want.src = netip.MustParseAddr("172.31.255.1")
	b := outer.full()
	copy(b[outer.hdrLen():], inner.partial()) // as the kernel has it: the outer checksum is right already
	dev, kernel := pipeTUN(t, TUNOptions{})
	if err := dev.SetNAT([]NATRule{rule("10.0.0.1", "172.31.255.1", "10.0.0.0/24")}); err != nil {
		t.Fatal(err)
	}
	give(t, kernel, GSO{NeedsCsum: true, CsumStart: uint16(outer.hdrLen() + inner.l4Offset()), CsumOffset: udpChecksum}, b)
	give(t, kernel, GSO{}, sentinel())
	got := readUntil(t, dev, 8, 1400, sentinel())
	if err := differ(got, [][]byte{want.full()}); err != nil {
		t.Error(err)
	}
}

// Fragments of a packet that was too big come out of Read, also of one that waits.
func TestTUNFragments(t *testing.T) {
	dev, _ := pipeTUN(t, TUNOptions{})
	big := spec{udp: true, payload: payload(3000)}
	go func() {
		time.Sleep(20 * time.Millisecond)
		dev.TooBig(big.full(), 1300)
		last := sentinel()
		dev.mustPend(last)
	}()
	got := readUntil(t, dev, 2, 1400, sentinel())
	if len(got) != 3 {
		t.Fatalf("%d fragments", len(got))
	}
	var whole []byte
	for i, f := range got {
		l, d := locate(f, len(f))
		if d != DropNone || !l.fragment || len(f) > 1300 || sumOf(f[:20]) != 0xffff {
			t.Errorf("fragment %d: %+v %v", i, l, d)
		}
		whole = append(whole, f[20:]...)
	}
	if !bytes.Equal(whole, big.full()[20:]) {
		t.Error("the fragments are not the packet")
	}
	if s := dev.Stats(); s.Fragments != 3 || s.Outbound.Segments != 4 {
		t.Errorf("%+v", s)
	}
	// Nobody reads: the queue has an end.
	for range 200 {
		dev.TooBig(big.full(), 1300)
	}
	if d := dev.Drops(); d[DropTooBig] != 200-maxPending/3 {
		t.Errorf("drops %v", d)
	}
}

// mustPend leaves a packet to the reader like a fragment.
func (t *TUN) mustPend(b []byte) {
	r := t.readers[0]
	r.mu.Lock()
	r.pending = append(r.pending, b)
	r.mu.Unlock()
	_ = r.q.file.SetReadDeadline(time.Unix(1, 0))
}
