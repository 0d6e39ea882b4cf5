package netstack

import (
	"context"
	"net"
	"net/netip"
	"strconv"
)

// Publish brings a service that the system reaches into the VPN. Networks and
// listen are as for [Node.Listen] and [Node.ListenPacket]: an address of the node,
// or none for all of them. The system resolves and dials to, for each connection
// and for each UDP client anew. The service sees connections from this machine,
// not from the peer.
//
// Closing the relay, or the node, resets the connections that it carries.
func (n *Node) Publish(network, listen, to string) (*Relay, error) {
	proto, err := relayNetwork("publish", network, to)
	if err != nil {
		return nil, err
	}
	r := newRelay("publish", network, to, defaultLimits, n.log, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, proto, to)
	})
	if proto == "tcp" {
		l, err := n.Listen(network, listen)
		if err != nil {
			return nil, err
		}
		r.serveTCP(l)
		return n.ownRelay(r)
	}
	fronts, err := n.listenEach(network, listen)
	if err != nil {
		return nil, err
	}
	for _, c := range fronts {
		r.serveUDP(newVPNFront(c))
	}
	return n.ownRelay(r)
}

// listenEach opens a UDP socket for every address that listen means, all on the
// same port: a socket on several addresses does not know which one was asked, and
// the answer has to come from that one.
func (n *Node) listenEach(network, listen string) (conns []*UDPConn, err error) {
	hosts, port, err := n.listenHosts(network, listen)
	if err != nil {
		return nil, err
	}
	for _, host := range hosts {
		c, err := n.ListenPacket(network, net.JoinHostPort(host, port))
		if err != nil {
			for _, c := range conns {
				c.Close()
			}
			return nil, err
		}
		u := c.(*UDPConn)
		conns = append(conns, u)
		port = strconv.Itoa(u.LocalAddr().(*net.UDPAddr).Port) // if it was 0: the rest get the same
	}
	return conns, nil
}

// listenHosts are the addresses that listen means.
func (n *Node) listenHosts(network, listen string) (hosts []string, port string, err error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return nil, "", opError("listen", network, nil, nil, err)
	}
	_, version, _ := family(network)
	a, parseErr := netip.ParseAddr(host)
	switch {
	case host == "", parseErr == nil && a == netip.IPv6Unspecified():
	case parseErr == nil && a == netip.IPv4Unspecified():
		version = 4
	default:
		return []string{host}, port, nil
	}
	for _, a := range n.ownAddrs() {
		if version == 0 || (version == 4) == a.Is4() {
			hosts = append(hosts, a.String())
		}
	}
	if len(hosts) == 0 {
		return nil, "", opError("listen", network, nil, nil, &net.AddrError{Err: "no address of the family", Addr: listen})
	}
	return hosts, port, nil
}
