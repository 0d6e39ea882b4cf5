// Package config reads the TOML file of a node.
//
// It finds as many mistakes of a file as it can in one go, and says of each the
// file, the line, the key, what is wrong and what is expected: see [Mistake].
// A [Config] that it returns without error needs no more checking; only what the
// machine may refuse (a port in use, a name that does not resolve) is left.
package config

import (
	"log/slog"
	"net/netip"

	"github.com/penstock-vpn/penstock/netstack"
)

// Config is one file, checked.
type Config struct {
	File      string
	Node      Node
	Peers     []Peer
	Forwards  []Port // a port of the VPN, brought to a listener of this machine
	Publishes []Port // a service of this machine, brought into the VPN
	DNS       netstack.DNS
	Router    *netstack.RouterConfig // nil: the node routes nothing
	ACL       []netstack.ACLRule     // empty: everything passes
	ACLLimits netstack.ACLLimits
	Proxy     Proxy
	TUN       *TUN // nil: the node has no interface of the kernel
	Offload   Offload
	TCP       netstack.TCPOptions
	Timing    netstack.Timing

	// Warnings do not stop a node, but its owner should know.
	Warnings Mistakes
}

// Node is the [node] table.
type Node struct {
	PrivateKey netstack.PrivateKey
	// Addresses are the inner addresses; the host bits are kept.
	Addresses []netip.Prefix
	// Listen are the UDP sockets. Empty: one port of the system's choice.
	Listen []netip.AddrPort
	MTU    int    // bytes of the largest inner packet; 0: from the path
	Queues int    // of what the stack sends, each with a goroutine; 0: the default
	Socket string // path of the control socket; empty: the default
	// SocketGroup may open the control socket; empty: this user alone.
	SocketGroup string
	// CipherSuites in order of preference; nil: the default order.
	CipherSuites []netstack.CipherSuite
	Speedtest    bool // peers may measure the throughput to this node
	LogLevel     slog.Level
	LogFormat    string // "text" or "json"
}

// Peer is one [[peer]] table.
type Peer struct {
	Name       string
	PublicKey  netstack.PublicKey
	Endpoint   string // "host:port"; empty: the peer calls
	AllowedIPs []netip.Prefix
	KnownAs    []netip.Addr // at most one IPv4 and one IPv6 address
}

// Port is one [[forward]] or [[publish]] table.
type Port struct {
	Network string // "tcp", "tcp4", "tcp6", "udp", "udp4" or "udp6"; the family is that of Listen alone
	Listen  string // "host:port"; the host may be empty
	To      string // "host:port"
}

// Offload is the [offload] table: what to leave out of the fast path, for
// comparison or because a kernel or a network card gets it wrong.
type Offload struct {
	NoSuperpackets bool // the TCP stack makes packets of at most the MTU
	NoGSO          bool // no UDP_SEGMENT on the sockets
	NoGRO          bool // no UDP_GRO on the sockets
	// Bytes of the sockets' buffers; 0: the default.
	SendBuffer, ReceiveBuffer int
	MaxSegments               int // datagrams of one segmented send at most; 0: what the kernel takes
	PacingRate                int // bytes per second that a socket sends at most; 0: no limit
}
