package netstack

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The benchmarks carry bytes from one node to another, both in this process, over UDP on
// loopback. The engines differ in what lies between the two stacks:
//
//	penstock            as users get it
//	penstock-nogso      without superpackets, UDP_SEGMENT and UDP_GRO
//	wireguard-go        wireguard's device over our Wrapper and link endpoint
//	wireguard-netstack  wireguard's device over its own netstack
//
// cpu-s/GB is the processor time of the process, both ends and both stacks, by getrusage.

// An engine joins two nodes with the inner MTU.
type engine struct {
	name string
	join func(b testing.TB, mtu int) *joined
}

var engines = []engine{
	{"penstock", func(b testing.TB, mtu int) *joined { return joinPenstock(b, mtu, true) }},
	{"penstock-nogso", func(b testing.TB, mtu int) *joined { return joinPenstock(b, mtu, false) }},
	{"wireguard-go", joinWireguard},
	{"wireguard-netstack", joinWireguardNetstack},
}

// joined are two nodes, the dialling and the listening one.
type joined struct {
	dial   func(ctx context.Context, network, addr string) (net.Conn, error)
	listen func(port int) (net.Listener, error)
	packet func(port int) (net.PacketConn, error)
	sends  func() (records, calls uint64) // of the dialling side; nil: not known
	node   *Node                          // the dialling one, if it is one of ours
}

const serverIP = "10.66.0.2"

func joinPenstock(b testing.TB, mtu int, gso bool) *joined {
	x, y := pair(b, func(x, y *Config) {
		for _, c := range []*Config{x, y} {
			c.MTU = mtu
			c.NoGSO = !gso
			c.Socket.DisableGSO, c.Socket.DisableGRO = !gso, !gso
		}
	})
	return &joined{
		node:   x,
		dial:   x.Dial,
		listen: func(port int) (net.Listener, error) { return y.Listen("tcp", fmt.Sprintf("%s:%d", serverIP, port)) },
		packet: func(port int) (net.PacketConn, error) {
			return y.ListenPacket("udp", fmt.Sprintf("%s:%d", serverIP, port))
		},
		sends: func() (uint64, uint64) {
			s := x.transport.Status().Sockets[0].Stats
			return s.DatagramsOut, s.Sends
		},
	}
}

const defaultWrite = 64 << 10

// BenchmarkTunnelTCP carries one and eight TCP flows; an operation is one write of 64 KiB.
func BenchmarkTunnelTCP(b *testing.B) {
	for _, e := range engines {
		for _, flows := range []int{1, 8} {
			b.Run(fmt.Sprintf("engine=%s/flows=%d", e.name, flows), func(b *testing.B) {
				benchTCP(b, e.join(b, 1400), flows, defaultWrite)
			})
		}
	}
}

// BenchmarkTunnelMTU looks for a cliff over the inner MTU.
func BenchmarkTunnelMTU(b *testing.B) {
	for _, mtu := range []int{1280, 1300, 1320, 1340, 1360, 1380, 1400, 1412, 1420, 1440, 1460, 1480, 1500} {
		for _, flows := range []int{1, 8} {
			b.Run(fmt.Sprintf("mtu=%d/flows=%d", mtu, flows), func(b *testing.B) {
				benchTCP(b, joinPenstock(b, mtu, true), flows, defaultWrite)
			})
		}
	}
}

// BenchmarkTunnelWrite looks for a cliff over the size of the program's writes.
func BenchmarkTunnelWrite(b *testing.B) {
	for _, kib := range []int{4, 8, 16, 32, 64, 128, 256} {
		for _, flows := range []int{1, 8} {
			b.Run(fmt.Sprintf("write=%dKiB/flows=%d", kib, flows), func(b *testing.B) {
				benchTCP(b, joinPenstock(b, 1400, true), flows, kib<<10)
			})
		}
	}
}

// benchTCP writes b.N times write bytes over flows connections to readers on the other node.
func benchTCP(b *testing.B, j *joined, flows, write int) {
	ctx := within(b, 5*time.Minute)
	l, err := j.listen(8080)
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	var conns []net.Conn
	for range flows {
		wg.Go(func() {
			c, err := l.Accept()
			if err != nil {
				b.Error(err)
				return
			}
			defer c.Close()
			buf := make([]byte, 256<<10)
			for {
				if _, err := c.Read(buf); err != nil {
					if err != io.EOF {
						b.Errorf("read: %v", err)
					}
					return
				}
			}
		})
		c, err := j.dial(ctx, "tcp", serverIP+":8080")
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, c)
	}
	// Windows and pools grow to their size before the clock starts.
	const warm = 8 << 20
	send := func(c net.Conn, buf []byte, writes int) {
		for range writes {
			if _, err := c.Write(buf); err != nil {
				b.Errorf("write: %v", err)
				return
			}
		}
	}
	share := func(total, i int) int { return (total + i) / flows }
	run := func(total int, last bool) {
		var senders sync.WaitGroup
		for i, c := range conns {
			senders.Go(func() {
				send(c, make([]byte, write), share(total, i))
				if last {
					c.(interface{ CloseWrite() error }).CloseWrite()
				}
			})
		}
		senders.Wait()
	}
	run(warm/write, false)

	b.SetBytes(int64(write))
	b.ReportAllocs()
	meter := startMeter(b, j)
	b.ResetTimer()
	run(b.N, true)
	wg.Wait()
	b.StopTimer()
	meter.report(int64(b.N) * int64(write))
	for _, c := range conns {
		c.Close()
	}
}

