package speed

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/vpntest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T, opts ...vpntest.Option) (a, b *netstack.Node, s *Server) {
	t.Helper()
	a, b = vpntest.Pair(t, opts...)
	s, err := Serve(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return a, b, s
}

func TestSpeed(t *testing.T) {
	a, b, _ := serve(t)
	sampled := 0 // tests; on a busy machine a short one may be over before its first sample
	for _, addr := range b.Addresses() {
		for _, test := range []Test{
			{Network: "tcp", Flows: 1},
			{Network: "tcp", Flows: 5, Inbound: true},
			{Network: "udp", Flows: 3, Datagram: 1200, Rate: 20e6},
			{Network: "udp", Flows: 2, Datagram: 1200, Rate: 20e6, Inbound: true},
		} {
			test.Duration = 600 * time.Millisecond
			samples := 0
			r, err := Run(t.Context(), a, addr.Addr(), test, func(s Sample) {
				samples++
				if s.Of != 0.6 || s.Elapsed <= 0 || s.Elapsed > 0.6 {
					t.Errorf("sample %+v", s)
				}
			})
			if err != nil {
				t.Errorf("%+v: %v", test, err)
				continue
			}
			if r.Bytes == 0 || r.Seconds <= 0 || (r.Direction == "inbound") != test.Inbound {
				t.Errorf("%+v: %+v", test, r)
			}
			if samples > 0 {
				sampled++
			}
			if test.Network == "udp" {
				// A machine that is busy sends less than it should, never more.
				if r.DatagramsSent == 0 || r.BitsPerSecond > 24e6 || r.LostPercent > 20 {
					t.Errorf("%+v: %+v", test, r)
				}
				if r.Bytes != r.DatagramsReceived*1200 {
					t.Errorf("%+v: %d bytes in %d datagrams", test, r.Bytes, r.DatagramsReceived)
				}
			}
		}
	}
	if sampled < 4 {
		t.Errorf("%d of 8 tests told their progress", sampled)
	}
}

// TestSpeedLoss: what the wire loses is told.
func TestSpeedLoss(t *testing.T) {
	nw := vpntest.NewNetwork(t, vpntest.Wire{})
	a, b, _ := serve(t, nw)
	nw.SetLoss(0.3)
	r, err := Run(t.Context(), a, b.Addresses()[0].Addr(), Test{Network: "udp", Flows: 1, Datagram: 1000, Rate: 8e6, Duration: time.Second}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.LostPercent < 20 || r.LostPercent > 40 {
		t.Errorf("30%% were lost; %+v", r)
	}
}

func TestSpeedRefusals(t *testing.T) {
	a, b, s := serve(t)
	to := b.Addresses()[0].Addr()
	good := Test{Network: "tcp", Flows: 1, Duration: 5 * time.Second}
	for what, test := range map[string]Test{
		"network": {Network: "sctp", Flows: 1, Duration: time.Second}, "flows": {Network: "tcp", Flows: MaxFlows + 1, Duration: time.Second},
		"duration": {Network: "tcp", Flows: 1, Duration: time.Hour}, "datagram": {Network: "udp", Flows: 1, Duration: time.Second, Datagram: 3},
	} {
		if _, err := Run(t.Context(), a, to, test, nil); err == nil || !strings.Contains(err.Error(), "expected") {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The server checks too, answers garbage, and gives nothing to who does not know the token.
	for says, want := range map[string]string{
		`{"hello":"test","network":"tcp","flows":1000,"duration_ns":1000000000}`: "expected 1 to 64",
		`{"hello":"flow","token":"0000000000000000"}`:                            "no such test",
		`{}`:                      "expected a test or a flow",
		`GET / HTTP/1.1`:          "no speed test",
		strings.Repeat("x", 8192): "buffer full",
	} {
		c, err := a.Dial(t.Context(), "tcp", net.JoinHostPort(to.String(), strconv.Itoa(Port)))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(10 * time.Second))
		c.Write([]byte(says + "\n"))
		if got, err := io.ReadAll(c); !bytes.Contains(got, []byte(want)) && err == nil {
			t.Errorf("%.40s: %q, want %q", says, got, want)
		}
		c.Close()
	}
	// One at a time; one that gives up makes room.
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	began := make(chan struct{})
	go func() {
		once := false
		_, err := Run(ctx, a, to, good, func(Sample) {
			if !once {
				once = true
				close(began)
			}
		})
		first <- err
	}()
	select {
	case <-began:
	case err := <-first:
		t.Fatalf("over before its first sample: %v", err)
	}
	if _, err := Run(t.Context(), a, to, good, nil); err == nil || !strings.Contains(err.Error(), "another test is running") {
		t.Errorf("beside another: %v", err)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	short := good
	short.Duration = 100 * time.Millisecond
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := Run(t.Context(), a, to, short, nil); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatalf("after one that gave up: %v", err)
		}
	}
	// Close in the middle of a test.
	go func() {
		_, err := Run(t.Context(), a, to, good, nil)
		first <- err
	}()
	time.Sleep(200 * time.Millisecond)
	s.Close()
	if err := <-first; err == nil {
		t.Error("a test outlived its server")
	}
	if _, err := Run(t.Context(), a, netip.MustParseAddr("192.0.2.1"), good, nil); err == nil {
		t.Error("measured an address that nobody has")
	}
}
