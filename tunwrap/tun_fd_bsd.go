//go:build darwin || freebsd || openbsd

package tunwrap

import (
	"os"

	"golang.zx2c4.com/wireguard/tun"
)

func tunFromFD(fd, mtu int) (tun.Device, error) {
	return tun.CreateTUNFromFile(os.NewFile(uintptr(fd), "tun"), mtu)
}
