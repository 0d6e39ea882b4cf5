package netstack

import (
	"net/netip"

	"github.com/penstock-vpn/penstock/transport"
)

// Capabilities are what the kernel does for a UDP socket.
type Capabilities = transport.Capabilities

// Probe tells what this machine's kernel does for a node's UDP sockets, by the
// example of one on loopback. A socket on another interface may do less; its own are
// in [Node.Status].
func Probe() (Capabilities, error) {
	s, err := transport.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), transport.SocketOptions{})
	if err != nil {
		return Capabilities{}, err
	}
	defer s.Close()
	return s.Capabilities(), nil
}
