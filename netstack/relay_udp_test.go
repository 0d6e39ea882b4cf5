package netstack

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

// udpService answers every datagram with itself, behind a mark, until the test
// ends.
func udpService(t *testing.T) string {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, maxDatagram)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteToUDPAddrPort(buf[:n], from)
			}
		}
	}()
	t.Cleanup(func() { c.Close(); <-ended })
	return c.LocalAddr().String()
}

// dialUDP connects to the relay at one of the addresses of this machine.
func dialUDP(t *testing.T, r *Relay, ip string) *net.UDPConn {
	t.Helper()
	port := r.Addr().(*net.UDPAddr).Port
	c, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.ParseIP(ip), Port: port})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func exchange(t *testing.T, c net.Conn, sent []byte) {
	t.Helper()
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, maxDatagram)
	n, err := c.Read(got)
	if err != nil || !bytes.Equal(got[:n], sent) {
		t.Fatalf("sent %d bytes, got %d, %v", len(sent), n, err)
	}
}

// TestRelayUDP: datagrams of every size keep their edges, each client has its own
// flow, and the answer comes from the address that was asked: a connected socket
// takes no other.
func TestRelayUDP(t *testing.T) {
	r := testRelay(t, "udp", udpService(t), defaultLimits)
	var all uint64
	for _, ip := range []string{"127.0.0.1", "127.0.0.2", "127.9.9.9"} {
		c := dialUDP(t, r, ip)
		for _, size := range []int{0, 1, 1200, 1473, 9000, 65507} {
			exchange(t, c, randomBytes(size))
			all += uint64(size)
		}
	}
	// What has been sent is counted a moment later.
	s := waitStatus(t, r, func(s RelayStatus) bool {
		return s.OutboundDatagrams >= 18 && s.InboundDatagrams >= 18 && s.OutboundBytes >= all && s.InboundBytes >= all
	})
	if s.Open != 3 || s.Total != 3 || s.OutboundDatagrams != 18 || s.InboundDatagrams != 18 ||
		s.OutboundBytes != all || s.InboundBytes != all || s.DroppedDatagrams != 0 {
		t.Errorf("status %+v, want 3 flows with 6 datagrams each way and %d bytes in all", s, all)
	}
}

// TestRelayUDPIdle: a silent client is forgotten, one that is not is kept, and the
// forgotten one may come again.
func TestRelayUDPIdle(t *testing.T) {
	limits := defaultLimits
	limits.udpIdle = 300 * time.Millisecond
	for !relayUDPIdle(t, limits) {
		// The test itself was not busy enough, on a machine that is. More patience:
		if limits.udpIdle *= 2; limits.udpIdle > patience/3 {
			t.Fatal("this machine stood still for seconds, again and again")
		}
	}
}

// relayUDPIdle gives false when the busy client was silent for so long that it may have been
// forgotten: then the try has shown nothing.
func relayUDPIdle(t *testing.T, limits relayLimits) bool {
	r := testRelay(t, "udp", udpService(t), limits)
	silent, busy := dialUDP(t, r, "127.0.0.1"), dialUDP(t, r, "127.0.0.1")
	exchange(t, silent, []byte("once"))
	var silence time.Duration // of the busy client, the longest
	began := time.Now()
	last := began
	s := r.Status()
	for ; time.Since(began) < 2*limits.udpIdle || s.Open != 1; s = r.Status() {
		exchange(t, busy, []byte("again and again")) // its deadline ends this loop
		now := time.Now()
		silence, last = max(silence, now.Sub(last)), now
		time.Sleep(limits.udpIdle / 50)
	}
	if silence > limits.udpIdle/2 || time.Since(last) > limits.udpIdle/2 {
		return false
	}
	if s.Total != 2 {
		t.Errorf("%d flows in all, want 2: the busy client must keep its own", s.Total)
	}
	exchange(t, silent, []byte("back"))
	if s := r.Status(); s.Total != 3 {
		t.Errorf("%d flows in all, want 3: the silent client's was forgotten", s.Total)
	}
	return true
}

func TestRelayUDPFull(t *testing.T) {
	limits := defaultLimits
	limits.flows = 1
	r := testRelay(t, "udp", udpService(t), limits)
	old, more := dialUDP(t, r, "127.0.0.1"), dialUDP(t, r, "127.0.0.1")
	exchange(t, old, []byte("first"))
	more.Write([]byte("one too many"))
	waitStatus(t, r, func(s RelayStatus) bool { return s.Refused == 1 && s.DroppedDatagrams == 1 })
	exchange(t, old, []byte("still here"))
}

