package transport

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"
)

// frameOf is a CSTP frame as bytes.
func frameOf(typ frameType, body []byte) []byte {
	b := make([]byte, streamHeaderSize, streamHeaderSize+len(body))
	putStreamHeader(b, typ, len(body))
	return append(b, body...)
}

func TestStreamHeader(t *testing.T) {
	for _, c := range []struct {
		in  []byte
		typ frameType
		n   int
		ok  bool
	}{
		{[]byte{'S', 'T', 'F', 1, 0, 0, 3, 0}, frameDPDRequest, 0, true},
		{[]byte{'S', 'T', 'F', 1, 0x05, 0x78, 0, 0}, frameData, 1400, true},
		{[]byte{'S', 'T', 'F', 1, 0x40, 0x00, 0, 0}, frameData, 1 << 14, true},
		{[]byte{'S', 'T', 'F', 1, 0x40, 0x01, 0, 0}, 0, 0, false},
		{[]byte{'S', 'T', 'F', 2, 0, 0, 0, 0}, 0, 0, false},
		{[]byte{'S', 'T', 'F', 1, 0, 0, 0, 1}, 0, 0, false},
		{[]byte("HTTP/1.1"), 0, 0, false},
	} {
		typ, n, ok := parseStreamHeader(c.in)
		if ok != c.ok || ok && (typ != c.typ || n != c.n) {
			t.Errorf("%x: type %d, %d bytes, %v", c.in, typ, n, ok)
		}
		if c.ok {
			b := make([]byte, streamHeaderSize)
			if putStreamHeader(b, c.typ, c.n); !bytes.Equal(b, c.in) {
				t.Errorf("%x written as %x", c.in, b)
			}
		}
	}
}

// scribbler is a Device that uses all the room it is given before it looks at any packet, as one with
// virtio-net headers may.
type scribbler struct{ got [][]byte }

func (d *scribbler) BatchSize() int                         { return 64 }
func (d *scribbler) Read([][]byte, []int, int) (int, error) { select {} }
func (d *scribbler) Write(bufs [][]byte, offset int) (int, error) {
	for _, b := range bufs {
		for i := range offset {
			b[i] = 0xee
		}
	}
	for _, b := range bufs {
		d.got = append(d.got, slices.Clone(b[offset:]))
	}
	return len(bufs), nil
}

// loneStream is a stream without pumps, of a session that may send from 10.0.0.0/8.
func loneStream(t testing.TB, dev Device) *stream {
	t.Helper()
	conn := &sinkConn{}
	conn.local = netip.MustParseAddrPort("192.0.2.1:1")
	tr, err := newTransport(Config{Conns: []PacketConn{conn}, Device: dev})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.cancel)
	s := newSession(tr, SessionConfig{AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}, nil)
	tr.sessions[s] = struct{}{}
	tr.enterLocked(s.peer)
	s.peer.timer = time.AfterFunc(time.Hour, func() {})
	t.Cleanup(func() { s.peer.timer.Stop() })
	st := newStream(s, &SessionLink{Stream: discardConn{}})
	st.out.sending = true // nothing runs
	s.stream = st
	return st
}

// reference takes a stream apart as slowly as can be: the packets that are to come through, and whether it ends in a bad header or a goodbye.
func reference(b []byte) (packets [][]byte, ends bool) {
	for len(b) >= 8 {
		n := int(b[4])<<8 + int(b[5])
		if string(b[:4]) != "STF\x01" || b[7] != 0 || n > 1<<14 {
			return packets, true
		}
		if len(b) < 8+n {
			return packets, false
		}
		body := b[8 : 8+n]
		switch b[6] {
		case 0:
			if n >= 20 && body[0]>>4 == 4 && body[12] == 10 {
				packets = append(packets, body)
			}
		case 5, 9:
			return packets, true
		}
		b = b[8+n:]
	}
	return packets, false
}

