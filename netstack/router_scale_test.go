package netstack

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// echoEnv makes this test binary the target of TestRouterManyFlows, whose sockets then
// are not among the descriptors of the router: many systems give a process 20,000.
const echoEnv = "PENSTOCK_TEST_ECHO"

// echoUntilEOF echoes what connections send, prints its address, and returns when
// standard input ends.
func echoUntilEOF() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 1000)
				for {
					n, err := c.Read(b)
					if err != nil {
						return
					}
					if _, err := c.Write(b[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	io.Copy(io.Discard, os.Stdin)
	return l.Close()
}

// echoProcess starts the target and gives its address.
func echoProcess(t *testing.T) net.Addr {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(within(t, 5*time.Minute), self, "-test.run=^TestRouterManyFlows$")
	cmd.Env = append(os.Environ(), echoEnv+"=1")
	cmd.Stderr = os.Stderr
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		hold.Close()
		io.Copy(io.Discard, out)
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	at, err := net.ResolveTCPAddr("tcp", strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// TestRouterManyFlows: 10,000 connections at once through one router, all of which carry
// data, and again after they have been idle.
func TestRouterManyFlows(t *testing.T) {
	if os.Getenv(echoEnv) != "" {
		if err := echoUntilEOF(); err != nil {
			t.Fatal(err)
		}
		return
	}
	flows := 10_000
	if testing.Short() || raceEnabled {
		flows = 1000
	}
	at := echoProcess(t)
	a, b := routedPair(t, nil)
	memory := func() int {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapInuse + m.StackInuse)
	}
	conns := make([]net.Conn, flows)
	before := memory()
	var next atomic.Int64
	each := func(do func(i int) bool) {
		next.Store(0)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < flows; i = int(next.Add(1)) - 1 {
					if !do(i) {
						return
					}
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.Fatalf("%+v", b.Status().Router)
		}
	}
	talk := func(i int) bool {
		c := conns[i]
		c.SetDeadline(time.Now().Add(patience))
		sent := randomBytes(1000)
		got := make([]byte, len(sent))
		if _, err := c.Write(sent); err != nil {
			t.Errorf("flow %d: %v", i, err)
			return false
		}
		if _, err := io.ReadFull(c, got); err != nil || string(got) != string(sent) {
			t.Errorf("flow %d: %v", i, err)
			return false
		}
		return true
	}
	each(func(i int) bool {
		host := netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i%200)}).String()
		c, err := a.Dial(within(t, time.Minute), "tcp", hostPort(host, at))
		if err != nil {
			t.Errorf("flow %d: %v", i, err)
			return false
		}
		conns[i] = c
		return talk(i)
	})
	s := b.Status().Router
	if s.TCP.Open != flows {
		t.Errorf("%d of %d open: %+v", s.TCP.Open, flows, s)
	}
	each(talk)
	idle := (memory() - before) / flows
	t.Logf("%d flows; an idle one takes %d bytes, the client's end included", flows, idle)
	if idle > 100_000 {
		t.Errorf("%d bytes an idle flow, bound 100,000", idle)
	}
	each(func(i int) bool { conns[i].Close(); return true })
	waitRouter(t, b, func(s *RouterStatus) bool { return s.TCP.Open == 0 })
}

// TestRouterChurn: rounds of flows of every kind and fate, with a peer that comes and goes and a
// target that vanishes. After each round the router holds what it held before.
func TestRouterChurn(t *testing.T) {
	at := serveTCP(t, echoTCP)
	_, port, _ := net.SplitHostPort(udpService(t))
	var vanished atomic.Bool
	a, b := routedPair(t, func(_, b *Config) {
		b.Router.Timeouts = RouterTimeouts{UDPIdle: 200 * time.Millisecond}
		b.Router.Flow = func(ctx context.Context, f Flow) (net.Conn, error) {
			if vanished.Load() && f.Dst.Addr().As16()[15]%2 == 0 {
				// A host that has been switched off. The others may take longer than this.
				ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
				defer cancel()
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return toLoopback(ctx, f)
		}
	})
	// Connections linger in TIME-WAIT for a minute (RFC 9293 3.6.1), too long for a test.
	for _, s := range []*stack.Stack{a.stack, b.router.stack} {
		wait := tcpip.TCPTimeWaitTimeoutOption(50 * time.Millisecond)
		if terr := s.SetTransportProtocolOption(tcp.ProtocolNumber, &wait); terr != nil {
			t.Fatal(terr)
		}
	}
	round := func(n int) {
		vanished.Store(n%2 == 1)
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				host := netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}).String()
				c, err := a.Dial(ctx, "tcp", hostPort(host, at))
				if err != nil {
					if !vanished.Load() {
						t.Error(err)
					}
					return
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(patience))
				c.Write(randomBytes(10_000))
				switch i % 4 {
				case 0: // reads a part and leaves
					io.ReadFull(c, make([]byte, 100))
				case 1: // leaves at once, with a reset
					c.(*TCPConn).SetLinger(0)
				case 2:
					c.(*TCPConn).CloseWrite()
					if n, err := io.Copy(io.Discard, c); n != 10_000 || err != nil {
						t.Errorf("%d bytes, %v", n, err)
					}
				case 3: // says nothing more
				}
			})
			wg.Go(func() {
				host := netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}).String()
				c, err := a.Dial(t.Context(), "udp", net.JoinHostPort(host, port))
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				c.Write([]byte(strconv.Itoa(i)))
			})
		}
		wg.Wait()
		waitRouter(t, b, func(s *RouterStatus) bool { return s.TCP.Open == 0 && s.UDP.Open == 0 })
	}
	held := func() (goroutines, files, heap int) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine(), openFiles(), int(m.HeapAlloc)
	}
	settled := func() { // closing connections linger in the stacks for a moment
		for range 20 {
			time.Sleep(20 * time.Millisecond)
			runtime.GC()
		}
	}
	rounds := 6
	if testing.Short() || raceEnabled {
		rounds = 4
	}
	round(0)
	round(1) // pools and maps have grown to their size
	settled()
	g0, f0, h0 := held()
	for n := range rounds {
		round(n)
	}
	settled()
	g1, f1, h1 := held()
	more := func() bool { return g1 > g0+10 || f1 > f0+10 || h1 > h0+4<<20 }
	for end := time.Now().Add(patience); more() && time.Now().Before(end); g1, f1, h1 = held() {
		time.Sleep(20 * time.Millisecond) // what was not given back will not be later either
	}
	t.Logf("after %d rounds: %d goroutines, were %d; %d descriptors, were %d; heap %d KB, was %d KB",
		rounds, g1, g0, f1, f0, h1>>10, h0>>10)
	if more() {
		t.Error("something was not given back")
	}
}
