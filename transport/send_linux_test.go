package transport

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernelModel stands in for sendmmsg: it refuses what it is told to, and otherwise
// delivers what the headers describe. It reads control messages with x/sys, not
// with the code under test.
type kernelModel struct {
	t   testing.TB
	rng *rand.Rand // nil: no random answers

	refuseGSO  unix.Errno // for messages with UDP_SEGMENT; 0 takes them
	mtu        int        // EMSGSIZE above it, in UDP payload; 0: none
	oldKernel  bool       // EINVAL instead of EMSGSIZE for segmented messages
	goneSource netip.Addr // goneErrno for messages from it
	goneErrno  unix.Errno

	script []unix.Errno // answers of the next calls, before anything else; 0: as usual
	short  []int        // the next usual calls take no more messages than this

	calls     int
	delivered []delivery
}

type delivery struct {
	remote   netip.AddrPort
	local    netip.Addr
	payloads [][]byte
	gso      bool
}

func (k *kernelModel) install(s *UDPSocket) { s.sys.sendmmsg = k.sendmmsg }

func (k *kernelModel) sendmmsg(_ uintptr, msgs []mmsghdr) (int, unix.Errno) {
	k.calls++
	if len(k.script) > 0 {
		errno := k.script[0]
		k.script = k.script[1:]
		if errno != 0 {
			return -1, errno
		}
	}
	take := len(msgs)
	if len(k.short) > 0 {
		take = min(take, k.short[0])
		k.short = k.short[1:]
	}
	if k.rng != nil {
		switch k.rng.IntN(8) {
		case 0:
			return -1, unix.EINTR
		case 1, 2:
			take = 1 + k.rng.IntN(take)
		}
	}
	for i := range msgs[:take] {
		d := k.decode(&msgs[i])
		if errno := k.judge(&d); errno != 0 {
			if i == 0 {
				return -1, errno
			}
			return i, 0
		}
		k.delivered = append(k.delivered, d)
	}
	return take, 0
}

func (k *kernelModel) judge(d *delivery) unix.Errno {
	switch {
	case d.local.IsValid() && d.local == k.goneSource:
		return k.goneErrno
	case d.gso && k.refuseGSO != 0:
		return k.refuseGSO
	case k.mtu > 0 && len(d.payloads[0]) > k.mtu && d.gso && k.oldKernel:
		return unix.EINVAL
	case k.mtu > 0 && len(d.payloads[0]) > k.mtu:
		return unix.EMSGSIZE
	}
	return 0
}

func (k *kernelModel) decode(m *mmsghdr) delivery {
	k.t.Helper()
	var payload []byte
	for _, v := range unsafe.Slice(m.hdr.Iov, m.hdr.Iovlen) {
		payload = append(payload, unsafe.Slice(v.Base, v.Len)...)
	}
	d := delivery{remote: k.remote(m), payloads: [][]byte{payload}}
	control, err := unix.ParseSocketControlMessage(unsafe.Slice(m.hdr.Control, m.hdr.Controllen))
	if err != nil {
		k.t.Fatalf("control: %v", err)
	}
	for _, c := range control {
		switch {
		case c.Header.Level == unix.SOL_UDP && c.Header.Type == unix.UDP_SEGMENT && len(c.Data) >= 2:
			size := int(binary.NativeEndian.Uint16(c.Data))
			d.gso = true
			d.payloads = nil
			for b := payload; len(b) > 0; {
				n := min(size, len(b))
				d.payloads = append(d.payloads, b[:n])
				b = b[n:]
			}
			if len(d.payloads) < 2 {
				k.t.Fatalf("UDP_SEGMENT %d on %d bytes", size, len(payload))
			}
		case c.Header.Level == unix.SOL_IP && c.Header.Type == unix.IP_PKTINFO:
			d.local = netip.AddrFrom4([4]byte(c.Data[4:8]))
		case c.Header.Level == unix.SOL_IPV6 && c.Header.Type == unix.IPV6_PKTINFO:
			d.local = netip.AddrFrom16([16]byte(c.Data[:16]))
		default:
			k.t.Fatalf("control message %+v", c.Header)
		}
	}
	return d
}