// BenchmarkTunnelUDP sends datagrams of 1,200 bytes, with at most udpWindow of them under way, as a
// protocol with congestion control would; without that the sender only takes the receiver's
// processor time.
func BenchmarkTunnelUDP(b *testing.B) {
	for _, e := range engines {
		b.Run("engine="+e.name, func(b *testing.B) { benchUDP(b, e.join(b, 1400)) })
	}
}

const (
	udpSize   = 1200
	udpWindow = 1024
	// udpPatience is how long nothing may arrive before all that is under way counts as lost.
	udpPatience = 50 * time.Millisecond
)

func benchUDP(b *testing.B, j *joined) {
	pc, err := j.packet(5353)
	if err != nil {
		b.Fatal(err)
	}
	c, err := j.dial(within(b, time.Minute), "udp", serverIP+":5353")
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	var got atomic.Int64
	var reader sync.WaitGroup
	reader.Go(func() {
		buf := make([]byte, 2048)
		for {
			if _, _, err := pc.ReadFrom(buf); err != nil {
				return
			}
			got.Add(1)
		}
	})
	defer reader.Wait()
	defer pc.Close()

	payload := make([]byte, udpSize)
	lost := int64(0)
	send := func(n int64) {
		first := got.Load()
		settled := func(sent, window int64) bool { return sent-(got.Load()-first)-lost < window }
		wait := func(sent, window int64) {
			last, since := got.Load(), time.Now()
			for !settled(sent, window) {
				time.Sleep(50 * time.Microsecond)
				if now := got.Load(); now != last {
					last, since = now, time.Now()
				} else if time.Since(since) > udpPatience {
					lost = sent - (last - first)
				}
			}
		}
		for sent := range n {
			wait(sent, udpWindow)
			if _, err := c.Write(payload); err != nil {
				b.Fatal(err)
			}
		}
		wait(n, 1)
	}
	send(udpWindow) // the handshake, and pools grow
	lost = 0
	b.SetBytes(udpSize)
	b.ReportAllocs()
	before := got.Load()
	meter := startMeter(b, j)
	b.ResetTimer()
	send(int64(b.N))
	b.StopTimer()
	arrived := got.Load() - before
	meter.report(arrived * udpSize)
	b.ReportMetric(100*float64(int64(b.N)-arrived)/float64(b.N), "%lost")
}

// A meter reads clocks and counters around a measurement.
type meter struct {
	b     *testing.B
	j     *joined
	begin time.Time
	cpu   time.Duration
	out   [2]uint64
	tcp   [2]uint64 // retransmitted segments, timeouts
}

func startMeter(b *testing.B, j *joined) *meter {
	runtime.GC()
	m := &meter{b: b, j: j, begin: time.Now(), cpu: processTime(b)}
	if j.sends != nil {
		m.out[0], m.out[1] = j.sends()
	}
	if j.node != nil {
		m.tcp = j.tcp()
	}
	return m
}

// tcp counts the dialling side's retransmitted segments and its timeouts.
func (j *joined) tcp() [2]uint64 {
	s := j.node.stack.Stats().TCP
	return [2]uint64{s.Retransmits.Value(), s.Timeouts.Value()}
}

func (m *meter) report(bytes int64) {
	elapsed, cpu := time.Since(m.begin), processTime(m.b)-m.cpu
	gb := float64(bytes) / 1e9
	m.b.ReportMetric(gb*8/elapsed.Seconds(), "Gbit/s")
	if cpu > 0 {
		m.b.ReportMetric(cpu.Seconds()/gb, "cpu-s/GB")
	}
	if m.j.node != nil {
		tcp := m.j.tcp()
		m.b.ReportMetric(float64(tcp[0]-m.tcp[0])/gb, "rexmit/GB")
		m.b.ReportMetric(float64(tcp[1]-m.tcp[1])/gb, "timeouts/GB")
	}
	if m.j.sends != nil {
		if records, calls := m.j.sends(); calls > m.out[1] {
			m.b.ReportMetric(float64(records-m.out[0])/float64(calls-m.out[1]), "records/send")
		}
	}
}
