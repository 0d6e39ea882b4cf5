package tunwrap

import (
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// benchSuper is a superpacket of 60,000 bytes of payload for MTU 1400.
func benchSuper(v6 bool) (s spec, size int) {
	s = spec{v6: v6, sport: 40000, dport: 443, flags: ack | psh, tcpOptions: timestamps, df: true, payload: payload(60000)}
	return s, 1400 - s.hdrLen()
}

// BenchmarkSegment splits one superpacket an iteration. Bytes are those that come out.
func BenchmarkSegment(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			b.Run(fmt.Sprintf("v6=%v/udp=%v", v6, udp), func(b *testing.B) {
				s, size := benchSuper(v6)
				s.udp = udp
				in, g := s.partial(), s.gso(size)
				views := cut(in, []int{s.hdrLen()})
				bufs, _ := buffers(64, 1500)
				var seg segmenter
				b.SetBytes(int64(len(in)))
				b.ReportAllocs()
				for b.Loop() {
					if d := seg.load(views, len(in), g); d != DropNone {
						b.Fatal(d)
					}
					seg.prime()
					for i := 0; seg.busy; i++ {
						seg.next(bufs[i][headroom:])
					}
				}
			})
		}
	}
}

// BenchmarkRead is the whole outbound path: dequeue, NAT, split.
func BenchmarkRead(b *testing.B) {
	for name, rules := range map[string][]NATRule{"NAT=no": nil, "NAT=yes": {rule("10.0.0.1", "172.31.255.1", "10.0.0.0/24")}} {
		for _, n := range []int{60000, 1000, 0} {
			b.Run(fmt.Sprintf("%s/payload=%d", name, n), func(b *testing.B) {
				s, size := benchSuper(false)
				s.payload = payload(n)
				pkt := outboundPacket(s.partial(), s.hdrLen(), s.gso(size))
				link := &fakeLink{forever: []*stack.PacketBuffer{pkt, pkt}}
				w := New(link, Options{})
				if err := w.SetNAT(rules); err != nil {
					b.Fatal(err)
				}
				bufs, sizes := buffers(w.BatchSize(), 1500)
				b.ReportAllocs()
				var packets, bytes int
				for b.Loop() {
					n, _ := w.Read(bufs, sizes, headroom)
					packets += n
					for _, k := range sizes[:n] {
						bytes += k
					}
				}
				b.SetBytes(int64(bytes / b.N))
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(packets), "ns/packet")
				w.Close()
				pkt.DecRef()
			})
		}
	}
}

// BenchmarkCoalesce is the whole inbound path for one batch: verify, coalesce, copy into packets of
// the stack. Bytes are those that come in.
func BenchmarkCoalesce(b *testing.B) {
	for _, flows := range []int{1, 8, 32} {
		for _, v6 := range []bool{false, true} {
			b.Run(fmt.Sprintf("flows=%d/v6=%v", flows, v6), func(b *testing.B) {
				const batch = 128
				var queues [][][]byte
				for f := range flows {
					s, size := benchSuper(v6)
					s.sport += uint16(f)
					queues = append(queues, s.plainSegments(size)[:40])
				}
				var in, bufs [][]byte
				total := 0
				for i := 0; len(in) < batch; i++ {
					q := queues[i%flows]
					p := q[i/flows%len(q)]
					in = append(in, p)
					bufs = append(bufs, append(make([]byte, headroom), p...))
					total += len(p)
				}
				w := New(new(fakeLink), Options{})
				defer w.Close()
				b.SetBytes(int64(total))
				b.ReportAllocs()
				for b.Loop() {
					for i := range in { // Write has changed them
						copy(bufs[i][headroom:], in[i][:80])
					}
					w.Write(bufs, headroom)
				}
				s := w.Stats().Inbound
				b.ReportMetric(float64(s.Segments)/float64(s.Packets), "segments/packet")
			})
		}
	}
}

// BenchmarkVerify is the part of BenchmarkCoalesce that reads every byte.
func BenchmarkVerify(b *testing.B) {
	for _, n := range []int{1348, 100, 0} {
		s := spec{flags: ack, tcpOptions: timestamps, payload: payload(n)}
		p := s.full()
		b.Run(fmt.Sprintf("payload=%d", n), func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			for b.Loop() {
				if _, _, d := verify(p); d != DropNone {
					b.Fatal(d)
				}
			}
		})
	}
}

// BenchmarkChecksum is the sum over the payload of one segment, and NAT's change of one.
func BenchmarkChecksum(b *testing.B) {
	p := payload(1348)
	b.Run("sum", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			sumOf(p)
		}
	})
	b.Run("mend", func(b *testing.B) {
		for b.Loop() {
			mend(p, 0x1234)
		}
	})
}

// BenchmarkPacketBuffer compares sizes of the views into which a superpacket is copied, see viewSize.
func BenchmarkPacketBuffer(b *testing.B) {
	s, size := benchSuper(false)
	segs := s.plainSegments(size)
	for _, n := range []int{2, 13, 25, 35, 45} {
		for _, view := range []int{8 << 10, 16 << 10, 32 << 10, 64 << 10} {
			b.Run(fmt.Sprintf("segments=%d/view=%d", n, view), func(b *testing.B) {
				var c coalescer
				c.begin(n)
				for _, p := range segs[:n] {
					p, l, _ := verify(p)
					c.add(p, &l)
				}
				g := &c.groups[0]
				b.SetBytes(int64(g.total))
				b.ReportAllocs()
				// A few are in flight at a time, as in a stack.
				var flight [8]*stack.PacketBuffer
				i := 0
				for b.Loop() {
					if p := flight[i%len(flight)]; p != nil {
						p.DecRef()
					}
					flight[i%len(flight)] = packetBufferOf(&c, g, view)
					i++
				}
				for _, p := range flight {
					if p != nil {
						p.DecRef()
					}
				}
			})
		}
	}
}