func (k *kernelModel) remote(m *mmsghdr) netip.AddrPort {
	name := unsafe.Slice(m.hdr.Name, m.hdr.Namelen)
	port := binary.BigEndian.Uint16(name[2:])
	switch family := binary.NativeEndian.Uint16(name); {
	case family == unix.AF_INET && len(name) == 16:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(name[4:8])), port)
	case family == unix.AF_INET6 && len(name) == 28:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(name[8:24])).Unmap(), port)
	default:
		k.t.Fatalf("address family %d in %d bytes", family, len(name))
		panic("unreachable")
	}
}

// payloads are those of all deliveries in order.
func (k *kernelModel) payloads() (all [][]byte) {
	for _, d := range k.delivered {
		all = append(all, d.payloads...)
	}
	return all
}

var testRemote = netip.MustParseAddrPort("192.0.2.1:4433")

// scripted is a socket over a kernelModel, and runs of the given numbers of segments of
// 100 bytes with a shorter last one.
func scripted(t testing.TB, k *kernelModel, counts ...int) (*UDPSocket, []Run) {
	s := testSocket(t, "0.0.0.0:0", SocketOptions{})
	if !s.Capabilities().GSO.On {
		s.gso.Store(true) // the model has it
		s.maxSegments = MaxRunSegments
	}
	k.t = t
	k.install(s)
	rng := rand.New(rand.NewPCG(3, 4))
	var serial uint32
	var runs []Run
	for i, n := range counts {
		runs = append(runs, Run{Remote: testRemote, Segments: randomRun(rng, &serial, n, 100, 60, i%2 == 0)})
	}
	return s, runs
}

func wantDelivered(t *testing.T, k *kernelModel, runs []Run) {
	t.Helper()
	var want [][]byte
	for _, r := range runs {
		want = append(want, r.Segments...)
	}
	got := k.payloads()
	for i := range min(len(got), len(want)) {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("datagram %d of %d bytes is not the one sent, of %d bytes", i, len(got[i]), len(want[i]))
		}
	}
	if len(got) != len(want) {
		t.Fatalf("%d datagrams delivered, want %d", len(got), len(want))
	}
}

func TestRunsShareOneSystemCall(t *testing.T) {
	k := &kernelModel{}
	s, runs := scripted(t, k, 45, 64, 1, 2, 63)
	if n, err := s.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatal(n, err)
	}
	wantDelivered(t, k, runs)
	if k.calls != 1 || len(k.delivered) != len(runs) {
		t.Errorf("%d calls with %d messages, want 1 with %d", k.calls, len(k.delivered), len(runs))
	}
}

// TestContiguousSegmentsShareAVector: what touches in memory is one iovec.
func TestContiguousSegmentsShareAVector(t *testing.T) {
	s, _ := scripted(t, &kernelModel{})
	arena := make([]byte, 1000)
	for _, c := range []struct {
		name     string
		segments [][]byte
		vectors  int
	}{
		{"touching", [][]byte{arena[0:100], arena[100:200], arena[200:300]}, 1},
		{"a gap", [][]byte{arena[0:100], arena[100:200], arena[201:301]}, 2},
		{"out of order", [][]byte{arena[100:200], arena[0:100]}, 2},
		{"the same twice", [][]byte{arena[0:100], arena[0:100]}, 2},
	} {
		vectors := 0
		s.sys.sendmmsg = func(_ uintptr, msgs []mmsghdr) (int, unix.Errno) {
			vectors = int(msgs[0].hdr.Iovlen)
			return len(msgs), 0
		}
		if _, err := s.WriteBatch([]Run{{Remote: testRemote, Segments: c.segments}}); err != nil {
			t.Fatal(err)
		}
		if vectors != c.vectors {
			t.Errorf("%s: %d vectors, want %d", c.name, vectors, c.vectors)
		}
	}
}

func TestShortWritesAndInterrupts(t *testing.T) {
	k := &kernelModel{
		script: []unix.Errno{unix.EINTR, unix.EINTR, 0, unix.EAGAIN, 0, unix.EINTR, 0},
		short:  []int{1, 2, 1},
	}
	s, runs := scripted(t, k, 10, 3, 64, 1, 7, 2)
	if n, err := s.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatal(n, err)
	}
	wantDelivered(t, k, runs)
	if st := s.Stats(); st.SendWaits != 1 || st.Runs != 6 || st.DatagramsOut != 87 {
		t.Errorf("stats %+v", st)
	}
}

