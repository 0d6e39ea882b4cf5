package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// testSocket skips the test on a host without IPv6 when it needs that.
func testSocket(t testing.TB, addr string, opts SocketOptions) *UDPSocket {
	t.Helper()
	s, err := ListenUDP(netip.MustParseAddrPort(addr), opts)
	if err != nil && addr[0] == '[' && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
		t.Skipf("SKIPPED: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// reach is the address under which a socket on all addresses is reached at host.
func reach(host string, s *UDPSocket) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(host), s.LocalAddr().Port())
}

type gotDatagram struct {
	payload []byte
	remote  netip.AddrPort
	local   netip.Addr
}

// inboundBatch makes elements with buffers of size bytes.
func inboundBatch(n, size int) []Inbound {
	batch := make([]Inbound, n)
	for i := range batch {
		batch[i].Buf = make([]byte, size)
	}
	return batch
}

// receiveN reads until n datagrams are there. A socket that stays silent for 10 s
// is closed, and the test fails.
func receiveN(t testing.TB, s *UDPSocket, n int) []gotDatagram {
	t.Helper()
	watchdog := time.AfterFunc(10*time.Second, func() { s.Close() })
	defer watchdog.Stop()
	batch := inboundBatch(8, 64<<10)
	var got []gotDatagram
	for len(got) < n {
		m, err := s.ReadBatch(batch)
		if err != nil {
			t.Fatalf("after %d of %d datagrams: %v; stats %+v", len(got), n, err, s.Stats())
		}
		if m < 1 {
			t.Fatalf("ReadBatch returned %d, nil", m)
		}
		for _, in := range batch[:m] {
			got = append(got, splitInbound(t, in)...)
		}
	}
	return got
}

// splitInbound cuts a receive into its datagrams.
func splitInbound(t testing.TB, in Inbound) []gotDatagram {
	t.Helper()
	if in.N == 0 {
		return []gotDatagram{{nil, in.Remote, in.Local}}
	}
	if in.SegmentSize < 1 || in.SegmentSize > in.N {
		t.Fatalf("SegmentSize %d of N %d", in.SegmentSize, in.N)
	}
	var ds []gotDatagram
	for b := in.Buf[:in.N]; len(b) > 0; {
		n := min(in.SegmentSize, len(b))
		ds = append(ds, gotDatagram{bytes.Clone(b[:n]), in.Remote, in.Local})
		b = b[n:]
	}
	return ds
}

// randomRun makes count segments of size bytes, the last of tail bytes; each begins
// with its serial number if it is long enough for one. Without gaps they lie one
// after the other in memory.
func randomRun(rng *rand.Rand, serial *uint32, count, size, tail int, gaps bool) [][]byte {
	stride := size
	if gaps {
		stride++
	}
	arena := make([]byte, count*stride)
	for i := range arena {
		arena[i] = byte(rng.Uint32())
	}
	var segments [][]byte
	for i := range count {
		n := size
		if i == count-1 {
			n = tail
		}
		s := arena[i*stride:][:n:n]
		if n >= 4 {
			binary.BigEndian.PutUint32(s, *serial)
		}
		*serial++
		segments = append(segments, s)
	}
	return segments
}

var loopbackPaths = []struct{ name, from, fromHost, to, toHost string }{
	{"v4", "127.0.0.1:0", "127.0.0.1", "127.0.0.1:0", "127.0.0.1"},
	{"v6", "[::1]:0", "::1", "[::1]:0", "::1"},
	{"v4 to all v4", "127.0.0.1:0", "127.0.0.1", "0.0.0.0:0", "127.0.0.1"},
	{"v4 to dual", "127.0.0.1:0", "127.0.0.1", "[::]:0", "127.0.0.1"},
	{"dual to v4", "[::]:0", "127.0.0.1", "127.0.0.1:0", "127.0.0.1"},
	{"dual to dual by v6", "[::]:0", "::1", "[::]:0", "::1"},
}

var runShapes = []struct{ count, size, tail int }{
	{1, 1438, 1438}, {1, 4, 4}, {2, 1438, 1438}, {2, 1438, 4}, {45, 1438, 1438}, {45, 1438, 700},
	{63, 1000, 1000}, {64, 1000, 1000}, {64, 1000, 999}, {64, 8, 8},
	{100, 600, 500}, // more than MaxRunSegments: split by the socket
	{2, 32700, 32700}, {2, 40000, 40000}, {1, 65000, 65000},
}

