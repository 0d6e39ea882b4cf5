//go:build darwin || freebsd

package transport

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

const (
	errMessageTooBig = unix.EMSGSIZE
	messageTruncated = unix.MSG_TRUNC
)

// setDontFragment sets DF with the option of the socket's family. What a socket
// on [::] then does with IPv4 differs by system and version.
func setDontFragment(fd uintptr, local netip.Addr) Ability {
	if local.Is4() {
		return ability(os.NewSyscallError("IP_DONTFRAG",
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_DONTFRAG, 1)))
	}
	a := ability(os.NewSyscallError("IPV6_DONTFRAG",
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_DONTFRAG, 1)))
	if a.On && local.IsUnspecified() {
		a.Reason = "for IPv6; listen on 0.0.0.0 and [::] apart to have it for IPv4"
	}
	return a
}

func bufferSizes(fd uintptr) (receive, send int) {
	receive, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
	send, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
	return receive, send
}