// TestGSORefused: the run that was refused goes out plainly, once, and so does what
// follows; this is logged once.
func TestGSORefused(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EIO, unix.EINVAL, unix.EOPNOTSUPP} {
		t.Run(errno.Error(), func(t *testing.T) {
			var log strings.Builder
			k := &kernelModel{refuseGSO: errno}
			s, runs := scripted(t, k, 0, 45, 0, 1, 2, 64)
			s.logger = slog.New(slog.NewTextHandler(&log, nil))
			for range 2 {
				k.delivered = nil
				if n, err := s.WriteBatch(runs); n != len(runs) || err != nil {
					t.Fatal(n, err)
				}
				wantDelivered(t, k, runs)
			}
			c := s.Capabilities()
			if c.GSO.On || !strings.Contains(c.GSO.Reason, errno.Error()) || c.MaxSegments != 1 {
				t.Errorf("capabilities %+v", c)
			}
			if n := strings.Count(log.String(), "\n"); n != 1 {
				t.Errorf("%d log lines: %s", n, log.String())
			}
			if st := s.Stats(); st.GSOResent != 1 || st.DropSendError != 0 {
				t.Errorf("stats %+v", st)
			}
		})
	}
}

// TestGSOKept: errors that say nothing about GSO leave it on, and the caller goes on
// behind the run that was given up.
func TestGSOKept(t *testing.T) {
	for _, c := range []struct {
		errno unix.Errno
		is    error
		drops func(SocketStats) uint64
	}{
		{unix.EMSGSIZE, ErrDatagramTooBig, func(s SocketStats) uint64 { return s.DropTooBig }},
		{unix.ENOBUFS, unix.ENOBUFS, func(s SocketStats) uint64 { return s.DropNoBuffers }},
		{unix.EPERM, unix.EPERM, func(s SocketStats) uint64 { return s.DropSendError }},
		{unix.ENETUNREACH, unix.ENETUNREACH, func(s SocketStats) uint64 { return s.DropSendError }},
		{unix.EHOSTUNREACH, unix.EHOSTUNREACH, func(s SocketStats) uint64 { return s.DropSendError }},
		{unix.ECONNREFUSED, unix.ECONNREFUSED, func(s SocketStats) uint64 { return s.DropSendError }},
		{unix.ENETDOWN, unix.ENETDOWN, func(s SocketStats) uint64 { return s.DropSendError }},
	} {
		t.Run(c.errno.Error(), func(t *testing.T) {
			k := &kernelModel{script: []unix.Errno{0, c.errno}, short: []int{2}}
			s, runs := scripted(t, k, 45, 3, 20, 4)
			n, err := s.WriteBatch(runs)
			if n != 2 || !errors.Is(err, c.is) {
				t.Fatalf("WriteBatch: %d, %v; want 2 and %v", n, err, c.is)
			}
			if m, err := s.WriteBatch(runs[n+1:]); m != 1 || err != nil {
				t.Fatalf("the rest: %d, %v", m, err)
			}
			wantDelivered(t, k, []Run{runs[0], runs[1], runs[3]})
			if !s.gso.Load() {
				t.Error("GSO was withdrawn")
			}
			if d := c.drops(s.Stats()); d != 20 {
				t.Errorf("%d drops counted, want 20: %+v", d, s.Stats())
			}
		})
	}
}

// TestOldKernelTooBig: before Linux 6.15 or so a segmented message above the MTU is
// EINVAL. It must end as ErrDatagramTooBig with GSO on.
func TestOldKernelTooBig(t *testing.T) {
	k := &kernelModel{mtu: 99, oldKernel: true}
	s, runs := scripted(t, k, 5)
	if n, err := s.WriteBatch(runs); n != 0 || err != ErrDatagramTooBig {
		t.Fatalf("WriteBatch: %d, %v", n, err)
	}
	if !s.gso.Load() || len(k.delivered) != 0 {
		t.Errorf("GSO %v, %d delivered", s.gso.Load(), len(k.delivered))
	}
}