// TestLoopback sends random runs of many shapes over each path with each offload
// on and off, and wants every datagram once with its bytes and addresses.
func TestLoopback(t *testing.T) {
	for _, path := range loopbackPaths {
		for _, opts := range []SocketOptions{{}, {DisableGSO: true}, {DisableGRO: true}, {DisableGSO: true, DisableGRO: true}, {MaxSegments: 7, MaxBytes: 5000}} {
			name := fmt.Sprintf("%s/gso=%v,gro=%v,cap=%d", path.name, !opts.DisableGSO, !opts.DisableGRO, opts.MaxSegments)
			t.Run(name, func(t *testing.T) {
				from, to := testSocket(t, path.from, opts), testSocket(t, path.to, opts)
				testRuns(t, from, to, reach(path.fromHost, from), reach(path.toHost, to))
			})
		}
	}
}

func testRuns(t *testing.T, from, to *UDPSocket, fromAddr, toAddr netip.AddrPort) {
	rng := rand.New(rand.NewPCG(1, 2))
	var serial uint32
	var runs []Run
	want := map[string]bool{}
	for i, shape := range runShapes {
		segments := randomRun(rng, &serial, shape.count, shape.size, shape.tail, i%2 == 1)
		runs = append(runs, Run{Remote: toAddr, Segments: segments})
		for _, s := range segments {
			want[string(s)] = true
		}
	}
	if len(want) != int(serial) {
		t.Fatal("the segments are not distinct")
	}
	before := make([]byte, 0, 64)
	for _, r := range runs {
		before = append(before, r.Segments[0][0])
	}
	if n, err := from.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatalf("WriteBatch: %d of %d, %v", n, len(runs), err)
	}
	for _, d := range receiveN(t, to, len(want)) {
		if !want[string(d.payload)] {
			t.Fatalf("a datagram of %d bytes that was not sent, or twice", len(d.payload))
		}
		delete(want, string(d.payload))
		if d.remote != fromAddr {
			t.Fatalf("remote %v, want %v", d.remote, fromAddr)
		}
		if hasSourceAddress(to) && d.local != toAddr.Addr() {
			t.Fatalf("local %v, want %v", d.local, toAddr.Addr())
		}
	}
	for i, r := range runs {
		if r.Segments[0][0] != before[i] {
			t.Fatal("WriteBatch changed a segment")
		}
	}
	out, in := from.Stats(), to.Stats()
	if out.DatagramsOut != uint64(serial) || in.DatagramsIn != uint64(serial) || out.BytesOut != in.BytesIn || out.Runs != uint64(len(runs)) {
		t.Errorf("stats do not agree: out %+v, in %+v", out, in)
	}
}

func hasSourceAddress(s *UDPSocket) bool {
	return s.Capabilities().SourceAddress.On
}

func TestEmptyDatagramAndEmptyRun(t *testing.T) {
	from, to := testSocket(t, "127.0.0.1:0", SocketOptions{}), testSocket(t, "127.0.0.1:0", SocketOptions{})
	runs := []Run{
		{Remote: to.LocalAddr()}, // nothing: counts as sent
		{Remote: to.LocalAddr(), Segments: [][]byte{{}}},
		{Remote: to.LocalAddr(), Segments: [][]byte{nil, nil}},
		{Remote: to.LocalAddr(), Segments: [][]byte{[]byte("ab"), []byte("cd"), {}}}, // no segmented send can end in an empty one
		{Remote: to.LocalAddr(), Segments: [][]byte{[]byte("e"), []byte("longer than the first")}},
		{},
	}
	if n, err := from.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatalf("WriteBatch: %d, %v", n, err)
	}
	count := map[string]int{}
	for _, d := range receiveN(t, to, 8) {
		count[string(d.payload)]++
	}
	want := map[string]int{"": 4, "ab": 1, "cd": 1, "e": 1, "longer than the first": 1}
	if fmt.Sprint(count) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", count, want)
	}
}