// takeApart gives a stream its bytes in pieces, each as one read.
func takeApart(st *stream, input []byte, pieces func() int) error {
	b := bursts.Get().(*burst)
	defer bursts.Put(b)
	b.reset()
	for len(input) > 0 {
		n := min(max(pieces(), 1), len(input))
		for rest := input[:n]; len(rest) > 0; {
			st.makeRoom(b)
			k := copy(b.buf[b.w:], rest)
			b.w += k
			rest = rest[k:]
			if err := st.frames(b); err != nil {
				st.deliver(b)
				return err
			}
		}
		input = input[n:]
	}
	st.deliver(b)
	return nil
}

// FuzzStreamFrames: however the bytes are cut, what comes through is what a slow reading finds, and using the room before the
// packets harms none.
func FuzzStreamFrames(f *testing.F) {
	packet := func(n int) []byte {
		p := make([]byte, n)
		p[0], p[12] = 0x45, 10
		for i := 20; i < n; i++ {
			p[i] = byte(i)
		}
		return p
	}
	var all []byte
	for _, n := range []int{20, 1400, 21, 1 << 14, 40} {
		all = append(all, frameOf(frameData, packet(n))...)
		all = append(all, frameOf(frameKeepalive, nil)...)
	}
	small := append(frameOf(frameData, packet(24)), frameOf(frameData, packet(20))...)
	f.Add(all, uint64(1), uint16(1500))
	f.Add(append(slices.Clone(small), frameOf(frameDisconnect, []byte{0xb0, 'b', 'y', 'e'})...), uint64(2), uint16(7))
	f.Add(append(slices.Clone(small), "STF\x02 and so on"...), uint64(3), uint16(20000))
	f.Add(bytes.Repeat(frameOf(frameData, packet(20)), 400), uint64(4), uint16(65535))
	f.Add(frameOf(frameDPDRequest, make([]byte, 90)), uint64(5), uint16(1))
	dev := &scribbler{}
	st := loneStream(f, dev)
	st.s.stream = nil // a goodbye by a stream that was replaced ends only that
	f.Fuzz(func(t *testing.T, input []byte, seed uint64, size uint16) {
		want, ends := reference(input)
		dev.got = nil
		st.out.abandon()
		rnd := rand.New(rand.NewPCG(seed, 0))
		err := takeApart(st, slices.Clone(input), func() int { return rnd.IntN(int(size) + 1) })
		if ends != (err != nil) {
			t.Fatalf("ended with %v, want an end: %v", err, ends)
		}
		if len(dev.got) != len(want) {
			t.Fatalf("%d packets, want %d", len(dev.got), len(want))
		}
		for i := range want {
			if !bytes.Equal(dev.got[i], want[i]) {
				t.Fatalf("packet %d of %d is not what was sent", i, len(want))
			}
		}
	})
}

// rawPeer is a session whose far end's stream the test has in hand, byte for byte, over TCP.
func rawPeer(t testing.TB, timing Timing, change func(*SessionConfig)) (*testNode, *Session, net.Conn, *told) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	near, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	n := keyless(t, "10.0.0.2", timing, newMemNet().listen("192.0.2.2:443"))
	events := new(told)
	cfg := SessionConfig{
		Link: SessionLink{Stream: NewStreamConn(near), NoDatagrams: "none"}, Events: events.events(),
		AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}, Stream: Intervals{DPD: patience},
	}
	if change != nil {
		change(&cfg)
	}
	s, err := n.AddSession(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return n, s, far, events
}

func readFrame(t *testing.T, r io.Reader) (frameType, []byte) {
	t.Helper()
	var h [streamHeaderSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		t.Fatal(err)
	}
	typ, n, ok := parseStreamHeader(h[:])
	if !ok {
		t.Fatalf("%x is no header", h)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		t.Fatal(err)
	}
	return typ, body
}