// TestSourceGone: an address the host no longer has does not stop the run, nor GSO.
func TestSourceGone(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EINVAL, unix.ENETUNREACH} {
		gone, kept := netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("192.0.2.201")
		k := &kernelModel{goneSource: gone, goneErrno: errno}
		s, runs := scripted(t, k, 5, 6, 7)
		runs[0].Local, runs[1].Local, runs[2].Local = kept, gone, kept
		if n, err := s.WriteBatch(runs); n != 3 || err != nil {
			t.Fatal(n, err)
		}
		wantDelivered(t, k, runs)
		if len(k.delivered) != 3 || k.delivered[0].local != kept || k.delivered[1].local.IsValid() || k.delivered[2].local != kept {
			t.Errorf("delivered from %+v", k.delivered)
		}
		if !s.gso.Load() || s.Stats().SourceLost != 1 {
			t.Errorf("GSO %v, stats %+v", s.gso.Load(), s.Stats())
		}
	}
}

// TestUnreachableWithSource: the network being gone is not the source being gone.
func TestUnreachableWithSource(t *testing.T) {
	k := &kernelModel{script: []unix.Errno{unix.ENETUNREACH, unix.ENETUNREACH}}
	s, runs := scripted(t, k, 5)
	runs[0].Local = netip.MustParseAddr("192.0.2.201")
	if n, err := s.WriteBatch(runs); n != 0 || !errors.Is(err, unix.ENETUNREACH) {
		t.Fatal(n, err)
	}
	if st := s.Stats(); st.SourceLost != 0 || st.DropSendError != 5 || k.calls != 2 {
		t.Errorf("%d calls, stats %+v", k.calls, st)
	}
}

// TestFullSendBuffer: EAGAIN sleeps in the poller until the socket has room, and
// until Close at the latest.
func TestFullSendBuffer(t *testing.T) {
	start := func(t *testing.T) (s *UDPSocket, full *atomic.Bool, result chan error) {
		k := &kernelModel{}
		s, runs := scripted(t, k, 3)
		full, result = new(atomic.Bool), make(chan error, 1)
		full.Store(true)
		s.sys.sendmmsg = func(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
			if full.Load() {
				return -1, unix.EAGAIN
			}
			return k.sendmmsg(fd, msgs)
		}
		go func() {
			_, err := s.WriteBatch(runs)
			result <- err
		}()
		select {
		case err := <-result:
			t.Fatalf("WriteBatch did not wait: %v", err)
		case <-time.After(30 * time.Millisecond):
		}
		return s, full, result
	}
	end := func(t *testing.T, result chan error, want error) {
		t.Helper()
		select {
		case err := <-result:
			if err != want {
				t.Errorf("WriteBatch: %v, want %v", err, want)
			}
		case <-time.After(5 * time.Second):
			t.Error("WriteBatch sleeps on")
		}
	}
	t.Run("room", func(t *testing.T) {
		s, full, result := start(t)
		full.Store(false)
		// A real datagram leaving the send buffer is what the poller hears of.
		if err := s.raw.Control(func(fd uintptr) {
			to := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(s.LocalAddr().Port())}
			if err := unix.Sendto(int(fd), []byte{1}, 0, to); err != nil {
				t.Error(err)
			}
		}); err != nil {
			t.Fatal(err)
		}
		end(t, result, nil)
	})
	t.Run("close", func(t *testing.T) {
		s, _, result := start(t)
		s.Close()
		end(t, result, net.ErrClosed)
	})
}

