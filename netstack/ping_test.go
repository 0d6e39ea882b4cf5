package netstack

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

func TestPing(t *testing.T) {
	a, b := pair(t, nil)
	for _, to := range []string{"10.66.0.2", "fd66::2", "10.66.0.1", "::ffff:10.66.0.2"} {
		addr := netip.MustParseAddr(to)
		for i, size := range []int{0, 1, 56, 1400, 9000, maxPing} {
			r, err := a.Ping(within(t, patience), addr, PingOptions{Size: size, Sequence: uint16(i)})
			if err != nil {
				t.Errorf("%s with %d bytes: %v", to, size, err)
				continue
			}
			if r.From != addr.Unmap() || r.Size != size+8 || r.TTL != 64 || r.RTT <= 0 || r.RTT > patience {
				t.Errorf("%s with %d bytes: %+v", to, size, r)
			}
		}
	}
	if _, err := a.Ping(t.Context(), netip.MustParseAddr("192.0.2.1"), PingOptions{}); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("nobody's address: %v", err)
	}
	if _, err := a.Ping(t.Context(), netip.MustParseAddr("10.66.0.2"), PingOptions{Size: maxPing + 1}); !errors.Is(err, syscall.EMSGSIZE) {
		t.Errorf("too large: %v", err)
	}
	b.Close()
	began := time.Now()
	if _, err := a.Ping(within(t, 100*time.Millisecond), netip.MustParseAddr("10.66.0.2"), PingOptions{}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a peer that is gone: %v", err)
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("waited for %v", took)
	}
	a.Close()
	if _, err := a.Ping(t.Context(), netip.MustParseAddr("10.66.0.2"), PingOptions{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
