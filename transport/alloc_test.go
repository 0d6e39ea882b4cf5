package transport

import (
	"net/netip"
	"testing"
)

// sinkConn takes runs and remembers the last datagrams.
type sinkConn struct {
	memConn
	wire []byte
	size int
}

func (c *sinkConn) WriteBatch(runs []Run) (int, error) {
	c.wire = c.wire[:0]
	for _, r := range runs {
		c.size = len(r.Segments[0])
		for _, s := range r.Segments {
			c.wire = append(c.wire, s...)
		}
	}
	return len(runs), nil
}

func (c *sinkConn) LocalAddr() netip.AddrPort { return c.local }

// takeDevice takes packets and does nothing with them.
type takeDevice struct{ packets, bytes int }

func (d *takeDevice) BatchSize() int                         { return 45 }
func (d *takeDevice) Read([][]byte, []int, int) (int, error) { select {} }
func (d *takeDevice) Write(b [][]byte, offset int) (int, error) {
	d.packets += len(b)
	for _, p := range b {
		d.bytes += len(p) - offset
	}
	return len(b), nil
}

// joined makes two transports without pumps that share an association's keys:
// what the outbound half of one seals, the inbound half of the other opens.
func joined(t testing.TB, suite CipherSuite) (o *outbound, in *inbound, sink *sinkConn, dev *takeDevice) {
	t.Helper()
	sealing, opening := testKeys(t, suite)
	sink, dev = &sinkConn{}, &takeDevice{}
	sink.local = netip.MustParseAddrPort("192.0.2.1:1")
	make1 := func(prefix string, key PrivateKey) (*Transport, *peer) {
		tr, err := newTransport(Config{Key: key, Conns: []PacketConn{sink}, Device: dev})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tr.cancel)
		other, err := GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		if err := tr.AddPeer(PeerConfig{PublicKey: other.Public(), AllowedIPs: []netip.Prefix{netip.MustParsePrefix(prefix)}}); err != nil {
			t.Fatal(err)
		}
		p := tr.peerByKey(other.Public())
		p.mu.Lock() // no step of liveness or path MTU sends into the sink
		p.stopped = true
		p.mu.Unlock()
		a := &association{peer: p, suite: suite, sealer: &sealing, opener: &opening}
		a.path.Store(&path{conn: sink, remote: netip.MustParseAddrPort("192.0.2.2:2")})
		a.nextSeq.Store(257)
		p.slots.Store(&slots{current: a})
		tr.remotes.put(netip.MustParseAddrPort("192.0.2.2:2"), p)
		return tr, p
	}
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	sender, _ := make1("10.0.0.2/32", key)
	receiver, _ := make1("10.0.0.1/32", key)
	return newOutbound(sender, dev.BatchSize()), newInbound(receiver, sink), sink, dev
}

