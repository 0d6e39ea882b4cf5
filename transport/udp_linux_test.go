package transport

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// needGSO skips where the kernel has neither offload.
func needGSO(t *testing.T, s *UDPSocket) {
	t.Helper()
	if c := s.Capabilities(); !c.GSO.On || !c.GRO.On {
		t.Skipf("SKIPPED: GSO %v, GRO %v", c.GSO, c.GRO)
	}
}

func send(t testing.TB, s *UDPSocket, runs ...Run) {
	t.Helper()
	if n, err := s.WriteBatch(runs); n != len(runs) || err != nil {
		t.Fatalf("WriteBatch: %d of %d, %v", n, len(runs), err)
	}
}

func oneDatagram(remote netip.AddrPort, payload string) Run {
	return Run{Remote: remote, Segments: [][]byte{[]byte(payload)}}
}

func sockopt(t testing.TB, s *UDPSocket, level, name int) (v int) {
	t.Helper()
	var err error
	if e := s.raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, name) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return v
}

// TestOffloadsAtWork: a run is one message out and few buffers in.
func TestOffloadsAtWork(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		from, to := testSocket(t, addr, SocketOptions{}), testSocket(t, addr, SocketOptions{})
		needGSO(t, from)
		var serial uint32
		run := Run{Remote: to.LocalAddr(), Segments: randomRun(rand.New(rand.NewPCG(1, 1)), &serial, 64, 1020, 500, false)}
		send(t, from, run, run, run)
		receiveN(t, to, 3*64)
		out, in := from.Stats(), to.Stats()
		if out.Sends != 1 || out.Messages != 3 {
			t.Errorf("%s: %d system calls and %d messages for 3 runs, want 1 and 3", addr, out.Sends, out.Messages)
		}
		if in.Buffers != 3 {
			t.Errorf("%s: %d buffers received, want 3", addr, in.Buffers)
		}
	}
}

func TestProbe(t *testing.T) {
	c := testSocket(t, "127.0.0.1:0", SocketOptions{}).Capabilities()
	if c.GSO.On && c.ProbedSegments != 0 && c.ProbedSegments != 64 && c.ProbedSegments != 128 {
		t.Errorf("probed %d segments", c.ProbedSegments)
	}
	if c.GSO.On && c.MaxSegments != max(c.ProbedSegments, MaxRunSegments) {
		t.Errorf("MaxSegments %d of %d probed", c.MaxSegments, c.ProbedSegments)
	}
	if c := testSocket(t, "127.0.0.1:0", SocketOptions{MaxSegments: 16, MaxBytes: 9000}).Capabilities(); c.GSO.On && (c.MaxSegments != 16 || c.MaxBytes != 9000) {
		t.Errorf("configured caps: %+v", c)
	}
	c = testSocket(t, "127.0.0.1:0", SocketOptions{DisableGSO: true, DisableGRO: true}).Capabilities()
	if c.GSO != abilityOff(reasonConfigured) || c.GRO != abilityOff(reasonConfigured) || c.MaxSegments != 1 {
		t.Errorf("switched off: %+v", c)
	}
}

func TestSocketOptionsInForce(t *testing.T) {
	s := testSocket(t, "[::]:0", SocketOptions{MaxPacingRate: 1e6})
	c := s.Capabilities()
	for _, o := range []struct {
		name          string
		level, option int
		want          int
	}{
		{"IP_MTU_DISCOVER", unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE},
		{"IPV6_MTU_DISCOVER", unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE},
		{"SO_MAX_PACING_RATE", unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, 1e6},
		{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, c.ReceiveBuffer},
		{"SO_SNDBUF", unix.SOL_SOCKET, unix.SO_SNDBUF, c.SendBuffer},
		{"SO_RXQ_OVFL", unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1},
	} {
		if got := sockopt(t, s, o.level, o.option); got != o.want {
			t.Errorf("%s = %d, want %d", o.name, got, o.want)
		}
	}
	fast := testSocket(t, "127.0.0.1:0", SocketOptions{MaxPacingRate: 10e9})
	if math.MaxInt > math.MaxInt32 {
		var rate uint64
		if err := fast.raw.Control(func(fd uintptr) { rate, _ = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE) }); err != nil || rate != 10e9 {
			t.Errorf("pacing at %d, want 10e9 (%v)", rate, err)
		}
	}
}