func TestTruncatedReceiveIsDropped(t *testing.T) {
	// Without GSO, so that each is a datagram to the receiving socket too.
	from, to := testSocket(t, "127.0.0.1:0", SocketOptions{DisableGSO: true}), testSocket(t, "127.0.0.1:0", SocketOptions{DisableGRO: true})
	var sent []string
	var segments [][]byte
	for i := range 10 {
		s := []byte(fmt.Sprintf("datagram %d", i))
		if i%3 == 0 {
			s = append(s, bytes.Repeat([]byte{'x'}, 500)...)
		} else {
			sent = append(sent, string(s))
		}
		segments = append(segments, s)
	}
	for _, s := range segments {
		if _, err := from.WriteBatch([]Run{{Remote: to.LocalAddr(), Segments: [][]byte{s}}}); err != nil {
			t.Fatal(err)
		}
	}
	watchdog := time.AfterFunc(10*time.Second, func() { to.Close() })
	defer watchdog.Stop()
	batch := inboundBatch(4, 100)
	got := map[string]bool{}
	for len(got) < len(sent) {
		n, err := to.ReadBatch(batch)
		if err != nil {
			t.Fatal(err)
		}
		for _, in := range batch[:n] {
			got[string(in.Buf[:in.N])] = true
		}
		seen := map[*byte]bool{}
		for _, in := range batch {
			seen[&in.Buf[0]] = true
		}
		if len(seen) != len(batch) {
			t.Fatal("two elements share a buffer")
		}
	}
	for _, s := range sent {
		if !got[s] {
			t.Errorf("%q is missing", s)
		}
	}
	// The last one sent is among those too big: it is not waited for.
	if d := to.Stats().DropTruncated; d < 3 || d > 4 {
		t.Errorf("DropTruncated = %d, want 3 or 4", d)
	}
}

func TestCloseWakesReadBatch(t *testing.T) {
	defer goleak.VerifyNone(t)
	s, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error)
	go func() {
		_, err := s.ReadBatch(inboundBatch(4, 2048))
		result <- err
	}()
	time.Sleep(20 * time.Millisecond) // let it block; closing before is right too
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-result:
		if err != net.ErrClosed {
			t.Errorf("ReadBatch: %v, want net.ErrClosed", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("ReadBatch sleeps on")
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := s.ReadBatch(inboundBatch(1, 100)); err != net.ErrClosed {
		t.Errorf("ReadBatch after Close: %v", err)
	}
	if n, err := s.WriteBatch([]Run{{Remote: s.LocalAddr(), Segments: [][]byte{{1}}}}); n != 0 || err != net.ErrClosed {
		t.Errorf("WriteBatch after Close: %d, %v", n, err)
	}
}

// TestConcurrentWriters has more writers than the free list has places.
func TestConcurrentWriters(t *testing.T) {
	from, to := testSocket(t, "127.0.0.1:0", SocketOptions{}), testSocket(t, "127.0.0.1:0", SocketOptions{})
	const writers, rounds, segments, size = 12, 20, 8, 500
	var done sync.WaitGroup
	for w := range writers {
		done.Go(func() {
			for round := range rounds {
				var serial uint32 = uint32(w<<16 | round*segments)
				rng := rand.New(rand.NewPCG(uint64(w), uint64(round)))
				runs := []Run{{Remote: to.LocalAddr(), Segments: randomRun(rng, &serial, segments, size, size, false)}}
				if n, err := from.WriteBatch(runs); n != 1 || err != nil {
					t.Errorf("WriteBatch: %d, %v", n, err)
				}
			}
		})
	}
	seen := map[uint32]bool{}
	for _, d := range receiveN(t, to, writers*rounds*segments) {
		serial := binary.BigEndian.Uint32(d.payload)
		first := serial &^ (segments - 1)
		rng := rand.New(rand.NewPCG(uint64(serial>>16), uint64(serial&0xffff/segments)))
		want := randomRun(rng, &first, segments, size, size, false)[serial%segments]
		if seen[serial] || !bytes.Equal(d.payload, want) {
			t.Fatalf("datagram %#x twice or garbled", serial)
		}
		seen[serial] = true
	}
	done.Wait()
}

func TestListenUDPErrors(t *testing.T) {
	taken := testSocket(t, "127.0.0.1:0", SocketOptions{}).LocalAddr()
	for _, c := range []struct {
		name string
		addr netip.AddrPort
		opts SocketOptions
		want []string
	}{
		{"zero", netip.AddrPort{}, SocketOptions{}, []string{"not an IP address"}},
		{"taken", taken, SocketOptions{}, []string{taken.String(), "has the port"}},
		{"taken by all", netip.AddrPortFrom(netip.IPv4Unspecified(), taken.Port()), SocketOptions{}, []string{"V6Only"}},
		{"foreign", netip.MustParseAddrPort("192.0.2.77:0"), SocketOptions{}, []string{"192.0.2.77", "no interface"}},
		{"negative cap", netip.MustParseAddrPort("127.0.0.1:0"), SocketOptions{MaxSegments: -1}, []string{"negative"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := ListenUDP(c.addr, c.opts)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q does not say %q", err, w)
				}
			}
			if strings.Count(err.Error(), "listen udp") != 1 {
				t.Errorf("%q repeats itself", err)
			}
		})
	}
}

