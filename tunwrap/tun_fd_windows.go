package tunwrap

import (
	"errors"

	"golang.zx2c4.com/wireguard/tun"
)

func tunFromFD(int, int) (tun.Device, error) {
	return nil, errors.New("interfaces are not files on Windows")
}