func TestMark(t *testing.T) {
	s, err := ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), SocketOptions{Mark: 0x80000001})
	if err != nil {
		if os.Geteuid() == 0 {
			t.Log("root without CAP_NET_ADMIN?")
		}
		t.Skipf("SKIPPED: %v", err)
	}
	defer s.Close()
	if got := uint32(sockopt(t, s, unix.SOL_SOCKET, unix.SO_MARK)); got != 0x80000001 {
		t.Errorf("mark %#x", got)
	}
}

// TestReusePort: several sockets on one port, and the kernel spreads remotes over them.
func TestReusePort(t *testing.T) {
	first := testSocket(t, "127.0.0.1:0", SocketOptions{ReusePort: true})
	second := testSocket(t, first.LocalAddr().String(), SocketOptions{ReusePort: true})
	const remotes = 64
	for range remotes {
		send(t, testSocket(t, "127.0.0.1:0", SocketOptions{DisableGSO: true}), oneDatagram(first.LocalAddr(), "x"))
	}
	counts := make(chan uint64, 2)
	for _, s := range []*UDPSocket{first, second} {
		go func() {
			for batch := inboundBatch(8, 100); ; {
				if _, err := s.ReadBatch(batch); err != nil {
					counts <- s.Stats().DatagramsIn
					return
				}
			}
		}()
	}
	deadline := time.Now().Add(5 * time.Second)
	for first.Stats().DatagramsIn+second.Stats().DatagramsIn < remotes && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	first.Close()
	second.Close()
	a, b := <-counts, <-counts
	if a+b != remotes || a == 0 || b == 0 { // 2^-63 that all hash to one
		t.Errorf("%d and %d of %d", a, b, remotes)
	}
}

// TestReplyFromTheAddressAsked: a socket on all addresses answers from the one that
// the question went to; 127.0.0.0/8 gives a host many.
func TestReplyFromTheAddressAsked(t *testing.T) {
	for _, listen := range []string{"0.0.0.0:0", "[::]:0"} {
		server, client := testSocket(t, listen, SocketOptions{}), testSocket(t, "127.0.0.1:0", SocketOptions{})
		asked := reach("127.77.0.2", server)
		send(t, client, oneDatagram(asked, "question"))
		question := receiveN(t, server, 1)[0]
		if question.local != asked.Addr() {
			t.Fatalf("%s: asked at %v, want %v", listen, question.local, asked.Addr())
		}
		reply := Run{Remote: question.remote, Local: question.local, Segments: [][]byte{[]byte("ans"), []byte("wer")}}
		send(t, server, reply)
		for _, d := range receiveN(t, client, 2) {
			if d.remote != asked {
				t.Errorf("%s: answer from %v, want %v", listen, d.remote, asked)
			}
		}
	}
}

// TestStaleSource: the kernel itself refuses an address that is not ours, with EINVAL.
func TestStaleSource(t *testing.T) {
	for _, c := range []struct{ listen, host, gone string }{
		{"0.0.0.0:0", "127.0.0.1", "203.0.113.1"},
		{"[::]:0", "127.0.0.1", "203.0.113.1"},
		{"[::]:0", "::1", "2001:db8::bad"},
	} {
		server, client := testSocket(t, c.listen, SocketOptions{}), testSocket(t, netip.AddrPortFrom(netip.MustParseAddr(c.host), 0).String(), SocketOptions{})
		run := Run{Remote: client.LocalAddr(), Local: netip.MustParseAddr(c.gone), Segments: [][]byte{[]byte("ans"), []byte("wer")}}
		send(t, server, run)
		for _, d := range receiveN(t, client, 2) {
			if d.remote != reach(c.host, server) {
				t.Errorf("%+v: from %v", c, d.remote)
			}
		}
		if st := server.Stats(); st.SourceLost != 1 || server.Capabilities().GSO.On != client.Capabilities().GSO.On {
			t.Errorf("%+v: %+v, %+v", c, st, server.Capabilities())
		}
	}
}