// Bytes that were read with the answer to CONNECT come first; DPD-REQs are echoed whole; what is unknown is passed over.
func TestStreamSpeaksCSTP(t *testing.T) {
	noLeaks(t)
	packet := (&testNode{addr: netip.MustParseAddr("10.0.0.1")}).packet(netip.MustParseAddr("10.0.0.2"), 7, 100)
	whole := frameOf(frameData, packet)
	n, s, far, events := rawPeer(t, steady, func(c *SessionConfig) { c.Link.Buffered = whole[:50] })
	far.SetDeadline(time.Now().Add(patience))
	far.Write(whole[50:])
	far.Write(frameOf(8, []byte("compressed")))
	body := bytes.Repeat([]byte("padded "), 200)
	far.Write(frameOf(frameDPDRequest, body))
	if typ, got := readFrame(t, far); typ != frameDPDReply || !bytes.Equal(got, body) {
		t.Errorf("type %d, %d bytes", typ, len(got))
	}
	if got := <-n.dev.inbound; !bytes.Equal(got, packet) {
		t.Error("the packet is another")
	}
	if d := n.Status().Drops; d[DropUnknownFrame.String()] != 1 {
		t.Errorf("%v", d)
	}
	spoofed := slices.Clone(packet)
	spoofed[15] = 99
	far.Write(frameOf(frameData, spoofed))
	eventually(t, "the wrong source is counted", func() bool { return n.Status().Drops[DropSource.String()] == 1 })

	n.dev.outbound <- n.packet(netip.MustParseAddr("10.0.0.1"), 8, 200)
	if typ, got := readFrame(t, far); typ != frameData || number(got) != 8 {
		t.Errorf("type %d, %d bytes", typ, len(got))
	}
	far.Write([]byte("GET / HTTP/1.1\r\n"))
	eventually(t, "a bad header ends the session", func() bool { return len(events.closed()) == 1 })
	if err := events.closed()[0]; !errors.Is(err, ErrStreamProtocol) {
		t.Error(err)
	}
	if st := s.Status(); st.InboundPackets != 1 || st.StreamInbound != 1 || st.StreamOutbound != 1 {
		t.Errorf("%+v", st)
	}
}

// The stream has DPD of its own: it asks, answers count, and silence ends it.
func TestStreamDPD(t *testing.T) {
	noLeaks(t)
	_, s, far, events := rawPeer(t, quick, func(c *SessionConfig) {
		c.Stream = Intervals{DPD: 100 * time.Millisecond, Keepalive: 50 * time.Millisecond}
	})
	far.SetDeadline(time.Now().Add(patience))
	seen := map[frameType]bool{}
	for !seen[frameDPDRequest] || !seen[frameKeepalive] {
		typ, body := readFrame(t, far)
		seen[typ] = true
		if typ == frameDPDRequest {
			far.Write(frameOf(frameDPDReply, body))
		}
	}
	eventually(t, "the answer is used", func() bool { return s.Status().StreamRTT > 0 })
	eventually(t, "silence is noticed", func() bool { return events.lostStreams() == 1 })
	if len(events.closed()) != 0 {
		t.Errorf("%v", events)
	}
}

// The far end reads nothing. The pump goes on for others, what is too much is dropped and counted, memory is bounded, and Close is
// as quick as ever.
func TestStreamThatTakesNothing(t *testing.T) {
	noLeaks(t)
	n, s, _, _ := rawPeer(t, steady, nil)
	to := netip.MustParseAddr("10.0.0.1")
	drop := DropStreamQueue.String()
	deadline := time.Now().Add(patience)
	for n.Status().Drops[drop] < 1000 {
		if time.Now().After(deadline) {
			t.Fatalf("the pump stands still: %v", n.Status().Drops)
		}
		n.dev.outbound <- n.packet(to, 1, 1400)
	}
	if got := s.Status().StreamQueue; got == 0 || got > maxStreamQueue {
		t.Errorf("%d bytes wait", got)
	}
	begun := time.Now()
	n.stop()
	if took := time.Since(begun); took > lastWordsTime+goodbyeTime+patience/4 {
		t.Errorf("Close took %v", took)
	}
}

