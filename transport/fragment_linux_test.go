package transport

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMayFragment asks the kernel what becomes of a datagram that is too big.
func TestMayFragment(t *testing.T) {
	for _, tt := range []struct {
		addr        string
		mayFragment bool
	}{
		{"127.0.0.1:0", false}, {"127.0.0.1:0", true}, {"[::1]:0", false}, {"[::1]:0", true},
	} {
		s, err := ListenUDP(netip.MustParseAddrPort(tt.addr), SocketOptions{MayFragment: tt.mayFragment})
		if err != nil {
			t.Fatal(err)
		}
		level, option := unix.SOL_IP, unix.IP_MTU_DISCOVER
		if s.inet6 {
			level, option = unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER
		}
		got := -1
		if err := s.raw.Control(func(fd uintptr) { got, err = unix.GetsockoptInt(int(fd), level, option) }); err != nil {
			t.Fatal(err)
		}
		// WANT and DONT fragment, DO and PROBE refuse (ip_mtu_discover in ip(7); the
		// numbers are the same for IPv6).
		if fragments := got == unix.IP_PMTUDISC_WANT || got == unix.IP_PMTUDISC_DONT; fragments != tt.mayFragment {
			t.Errorf("%s, MayFragment %v: MTU_DISCOVER is %d", tt.addr, tt.mayFragment, got)
		}
		if on := s.Capabilities().DontFragment.On; on == tt.mayFragment {
			t.Errorf("%s, MayFragment %v: DontFragment is reported %v", tt.addr, tt.mayFragment, on)
		}
		s.Close()
	}
}