// TestKernelDrops: what the receive buffer could not hold is counted to the datagram.
func TestKernelDrops(t *testing.T) {
	plain := SocketOptions{DisableGSO: true, DisableGRO: true, ReceiveBuffer: 16 << 10}
	from, to := testSocket(t, "127.0.0.1:0", plain), testSocket(t, "127.0.0.1:0", plain)
	var serial uint32
	run := Run{Remote: to.LocalAddr(), Segments: randomRun(rand.New(rand.NewPCG(1, 1)), &serial, 64, 1000, 1000, false)}
	send(t, from, run, run)
	// Drain, then one more, which brings the count along.
	batch := inboundBatch(64, 2000)
	got := 0
	for {
		n, errno := 0, unix.Errno(0)
		to.sys.recvmmsg = func(fd uintptr, msgs []mmsghdr) (int, unix.Errno) {
			if n, errno = kernelCalls.recvmmsg(fd, msgs); errno == unix.EAGAIN {
				return 0, unix.ETIME // do not sleep
			}
			return n, errno
		}
		if _, err := to.ReadBatch(batch); err != nil {
			break
		}
		got += n
	}
	to.sys = kernelCalls
	send(t, from, oneDatagram(to.LocalAddr(), "last"))
	receiveN(t, to, 1)
	if got == 0 || got == 128 {
		t.Fatalf("received %d of 128: the buffer is not what the test needs", got)
	}
	if d := to.Stats().DropKernel; d != uint64(128-got) {
		t.Errorf("DropKernel = %d, want %d", d, 128-got)
	}
}

// TestEMSGSIZE: a segment above the interface's MTU is ErrDatagramTooBig for that run
// alone, with GSO left on; at the MTU it passes. The MTU of the route does not count.
func TestEMSGSIZE(t *testing.T) {
	const mtu = 1280
	w := newVethPair(t)
	for i := range w.ends {
		w.in(i, func() { w.check(netlink.LinkSetMTU(w.ends[i].link, mtu)) })
	}
	w.in(0, func() { // a path MTU that anybody's ICMP message could have set
		w.check(netlink.RouteAdd(&netlink.Route{LinkIndex: w.ends[0].link.Attrs().Index, MTU: 1000, Dst: hostRoute(w.ends[1].v4)}))
	})
	for _, c := range []struct {
		name, listen string
		to           netip.Addr
		fits         int
	}{
		{"v4", "0.0.0.0:0", w.ends[1].v4, mtu - 20 - 8},
		{"v4 on dual", "[::]:0", w.ends[1].v4, mtu - 20 - 8},
		{"v6", "[::]:0", w.ends[1].v6, mtu - 40 - 8},
	} {
		for _, count := range []int{1, 20} {
			t.Run(fmt.Sprintf("%s/%d", c.name, count), func(t *testing.T) {
				from, to := w.listen(0, c.listen, SocketOptions{}), w.listen(1, "[::]:0", SocketOptions{})
				remote := netip.AddrPortFrom(c.to, to.LocalAddr().Port())
				var serial uint32
				rng := rand.New(rand.NewPCG(1, 1))
				run := func(size int) Run {
					return Run{Remote: remote, Segments: randomRun(rng, &serial, count, size, size, false)}
				}
				gso := from.Capabilities().GSO
				runs := []Run{run(c.fits), run(c.fits + 1), run(c.fits)}
				n, err := from.WriteBatch(runs)
				if n != 1 || err != ErrDatagramTooBig {
					t.Fatalf("WriteBatch: %d, %v; want 1, ErrDatagramTooBig", n, err)
				}
				send(t, from, runs[2])
				want := append(runs[0].Segments, runs[2].Segments...)
				for i, d := range receiveN(t, to, len(want)) {
					if !bytes.Equal(d.payload, want[i]) {
						t.Fatalf("datagram %d differs", i)
					}
				}
				if now := from.Capabilities().GSO; now != gso {
					t.Errorf("GSO %v, was %v", now, gso)
				}
				if st := from.Stats(); st.DropTooBig != uint64(count) {
					t.Errorf("DropTooBig = %d, want %d", st.DropTooBig, count)
				}
			})
		}
	}
}

