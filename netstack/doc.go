// Package netstack is a VPN node for Go programs: a TCP/IP stack in userspace
// whose packets travel to peers as DTLS records in UDP datagrams. It needs no
// privileges and any number of nodes fit in one process.
//
//	app ─ netstack ─ linkep ─ tunwrap ─ transport ─ UDP
//
// A [Node] gives and takes standard net types:
//
//	node, err := netstack.New(netstack.Config{
//		PrivateKey: key,
//		Addresses:  []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
//		Peers: []netstack.Peer{{
//			PublicKey:  peerKey,
//			Endpoint:   "b.example.net:5182",
//			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.66.0.2/32")},
//		}},
//	})
//	...
//	conn, err := node.Dial(ctx, "tcp", "10.66.0.2:80")
//
// Outbound means from the local stack towards a peer, inbound from a peer.
//
// # Which packets leave
//
// Packets leave only to addresses that some peer's AllowedIPs cover. Dial and
// WriteTo fail at once with ENETUNREACH for any other address but the node's
// own, and a node without an address of a family does not speak it.
//
// # Errors
//
// Errors are [net.OpError]s. A connection, listener or node that was closed here
// gives [net.ErrClosed], a deadline [os.ErrDeadlineExceeded], and what the peer or
// the stack reports is a [syscall.Errno] such as ECONNREFUSED, so errors.Is works as
// for the system's own sockets.
package netstack