// FuzzWriteBatch sends random batches into a kernel that answers at random: every run
// that WriteBatch does not report is delivered once, whole, in order and from its
// address; of one that it does report, no more than a start.
func FuzzWriteBatch(f *testing.F) {
	for seed := range uint64(24) {
		f.Add(seed, uint8(seed), uint8(seed>>2))
	}
	f.Fuzz(func(t *testing.T, seed uint64, refusal, caps uint8) {
		rng := rand.New(rand.NewPCG(seed, 5))
		k := &kernelModel{t: t, rng: rng, goneSource: netip.MustParseAddr("192.0.2.200")}
		k.goneErrno = []unix.Errno{unix.EINVAL, unix.ENETUNREACH}[refusal>>5&1]
		k.refuseGSO = []unix.Errno{0, 0, unix.EIO, unix.EINVAL, unix.EOPNOTSUPP}[refusal%5]
		k.oldKernel = refusal&0x40 != 0
		if refusal&0x80 != 0 {
			k.mtu = 1200
		}
		s := fuzzSocket(t)
		s.gso.Store(true)
		s.maxSegments, s.maxBytes = 1+int(caps)%maxSegments, MaxRunBytes>>(caps%4)
		k.install(s)

		runs := fuzzRuns(rng, k.goneSource)
		reported := make([]bool, len(runs))
		for at := 0; at < len(runs); {
			n, err := s.WriteBatch(runs[at:])
			at += n
			switch {
			case err == nil && at != len(runs):
				t.Fatalf("stopped at %d of %d without an error", at, len(runs))
			case err == ErrDatagramTooBig && k.mtu > 0 && len(runs[at].Segments[0]) > k.mtu:
				reported[at] = true
			case err != nil:
				t.Fatalf("run %d: %v", at, err)
			}
			at++
		}
		checkDelivered(t, k, s, runs, reported)
		if withdrawn := !s.gso.Load(); withdrawn && k.refuseGSO == 0 {
			t.Fatal("GSO withdrawn though the kernel takes it")
		}
	})
}

// checkDelivered walks the deliveries along the runs.
func checkDelivered(t *testing.T, k *kernelModel, s *UDPSocket, runs []Run, reported []bool) {
	left := k.delivered
	for i, run := range runs {
		segments := run.Segments
		for len(segments) > 0 && len(left) > 0 {
			d := left[0]
			if reported[i] && !bytes.Equal(d.payloads[0], segments[0]) {
				break // given up here
			}
			size := 0
			for j, p := range d.payloads {
				size += len(p)
				if j == len(segments) || !bytes.Equal(p, segments[j]) {
					t.Fatalf("run %d: a datagram that is not the next one", i)
				}
			}
			if len(d.payloads) > 1 && (len(d.payloads) > s.maxSegments || size > s.maxBytes) {
				t.Fatalf("run %d: a message of %d segments, %d bytes", i, len(d.payloads), size)
			}
			if d.remote != run.Remote || d.local != run.Local && run.Local != k.goneSource && k.refuseGSO != unix.EINVAL {
				t.Fatalf("run %d: from %v to %v, want %v to %v", i, d.local, d.remote, run.Local, run.Remote)
			}
			segments, left = segments[len(d.payloads):], left[1:]
		}
		if len(segments) > 0 && !reported[i] {
			t.Fatalf("run %d: %d of %d segments are missing", i, len(segments), len(run.Segments))
		}
	}
	if len(left) > 0 {
		t.Fatalf("%d messages too many", len(left))
	}
}

// fuzzRuns makes up to 90 runs of distinct segments.
func fuzzRuns(rng *rand.Rand, gone netip.Addr) []Run {
	remotes := []netip.AddrPort{testRemote, netip.MustParseAddrPort("198.51.100.9:1")}
	locals := []netip.Addr{{}, {}, gone, netip.MustParseAddr("192.0.2.201")}
	var serial uint32
	runs := make([]Run, rng.IntN(90))
	for i := range runs {
		runs[i].Remote = remotes[rng.IntN(len(remotes))]
		runs[i].Local = locals[rng.IntN(len(locals))]
		count, size := rng.IntN(maxSegments+1), 4+rng.IntN(1500)
		if rng.IntN(4) > 0 {
			count = rng.IntN(5)
		}
		if count > 0 {
			runs[i].Segments = randomRun(rng, &serial, count, size, 4+rng.IntN(size-3), rng.IntN(2) == 0)
		}
	}
	return runs
}

// fuzzSocket is a fresh socket without the probing, which a fuzzer does not need.
func fuzzSocket(t testing.TB) *UDPSocket {
	lc := net.ListenConfig{}
	pc, err := lc.ListenPacket(context.Background(), "udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	s := &UDPSocket{conn: pc.(*net.UDPConn), logger: slog.New(slog.DiscardHandler)}
	if s.raw, err = s.conn.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	s.sourced = true
	return s
}