// TestRelayUDPWaits: what a client sends while its service is dialled arrives in
// order, up to a bound.
func TestRelayUDPWaits(t *testing.T) {
	to := udpService(t)
	dial := make(chan struct{})
	r := testRelayDial(t, "udp", to, defaultLimits, func(ctx context.Context) (net.Conn, error) {
		<-dial
		return new(net.Dialer).DialContext(ctx, "udp", to)
	})
	c := dialUDP(t, r, "127.0.0.1")
	for i := range byte(maxWaiting + 3) {
		c.Write([]byte{i})
	}
	waitStatus(t, r, func(s RelayStatus) bool { return s.DroppedDatagrams == 3 })
	close(dial)
	b := make([]byte, 2)
	for i := range byte(maxWaiting) {
		if n, err := c.Read(b); err != nil || n != 1 || b[0] != i {
			t.Fatalf("datagram %d: %v, %v", i, b[:n], err)
		}
	}
}

// TestRelayUDPRefused: nobody listens at the service yet.
func TestRelayUDPRefused(t *testing.T) {
	s, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	at := s.LocalAddr().(*net.UDPAddr)
	s.Close()
	r := testRelay(t, "udp", at.String(), defaultLimits)
	c := dialUDP(t, r, "127.0.0.1")
	c.Write([]byte("anybody there?"))
	waitStatus(t, r, func(s RelayStatus) bool { return s.Failed > 0 && s.Open == 1 })
	s, err = net.ListenUDP("udp4", at)
	if err != nil {
		t.Skip("the port was taken meanwhile: ", err)
	}
	defer s.Close()
	c.Write([]byte("and now?"))
	s.SetDeadline(time.Now().Add(patience))
	b := make([]byte, 100)
	if n, _, err := s.ReadFromUDPAddrPort(b); err != nil || string(b[:n]) != "and now?" {
		t.Errorf("the service, once there, got %q, %v", b[:n], err)
	}
}

// FuzzRuns: whatever the sizes, runs carry the datagrams in order and keep the
// rules of transport.Run.
func FuzzRuns(f *testing.F) {
	f.Add([]byte{0, 10, 0, 10, 0, 10, 0, 3, 0, 10})
	f.Add([]byte{0, 0, 0, 0, 0, 1, 0, 1, 0, 0})
	f.Add([]byte{0x3f, 0xff, 0x3f, 0xff, 0x3f, 0xff, 0x3f, 0xff, 0x3f, 0xff})
	f.Add(bytes.Repeat([]byte{4, 176}, 64))
	f.Add([]byte{0, 5, 0, 6, 0, 7, 0, 6, 0, 6})
	f.Fuzz(func(t *testing.T, sizes []byte) {
		b := newBurst()
		defer bursts.Put(b)
		for ; len(sizes) >= 2; sizes = sizes[2:] {
			room := b.room()
			if room == nil {
				break
			}
			size := min(int(sizes[0])<<8|int(sizes[1]), maxDatagram)
			for i := range size {
				room[i] = byte(b.n)
			}
			b.add(size)
		}
		to, from := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddr("192.0.2.2")
		next := 0
		for _, run := range b.toRuns(to, from) {
			if run.Remote != to || run.Local != from {
				t.Fatalf("run between %v and %v", run.Remote, run.Local)
			}
			total := 0
			for i, d := range run.Segments {
				if next == b.n || !bytes.Equal(d, b.datagrams[next]) {
					t.Fatalf("datagram %d of %d is not the next", next, b.n)
				}
				next++
				total += len(d)
				switch first := len(run.Segments[0]); {
				case len(d) > first, i < len(run.Segments)-1 && len(d) != first:
					t.Fatalf("datagram %d of a run has %d bytes after %d", i, len(d), first)
				case len(d) == 0 && len(run.Segments) > 1:
					t.Fatal("an empty datagram that is not alone")
				}
			}
			if len(run.Segments) == 0 || len(run.Segments) > transport.MaxRunSegments ||
				len(run.Segments) > 1 && total > transport.MaxRunBytes {
				t.Fatalf("run of %d datagrams and %d bytes", len(run.Segments), total)
			}
		}
		if next != b.n {
			t.Fatalf("%d of %d datagrams in runs", next, b.n)
		}
	})
}