// BenchmarkStacks is one TCP flow between two stacks, with nothing between their Wrappers but a
// pump: what is left of a tunnel when encryption and sockets cost nothing. write is what the
// application writes at a time.
func BenchmarkStacks(b *testing.B) {
	for _, mtu := range []int{1280, 1400, 1420, 1500} {
		for _, write := range []int{4 << 10, 64 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("mtu=%d/write=%d", mtu, write), func(b *testing.B) {
				src := newNode(b, uint32(mtu), "10.0.0.1", "fd00::1")
				dst := newNode(b, uint32(mtu), "10.0.0.2", "fd00::2")
				stop := join(b, src, dst, DefaultBatchSize, nil)
				defer stop()
				at, proto := dst.full(0, 80)
				ln, err := gonet.ListenTCP(dst.Stack, at, proto)
				if err != nil {
					b.Fatal(err)
				}
				defer ln.Close()
				received := make(chan int64)
				go func() {
					c, err := ln.Accept()
					if err != nil {
						received <- 0
						return
					}
					n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
					c.Close()
					received <- n
				}()
				c, err := gonet.DialTCP(src.Stack, at, proto)
				if err != nil {
					b.Fatal(err)
				}
				data := make([]byte, write)
				b.SetBytes(int64(write))
				n := int64(0)
				for b.Loop() {
					k, err := c.Write(data)
					if err != nil {
						b.Fatal(err)
					}
					n += int64(k)
				}
				c.CloseWrite()
				if got := <-received; got != n {
					b.Errorf("%d bytes sent, %d received", n, got)
				}
				c.Close()
				s, r := src.Wrapper.Stats().Outbound, dst.Wrapper.Stats()
				b.ReportMetric(float64(s.Segments)/float64(s.Packets), "segments/sent")
				b.ReportMetric(float64(r.Inbound.Segments)/float64(r.Inbound.Packets), "segments/received")
				b.ReportMetric(float64(r.Outbound.Packets)/float64(n>>20+1), "acks/MiB")
			})
		}
	}
}

// tenRules are ten rules of which the last fits a connection to port 443 of peer b.
func tenRules() (rules []FilterRule) {
	for i := range uint16(9) {
		rules = append(rules, FilterRule{
			Deny: i%2 == 0, Direction: Direction(i%2) + 1, Peer: []string{"", "b", "c"}[i%3], Protocol: []string{"tcp", "udp"}[i%2],
			Ports: []PortRange{{22 + i, 23 + i}, {8000, 8080}}, To: prefixes("10.0.0.0/24", "fd00::/64"),
		})
	}
	return append(rules, FilterRule{Direction: Outbound, Peer: "b", Ports: ports(443)})
}

// BenchmarkFilter is the cost of the filter for one packet (or superpacket) under ten rules: of a known
// flow, of one that no rule fits, and of one that begins a flow. busy: 50,000 other flows are known.
func BenchmarkFilter(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, c := range []struct {
			name   string
			d      Direction
			packet []byte
			busy   bool
		}{
			{"known", Outbound, tcpOut(ack, 1, 443)[b2i(v6)], false},
			{"known,busy", Outbound, tcpOut(ack, 1, 443)[b2i(v6)], true},
			{"refused", Inbound, tcpIn(syn, 1, 1)[b2i(v6)], false},
			{"new", Outbound, tcpOut(syn, 1, 443)[b2i(v6)], false},
		} {
			b.Run(fmt.Sprintf("%s/v6=%v", c.name, v6), func(b *testing.B) {
				f := newFilterTestOf(b, FilterOptions{Rules: tenRules(), Peers: filterPeers, FlowsPerPeer: DefaultFlows})
				packet := c.packet
				l, _ := locate(packet, len(packet))
				if c.busy {
					for i := range uint16(50000) {
						f.passes(Outbound, tcpOut(ack, i, 443)[b2i(v6)])
					}
				}
				b.ReportAllocs()
				for i := uint16(0); b.Loop(); i++ {
					if c.name == "new" {
						packet[l.l4], packet[l.l4+1] = byte(i>>8), byte(i)
						if i%16384 == 0 {
							f.wait(time.Minute)
						}
					}
					f.judge(packet, &l, len(packet), c.d, f.now)
				}
			})
		}
	}
}

// BenchmarkFilterParallel is the cost for a known flow of its own for each of several goroutines.
func BenchmarkFilterParallel(b *testing.B) {
	f := newFilterTestOf(b, FilterOptions{Rules: tenRules(), Peers: filterPeers})
	var own atomic.Uint32
	b.RunParallel(func(pb *testing.PB) {
		packet := tcpOut(ack, uint16(own.Add(1)), 443)[0]
		l, _ := locate(packet, len(packet))
		for pb.Next() {
			f.judge(packet, &l, len(packet), Outbound, 0)
		}
	})
}
