package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/penstock-vpn/penstock/transport"
)

// Forward brings a service inside the VPN to a listener of the system, so that any
// program can use it. Networks are tcp, tcp4, tcp6, udp, udp4 and udp6, and say
// which addresses are listened on, as in [net.Listen]; to is dialled with
// [Node.Dial], for each connection and for each UDP client anew, so a name in it is
// resolved inside the VPN if Config.DNS says so.
//
// Closing the relay, or the node, resets the connections that it carries.
func (n *Node) Forward(network, listen, to string) (*Relay, error) {
	proto, err := relayNetwork("forward", network, to)
	if err != nil {
		return nil, err
	}
	r := newRelay("forward", network, to, defaultLimits, n.log, func(ctx context.Context) (net.Conn, error) {
		return n.Dial(ctx, proto, to)
	})
	if proto == "tcp" {
		l, err := net.Listen(network, listen)
		if err != nil {
			return nil, err
		}
		r.serveTCP(l)
	} else {
		s, err := listenSystemUDP(network, listen)
		if err != nil {
			return nil, err
		}
		r.serveUDP(newSystemFront(s))
	}
	return n.ownRelay(r)
}

// relayNetwork checks what relays have in common and returns "tcp" or "udp".
func relayNetwork(op, network, to string) (string, error) {
	proto, _, ok := family(network)
	if !ok {
		return "", badNetwork(op, network)
	}
	host, port, err := net.SplitHostPort(to)
	if err == nil && (host == "" || !isPort(port)) {
		err = &net.AddrError{Err: "not a host and a port", Addr: to}
	}
	if err != nil {
		return "", fmt.Errorf("netstack: %s: %w", op, err)
	}
	return proto, nil
}

// ownRelay makes r close with the node. It takes r.
func (n *Node) ownRelay(r *Relay) (*Relay, error) {
	disown, err := n.adopt(r)
	if err != nil {
		r.Close()
		return nil, opError("listen", r.network, nil, r.addr, err)
	}
	r.mu.Lock()
	r.disown = disown
	r.mu.Unlock()
	return r, nil
}

// relays are the statuses of the node's relays. n.mu is not held.
func (n *Node) relays() []RelayStatus {
	n.mu.Lock()
	var all []*Relay
	for c := range n.owned {
		if r, ok := c.Closer.(*Relay); ok {
			all = append(all, r)
		}
	}
	n.mu.Unlock()
	return relayStatuses(all)
}

// listenSystemUDP opens a UDP socket of the system. Without a host it takes both
// families where the system has them.
func listenSystemUDP(network, listen string) (*transport.UDPSocket, error) {
	opts := transport.SocketOptions{MayFragment: true, V6Only: network == "udp6"}
	host, _, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, opError("listen", network, nil, nil, err)
	}
	a, err := net.ResolveUDPAddr(network, listen)
	if err != nil {
		return nil, opError("listen", network, nil, nil, err)
	}
	addr := unmap(a.AddrPort())
	if host != "" {
		return transport.ListenUDP(addr, opts)
	}
	any4 := netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port())
	if network == "udp4" {
		return transport.ListenUDP(any4, opts)
	}
	s, err := transport.ListenUDP(netip.AddrPortFrom(netip.IPv6Unspecified(), addr.Port()), opts)
	if network == "udp" && errors.Is(err, syscall.EAFNOSUPPORT) {
		return transport.ListenUDP(any4, opts)
	}
	return s, err
}