// fill puts n packets of size bytes from 10.0.0.1 to 10.0.0.2 where Device.Read would.
func fill(o *outbound, n, size int) {
	for i := range n {
		p := o.bufs[i][headSlack:][:size]
		clear(p)
		p[0] = 0x45
		copy(p[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
		o.sizes[i] = size
	}
}

func TestPumpsAllocateNothing(t *testing.T) {
	for _, suite := range []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305} {
		t.Run(suite.String(), func(t *testing.T) {
			o, in, sink, dev := joined(t, suite)
			const n, size = 45, 1400
			msg := Inbound{Buf: make([]byte, 1<<17), Remote: netip.MustParseAddrPort("192.0.2.2:2")}
			batch := make([]Inbound, 1)
			runs := 0
			round := func() {
				fill(o, n, size)
				o.batch(n)
				msg.N, msg.SegmentSize = copy(msg.Buf, sink.wire), sink.size
				batch[0] = msg
				in.receive(batch)
				runs++
			}
			round()
			if allocs := testing.AllocsPerRun(100, round); allocs != 0 {
				t.Errorf("%v allocations for %d packets out and in", allocs, n)
			}
			if dev.packets != n*runs || dev.bytes != n*size*runs {
				t.Errorf("%d packets of %d bytes came through, want %d of %d; drops %v", dev.packets, dev.bytes, n*runs, n*size*runs, in.t.Status().Drops)
			}
			if len(o.runs) != 1 {
				t.Errorf("%d runs for one superpacket", len(o.runs))
			}
		})
	}
}

// Runs end with a shorter record, another peer, 64 records or 65,400 bytes.
func TestRunsAreWhatOneSendCarries(t *testing.T) {
	o, _, _, _ := joined(t, AES128GCM)
	for _, c := range []struct {
		name  string
		sizes []int
		runs  []int // records in each
	}{
		{"one", []int{1400}, []int{1}},
		{"equal", []int{1400, 1400, 1400}, []int{3}},
		{"shorter last", []int{1400, 1400, 700}, []int{3}},
		{"shorter ends it", []int{1400, 700, 700}, []int{2, 1}},
		{"longer begins anew", []int{700, 1400, 1400}, []int{1, 2}},
	} {
		o.records, o.runs = o.records[:0], o.runs[:0]
		fill(o, len(c.sizes), 1400)
		copy(o.sizes, c.sizes)
		for i := 0; i < len(c.sizes); {
			i += o.sealNext(i, len(c.sizes))
		}
		var got []int
		for _, r := range o.runs {
			got = append(got, r.count)
		}
		if len(got) != len(c.runs) {
			t.Errorf("%s: runs of %v records, want %v", c.name, got, c.runs)
			continue
		}
		for i := range got {
			if got[i] != c.runs[i] {
				t.Errorf("%s: runs of %v records, want %v", c.name, got, c.runs)
			}
		}
	}
	o.records, o.runs = o.records[:0], o.runs[:0]
	a := o.t.sortedPeers()[0].slots.Load().current
	record := make([]byte, 1438)
	for range 100 {
		o.append(a, record, 1400)
	}
	for _, r := range o.runs {
		if r.bytes > MaxRunBytes || r.count > MaxRunSegments {
			t.Errorf("a run of %d records and %d bytes", r.count, r.bytes)
		}
	}
	if len(o.runs) != 3 {
		t.Errorf("100 full records make %d runs, want 45+45+10", len(o.runs))
	}
	small := record[:100]
	o.records, o.runs = o.records[:0], o.runs[:0]
	for range 100 {
		o.append(a, small, 62)
	}
	if len(o.runs) != 2 || o.runs[0].count != MaxRunSegments {
		t.Errorf("100 small records make runs %+v", o.runs)
	}
}

func BenchmarkPumps(b *testing.B) {
	for _, suite := range []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305} {
		b.Run(suite.String(), func(b *testing.B) {
			o, in, sink, _ := joined(b, suite)
			const n, size = 45, 1400
			batch := []Inbound{{Buf: make([]byte, 1<<17), Remote: netip.MustParseAddrPort("192.0.2.2:2")}}
			b.SetBytes(n * size)
			b.ReportAllocs()
			for b.Loop() {
				fill(o, n, size)
				o.batch(n)
				batch[0].N, batch[0].SegmentSize = copy(batch[0].Buf, sink.wire), sink.size
				in.receive(batch)
			}
		})
	}
}

// Whatever a peer asks by DPD, and however often, it gets the same bytes back at
// no allocation.
func TestDPDAllocatesNothing(t *testing.T) {
	for _, suite := range []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305} {
		t.Run(suite.String(), func(t *testing.T) {
			o, in, sink, _ := joined(t, suite)
			asker, back := o.t.sortedPeers()[0].slots.Load().current, newInbound(o.t, sink)
			const n, size = 8, 900
			msg := Inbound{Buf: make([]byte, 1<<16), Remote: netip.MustParseAddrPort("192.0.2.2:2")}
			buf := make([]byte, headSlack+size+tagSize)
			var scratch cryptoScratch
			runs, asked := 0, 0
			batch := make([]Inbound, 1)
			round := func(typ frameType) {
				msg.N = 0
				for range n {
					body := buf[headSlack : headSlack+size]
					clear(body)
					body[7], body[size-1] = 1, byte(runs) // asked at 1 ns, and padded
					seq, _ := asker.reserve(1)
					record := asker.sealFrame(buf, size, typ, seq, &scratch)
					msg.N += copy(msg.Buf[msg.N:], record)
					msg.SegmentSize = len(record)
				}
				asked = msg.N
				batch[0] = msg
				in.receive(batch)
				runs++
			}
			round(frameDPDRequest)
			round(frameDPDReply)
			if allocs := testing.AllocsPerRun(100, func() { round(frameDPDReply) }); allocs != 0 {
				t.Errorf("%v allocations for %d DPD-RESPs", allocs, n)
			}
			if allocs := testing.AllocsPerRun(100, func() { round(frameDPDRequest) }); allocs != 0 {
				t.Errorf("%v allocations for %d DPD-REQs", allocs, n)
			}
			if len(sink.wire) != asked {
				t.Fatalf("%d bytes asked, %d answered", asked, len(sink.wire))
			}
			hdr, record, _, _ := nextRecord(sink.wire)
			plain, err := asker.opener.open(record, hdr, &back.scratch)
			if err != nil || frameType(plain[0]) != frameDPDReply || len(plain) != 1+size || plain[size] != byte(runs-1) {
				t.Errorf("the answer does not echo the question: %v", err)
			}
		})
	}
}
