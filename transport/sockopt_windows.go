package transport

import (
	"net/netip"
	"os"

	"golang.org/x/sys/windows"
)

const (
	errMessageTooBig = windows.WSAEMSGSIZE // for sends, and for receives that did not fit
	messageTruncated = 0

	ipDontFragment   = 14 // IP_DONTFRAGMENT, ws2ipdef.h
	ipv6DontFragment = 14 // IPV6_DONTFRAG, ws2ipdef.h
)

// setDontFragment sets DF, on a socket on [::] for IPv4 too.
func setDontFragment(fd uintptr, local netip.Addr) Ability {
	h := windows.Handle(fd)
	if !local.Is4() {
		if err := windows.SetsockoptInt(h, windows.IPPROTO_IPV6, ipv6DontFragment, 1); err != nil {
			return ability(os.NewSyscallError("IPV6_DONTFRAG", err))
		}
		if !local.IsUnspecified() {
			return abilityOn()
		}
	}
	return ability(os.NewSyscallError("IP_DONTFRAGMENT",
		windows.SetsockoptInt(h, windows.IPPROTO_IP, ipDontFragment, 1)))
}

func bufferSizes(fd uintptr) (receive, send int) {
	receive, _ = windows.GetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_RCVBUF)
	send, _ = windows.GetsockoptInt(windows.Handle(fd), windows.SOL_SOCKET, windows.SO_SNDBUF)
	return receive, send
}