func TestBothWildcards(t *testing.T) {
	v4 := testSocket(t, "0.0.0.0:0", SocketOptions{})
	v6, err := ListenUDP(netip.AddrPortFrom(netip.IPv6Unspecified(), v4.LocalAddr().Port()), SocketOptions{V6Only: true})
	if err != nil {
		t.Fatal(err)
	}
	v6.Close()
}

// TestWrongFamilyGivesUpThatRunOnly: a run to an address that the socket cannot reach
// is an error of that run; the caller goes on behind it.
func TestWrongFamilyGivesUpThatRunOnly(t *testing.T) {
	from, to := testSocket(t, "127.0.0.1:0", SocketOptions{}), testSocket(t, "127.0.0.1:0", SocketOptions{})
	one := func(r netip.AddrPort, s string) Run { return Run{Remote: r, Segments: [][]byte{[]byte(s)}} }
	runs := []Run{
		one(to.LocalAddr(), "first"),
		one(netip.MustParseAddrPort("[::1]:9"), "lost"),
		one(to.LocalAddr(), "second"),
	}
	n, err := from.WriteBatch(runs)
	if n != 1 || err == nil {
		t.Fatalf("WriteBatch: %d, %v; want 1 and an error", n, err)
	}
	if n, err := from.WriteBatch(runs[n+1:]); n != 1 || err != nil {
		t.Fatalf("the rest: %d, %v", n, err)
	}
	got := receiveN(t, to, 2)
	if string(got[0].payload)+string(got[1].payload) != "firstsecond" {
		t.Errorf("got %q and %q", got[0].payload, got[1].payload)
	}
	if d := from.Stats().DropSendError; d != 1 {
		t.Errorf("DropSendError = %d", d)
	}
}

func TestGSOCaution(t *testing.T) {
	for release, want := range map[string]bool{
		"7.0.0": true, "7.0.12-arch1-1": true, "7.1.4": true, "7.0-rc3": true, "7.1.0-rc1+": true, "7.1": true,
		"7.1.5": false, "7.2.0": false, "6.18.44-fc": false, "6.8.0-41-generic": false, "17.0.1": false, "": false, "seven": false,
	} {
		if got := gsoCaution(release) != ""; got != want {
			t.Errorf("%q: caution %v, want %v", release, got, want)
		}
	}
}

func TestAbilityString(t *testing.T) {
	for want, a := range map[string]Ability{
		"on": abilityOn(), "off: why": abilityOff("why"), "on: careful": {On: true, Reason: "careful"},
		"off: cannot": ability(errors.New("cannot")),
	} {
		if a.String() != want {
			t.Errorf("%q, want %q", a, want)
		}
	}
}

func TestBuffersGranted(t *testing.T) {
	small := testSocket(t, "127.0.0.1:0", SocketOptions{ReceiveBuffer: 64 << 10, SendBuffer: 64 << 10}).Capabilities()
	big := testSocket(t, "127.0.0.1:0", SocketOptions{}).Capabilities()
	if small.ReceiveBuffer < 64<<10 || small.SendBuffer < 64<<10 {
		t.Errorf("asked for 64 KiB, granted %d and %d", small.ReceiveBuffer, small.SendBuffer)
	}
	if big.ReceiveBuffer <= small.ReceiveBuffer || big.SendBuffer <= small.SendBuffer {
		t.Errorf("the default %d and %d is not above %d and %d", big.ReceiveBuffer, big.SendBuffer, small.ReceiveBuffer, small.SendBuffer)
	}
}