func hostRoute(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// TestZones: link-local addresses work both ways by the name of the interface.
func TestZones(t *testing.T) {
	w := newVethPair(t)
	a, b := w.listen(0, "[::]:0", SocketOptions{}), w.listen(1, "[::]:0", SocketOptions{})
	// Each side sees the other through its own interface.
	bFromA := netip.AddrPortFrom(w.ends[1].local.WithZone("v0"), b.LocalAddr().Port())
	aFromB := netip.AddrPortFrom(w.ends[0].local.WithZone("v1"), a.LocalAddr().Port())
	send(t, a, Run{Remote: bFromA, Segments: [][]byte{[]byte("ques"), []byte("tion")}})
	for _, d := range receiveN(t, b, 2) {
		if d.remote != aFromB || d.local != w.ends[1].local {
			t.Fatalf("from %v at %v, want %v at %v", d.remote, d.local, aFromB, w.ends[1].local)
		}
	}
	send(t, b, Run{Remote: aFromB, Local: w.ends[1].local, Segments: [][]byte{[]byte("answer")}})
	if d := receiveN(t, a, 1)[0]; d.remote != bFromA {
		t.Fatalf("answer from %v, want %v", d.remote, bFromA)
	}

	runs := []Run{{Remote: bFromA, Segments: [][]byte{[]byte("again")}}}
	batch := inboundBatch(2, 2000)
	allocs := testing.AllocsPerRun(100, func() {
		if _, err := a.WriteBatch(runs); err != nil {
			t.Fatal(err)
		}
		if _, err := b.ReadBatch(batch); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 {
		t.Errorf("%v allocations per datagram with a zone, want 0", allocs)
	}

	numeric := netip.AddrPortFrom(w.ends[1].local.WithZone(fmt.Sprint(w.ends[0].link.Attrs().Index)), b.LocalAddr().Port())
	send(t, a, oneDatagram(numeric, "by number"))
	receiveN(t, b, 1)
	unknown := netip.AddrPortFrom(w.ends[1].local.WithZone("none"), 9)
	if n, err := a.WriteBatch([]Run{oneDatagram(unknown, "x")}); n != 0 || err == nil {
		t.Errorf("to an unknown zone: %d, %v", n, err)
	}
}

// TestZoneComesBack: an interface that was made anew has another index; the first send
// fails, the next one finds it.
func TestZoneComesBack(t *testing.T) {
	w := newVethPair(t)
	a := w.listen(0, "[::]:0", SocketOptions{})
	run := oneDatagram(netip.AddrPortFrom(w.ends[1].local.WithZone("v0"), 9), "x")
	send(t, a, run)
	w.in(0, func() {
		w.check(netlink.LinkDel(w.ends[0].link))
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "v0"
		w.check(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "other"}))
		w.up("other")
		w.address(w.up("v0"), w.ends[0].local.WithZone(""), 64)
	})
	if n, err := a.WriteBatch([]Run{run}); n != 0 || err == nil {
		t.Fatalf("through the interface that is gone: %d, %v", n, err)
	}
	send(t, a, run)
}

// TestGSOWithdrawnByKernel: a real kernel refuses more segments than it knows, with
// EINVAL. The run arrives nevertheless, each datagram once.
func TestGSOWithdrawnByKernel(t *testing.T) {
	from, to := testSocket(t, "127.0.0.1:0", SocketOptions{}), testSocket(t, "127.0.0.1:0", SocketOptions{})
	needGSO(t, from)
	from.maxSegments = 2 * maxSegments // as if probed wrongly
	var serial uint32
	segments := randomRun(rand.New(rand.NewPCG(1, 1)), &serial, 2*maxSegments, 200, 100, true)
	run := Run{Remote: to.LocalAddr(), Segments: segments}
	send(t, from, run, run)
	for i, d := range receiveN(t, to, 2*len(segments)) {
		if !bytes.Equal(d.payload, segments[i%len(segments)]) {
			t.Fatalf("datagram %d differs", i)
		}
	}
	send(t, from, oneDatagram(to.LocalAddr(), "the end"))
	if d := receiveN(t, to, 1)[0]; string(d.payload) != "the end" {
		t.Error("more arrived than was sent")
	}
	if c := from.Capabilities(); c.GSO.On || c.MaxSegments != 1 {
		t.Errorf("GSO is still %v, %d segments", c.GSO, c.MaxSegments)
	}
}

// TestFullSendBufferForReal: a slow interface fills the send buffer; WriteBatch waits
// and loses nothing.
func TestFullSendBufferForReal(t *testing.T) {
	w := newVethPair(t)
	w.in(0, func() {
		w.check(netlink.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: w.ends[0].link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       12 << 20, Limit: 64 << 20, Buffer: 1 << 20, // 12 MiB/s
		}))
	})
	from, to := w.listen(0, "0.0.0.0:0", SocketOptions{SendBuffer: 128 << 10}), w.listen(1, "0.0.0.0:0", SocketOptions{})
	remote := netip.AddrPortFrom(w.ends[1].v4, to.LocalAddr().Port())
	var serial uint32
	segments := randomRun(rand.New(rand.NewPCG(1, 1)), &serial, 45, 1400, 1400, false)
	const runs = 30
	sent := make(chan error, 1)
	go func() {
		for range runs {
			if _, err := from.WriteBatch([]Run{{Remote: remote, Segments: segments}}); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	receiveN(t, to, runs*45)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if waits := from.Stats().SendWaits; waits == 0 {
		t.Error("the send buffer never filled: the test shows nothing")
	}
}