// Stock software wants exactly one frame in a record; several go into one where that was agreed.
func TestFramesAndRecords(t *testing.T) {
	noLeaks(t)
	for _, pack := range []bool{false, true} {
		p := newSessionPair(t, steady, func(c, s *SessionConfig) {
			c.Link.NoDatagrams, s.Link.NoDatagrams = "none", "none"
			c.Link.PackFrames, s.Link.PackFrames = pack, pack
		})
		ping(t, p.client, p.server)
		wire := p.c.stream.wire
		records, sends := wire.records.Load(), wire.sends.Load()
		const n = 2000
		r := receiving(p.server)
		for i := range uint32(n) {
			p.client.dev.outbound <- p.client.packet(p.server.addr, i+1, 1400)
			if i%50 == 49 { // the queue is bounded
				eventually(t, "they arrive", func() bool { return r.has(i+1) == 0 })
			}
		}
		records, sends = wire.records.Load()-records, wire.sends.Load()-sends
		t.Logf("pack %v: %d packets in %d records and %d system calls", pack, n, records, sends)
		if !pack && records != n || pack && records > n/2 {
			t.Errorf("pack %v: %d packets in %d records", pack, n, records)
		}
		p.client.stop()
		p.server.stop()
	}
}

// At rest a session is small, its stream, both pumps and TLS included.
func TestIdleSessionsAreSmall(t *testing.T) {
	const n = 100
	net1 := newMemNet()
	server := keyless(t, "10.255.0.1", steady, net1.listen("192.0.2.2:443"))
	client := keyless(t, "10.255.0.2", steady, net1.listen("192.0.2.1:1000"))
	heap := func() uint64 {
		for range 3 {
			runtime.GC()
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := heap()
	for i := range n {
		cl, sl := linkPair(t)
		inner := netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})
		allowed := []netip.Prefix{netip.PrefixFrom(inner, 32)}
		_, err := server.AddSession(SessionConfig{Link: sl, AllowedIPs: allowed, Stream: Intervals{DPD: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = client.AddSession(SessionConfig{Client: true, Endpoint: "192.0.2.2:443", Link: cl, AllowedIPs: allowed, Stream: Intervals{DPD: time.Hour}})
		if err != nil {
			t.Fatal(err)
		}
		for range 20 { // by the stream, as in a session that was in use
			client.dev.outbound <- client.packet(inner, 1, 1400)
			server.dev.outbound <- server.packet(inner, 1, 1400)
		}
	}
	eventually(t, "all have datagrams", func() bool {
		for _, s := range server.Status().Sessions {
			if s.Path != PathDatagrams {
				return false
			}
		}
		return true
	})
	time.Sleep(100 * time.Millisecond)
	each := (heap() - before) / n
	t.Logf("%d bytes a session, both ends and both TLS connections", each)
	if each > 2*60<<10 {
		t.Errorf("%d bytes a session", each)
	}
}

// What is ours allocates nothing per packet; crypto/tls is not in this.
func TestStreamAllocatesNothing(t *testing.T) {
	dev := &takeDevice{}
	st := loneStream(t, dev)
	packet := make([]byte, 1400)
	packet[0], packet[12], packet[16] = 0x45, 10, 10
	o := newOutbound(st.t, 45)
	var wire []byte
	rounds := 0
	round := func() {
		fill(o, 45, 1400)
		for i := range 45 {
			copy(o.bufs[i][headSlack:], packet)
		}
		st.s.peer.detour.Store(st)
		o.batch(45)
		wire = wire[:0]
		for {
			c, ok := st.out.next()
			if !ok {
				break
			}
			wire = append(wire, *c...)
			st.out.sent(c)
		}
		b := bursts.Get().(*burst)
		b.reset()
		b.w += copy(b.buf[b.w:], wire)
		if err := st.frames(b); err != nil {
			t.Fatal(err)
		}
		st.deliver(b)
		bursts.Put(b)
		rounds++
	}
	for range 5 {
		round()
	}
	if allocs := testing.AllocsPerRun(200, round); allocs > 0 && !raceDetector { // with which pools forget some of what they are given
		t.Errorf("%v allocations for 45 packets out and in", allocs)
	}
	if dev.packets != 45*rounds {
		t.Errorf("%d packets of %d came through: %v", dev.packets, 45*rounds, st.t.Status().Drops)
	}
}
