package netstack

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

// Config describes a [Node]. PrivateKey and Addresses are required, unless OpenConnect is set.
type Config struct {
	PrivateKey PrivateKey
	// Addresses are the node's own, inside the VPN. Only the address of a prefix
	// counts: what lies beside it belongs to whichever peer's AllowedIPs cover it.
	Addresses []netip.Prefix

	// Listen are the UDP sockets. Empty means one on a port of the system's
	// choice, for IPv4 and IPv6.
	Listen []netip.AddrPort
	Socket transport.SocketOptions
	// Conns are used instead of Listen, for example an in-memory wire in a test.
	// The Node takes them: they are closed with it, and when New fails.
	Conns []transport.PacketConn

	// MTU is the largest IP packet that leaves, in bytes. 0 starts with
	// [transport.DefaultInnerMTU] and follows what the path carries.
	MTU int

	Peers []Peer
	// ResolveEndpoint turns a peer's Endpoint into addresses, on every reconnect; nil: the system's
	// resolver does. A node whose interface takes the system's questions into the tunnel needs
	// another way to find its peers. The OpenConnect server is found so, too, when it is called again.
	ResolveEndpoint func(endpoint string) ([]netip.AddrPort, error)

	// OpenConnect makes the node a client of an OpenConnect server, besides the peers it may have;
	// nil: it is none. Addresses stay empty then, and PrivateKey may.
	OpenConnect *OpenConnect

	// Router makes the node a subnet router; nil: it routes nothing.
	Router *RouterConfig

	// Switch lets peers reach each other through a node that is a router: their packets are passed on as
	// they are. Without it they are refused.
	Switch bool

	// ACL decides which packets pass between the node and its peers; empty: all. ACLLimits
	// bounds what that takes.
	ACL       []ACLRule
	ACLLimits ACLLimits
	// TUN gives the node an interface of the kernel beside its stack; nil: it has none and needs
	// no privileges.
	TUN *TUNConfig

	// DNS says who resolves the names in addresses.
	DNS DNS
	// Resolver is used instead of DNS.
	Resolver *net.Resolver

	TCP TCPOptions
	UDP UDPOptions

	// NoGSO turns superpackets off: the stack then sends, and every part of the
	// path handles, single packets. It is many times slower; it is there to compare.
	NoGSO bool
	// QueueBytes bounds the memory of the outbound queue between the stack and the tunnel,
	// TCP's send buffers not counted; 0 means [DefaultQueueBytes].
	QueueBytes int
	// Queues is how many outbound queues the stack's flows are spread over, each with a goroutine that splits
	// and seals; a flow keeps to one, and QueueBytes is for each. 0 means 1, which is as good as more on two
	// processors; one for every two processors is a start on more.
	Queues int

	Timing       Timing
	CipherSuites []CipherSuite // in order of preference; nil: all, the fastest on this CPU first

	// CloseTimeout bounds how long Close waits for data that was written to
	// connections closed before. 0 means [DefaultCloseTimeout], negative none.
	CloseTimeout time.Duration

	Logger *slog.Logger // nil: discarded

	tunnelMTU int // that the OpenConnect server has pushed
}

// Peer is another node.
type Peer struct {
	Name      string // for logs and status; the public key's first 8 characters when empty
	PublicKey PublicKey
	// Endpoint is the peer's UDP address, "host:port". Empty: the peer will call.
	// A host name is resolved again on every reconnect.
	Endpoint string
	// AllowedIPs are the addresses behind the peer. Packets to them go to it, the longest
	// prefix winning, and only packets from them are accepted of it.
	AllowedIPs []netip.Prefix
	// KnownAs are the addresses by which this peer knows this node, if others than
	// its first of the family (source NAT): at most one of each family.
	KnownAs []netip.Addr
}

// TCPOptions tune TCP; the zero value is good.
type TCPOptions struct {
	CongestionControl string // "cubic", the default, or "reno"
	NoSACK            bool   // no selective acknowledgements (RFC 2018)
	RACK              bool   // find losses by time (RFC 8985), not by counting duplicates; see options.go for why not
	// Send and Receive are the buffers of one connection. They grow by themselves
	// from Default to Max as the path needs it.
	Send, Receive BufferSizes
}

// BufferSizes are in bytes; 0 is a default.
type BufferSizes struct{ Default, Max int }

// UDPOptions tune UDP; the zero value is good.
type UDPOptions struct {
	Send, Receive int // buffers of one socket in bytes; 0 is a default
}

const (
	// DefaultMTU is the largest packet at first when Config.MTU is 0, in bytes.
	DefaultMTU = transport.DefaultInnerMTU

	// DefaultCloseTimeout is how long Close waits for written data to be acknowledged.
	DefaultCloseTimeout = time.Second

	// minMTU4 is what IPv4 hosts must take (RFC 791 3.1), minMTU6 what IPv6 links must
	// carry (RFC 8200 5).
	minMTU4 = 576
	minMTU6 = 1280
	// maxMTU leaves one byte for the frame type in the largest DTLS plaintext, 2^14 bytes
	// (RFC 5246 6.2.1).
	maxMTU = 1<<14 - 1

	minBuffer = 4 << 10   // tcp.MinBufferSize
	maxBuffer = 512 << 20 // below the 1 GiB that a scaled TCP window can say (RFC 7323 2.3)
)

// validate returns every mistake in c, joined.
func (c *Config) validate() error {
	var errs []error
	bad := func(key, value, want string) { errs = append(errs, &ConfigError{Key: key, Value: value, Want: want}) }

	if c.PrivateKey.IsZero() {
		bad("PrivateKey", "", "a key, as made by GenerateKey")
	}
	c.validateAddresses(bad)
	if len(c.Conns) > 0 && len(c.Listen) > 0 {
		bad("Conns", "", "nothing when Listen is set")
	}
	for i, a := range c.Listen {
		if !a.Addr().IsValid() {
			bad(index("Listen", i), a.String(), "an address and port such as [::]:5182")
		}
	}
	least := minMTU4
	if _, v6 := c.families(); v6 {
		least = minMTU6
	}
	if c.MTU != 0 && (c.MTU < least || c.MTU > maxMTU) {
		bad("MTU", strconv.Itoa(c.MTU), fmt.Sprintf("0 or %d to %d bytes", least, maxMTU))
	}
	c.DNS.validate(bad)
	switch c.TCP.CongestionControl {
	case "", "cubic", "reno":
	default:
		bad("TCP.CongestionControl", strconv.Quote(c.TCP.CongestionControl), `"cubic" or "reno"`)
	}
	checkBuffers(bad, "TCP.Send", c.TCP.Send, defaultTCPSend)
	checkBuffers(bad, "TCP.Receive", c.TCP.Receive, defaultTCPReceive)
	checkBuffers(bad, "UDP.Send", BufferSizes{c.UDP.Send, maxBuffer}, defaultUDPSend)
	checkBuffers(bad, "UDP.Receive", BufferSizes{c.UDP.Receive, maxBuffer}, defaultUDPReceive)
	if c.Queues < 0 || c.Queues > maxQueues {
		bad("Queues", strconv.Itoa(c.Queues), fmt.Sprintf("0 to %d", maxQueues))
	}
	if c.QueueBytes < 0 || c.QueueBytes > 0 && c.QueueBytes < 1<<16 {
		bad("QueueBytes", strconv.Itoa(c.QueueBytes), "0 or at least 65536")
	}
	for i, s := range c.CipherSuites {
		if s != AES128GCM && s != AES256GCM && s != ChaCha20Poly1305 {
			bad(index("CipherSuites", i), fmt.Sprintf("%#04x", uint16(s)), "AES128GCM, AES256GCM or ChaCha20Poly1305")
		}
	}
	validatePeers(c, bad)
	c.validateACL(bad)
	if c.Router != nil {
		c.Router.validate(bad)
	}
	if c.TUN != nil {
		c.TUN.validate(bad)
	}
	return errors.Join(errs...)
}

type complain = func(key, value, want string)

func index(key string, i int) string { return key + "[" + strconv.Itoa(i) + "]" }

func (c *Config) validateAddresses(bad complain) {
	if len(c.Addresses) == 0 {
		bad("Addresses", "", "at least one address such as 10.66.0.1/32")
	}
	seen := map[netip.Addr]bool{}
	for i, p := range c.Addresses {
		a := p.Addr()
		switch key := index("Addresses", i); {
		case !p.IsValid() || !usable(a):
			bad(key, p.String(), "a unicast address such as 10.66.0.1/32 or fd66::1/128")
		case seen[a]:
			bad(key, p.String(), "an address that is not in the list already")
		}
		seen[a] = true
	}
}

// usable tells whether a can be a node's own address.
func usable(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast() &&
		!a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func checkBuffers(bad complain, key string, b, standard BufferSizes) {
	b = b.or(standard)
	if b.Default < minBuffer || b.Default > b.Max || b.Max > maxBuffer {
		bad(key, fmt.Sprintf("%d growing to %d", b.Default, b.Max), fmt.Sprintf("%d to %d bytes, the default at most the maximum", minBuffer, maxBuffer))
	}
}

// or fills in what is not set. A maximum alone lowers the default, a default alone
// raises the maximum.
func (b BufferSizes) or(standard BufferSizes) BufferSizes {
	switch {
	case b.Default == 0 && b.Max == 0:
		return standard
	case b.Default == 0:
		b.Default = min(standard.Default, b.Max)
	case b.Max == 0:
		b.Max = max(standard.Max, b.Default)
	}
	return b
}

func validatePeers(c *Config, bad complain) {
	own := PublicKey{}
	if !c.PrivateKey.IsZero() {
		own = c.PrivateKey.Public()
	}
	keys := map[PublicKey]int{}
	prefixes := map[netip.Prefix]int{}
	for i := range c.Peers {
		p := &c.Peers[i]
		key := index("Peers", i)
		p.validate(key, own, c.Addresses, bad)
		if j, ok := keys[p.PublicKey]; ok {
			bad(key+".PublicKey", p.PublicKey.String(), fmt.Sprintf("a key that is not that of Peers[%d]", j))
		}
		keys[p.PublicKey] = i
		for k, pfx := range p.AllowedIPs {
			if j, ok := prefixes[pfx.Masked()]; ok && j != i {
				bad(index(key+".AllowedIPs", k), pfx.String(), fmt.Sprintf("a prefix that Peers[%d] does not have", j))
			}
			prefixes[pfx.Masked()] = i
		}
	}
}

// validate reports the mistakes that can be seen in one peer alone. addrs are the
// node's own addresses.
func (p *Peer) validate(key string, own PublicKey, addrs []netip.Prefix, bad complain) {
	switch {
	case p.PublicKey.IsZero():
		bad(key+".PublicKey", "", "the peer's public key")
	case p.PublicKey == own:
		bad(key+".PublicKey", p.PublicKey.String(), "a key that is not this node's own")
	}
	if p.Endpoint != "" {
		if host, port, err := net.SplitHostPort(p.Endpoint); err != nil || host == "" || !isPort(port) {
			bad(key+".Endpoint", strconv.Quote(p.Endpoint), `"host:port" such as b.example.net:5182`)
		}
	}
	for i, pfx := range p.AllowedIPs {
		if !pfx.IsValid() || pfx.Addr().Is4In6() {
			bad(index(key+".AllowedIPs", i), pfx.String(), "a prefix such as 10.66.0.2/32 or fd66::/64")
		}
	}
	var v4, v6 bool
	for i, a := range p.KnownAs {
		switch k := index(key+".KnownAs", i); {
		case !usable(a):
			bad(k, a.String(), "a unicast address such as 10.66.0.1")
		case a.Is4() && v4 || a.Is6() && v6:
			bad(k, a.String(), "one address of each family at most")
		case !firstOf(addrs, a.Is4()).IsValid():
			bad(k, a.String(), "an address of a family that Addresses has")
		}
		v4, v6 = v4 || a.Is4(), v6 || a.Is6()
	}
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n != 0
}

// families tells which IP versions the node speaks.
func (c *Config) families() (v4, v6 bool) {
	return firstOf(c.Addresses, true).IsValid(), firstOf(c.Addresses, false).IsValid()
}

// firstOf returns the first address of a family.
func firstOf(addrs []netip.Prefix, is4 bool) netip.Addr {
	for _, p := range addrs {
		if p.IsValid() && p.Addr().Is4() == is4 {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

// open returns the sockets of the configuration.
func (c *Config) open() ([]transport.PacketConn, error) {
	switch {
	case len(c.Conns) > 0:
		return c.Conns, nil
	case len(c.Listen) > 0:
		return c.openAll(c.Listen)
	}
	// [::] takes IPv4 too; a system without IPv6 has 0.0.0.0 only.
	conns, err := c.openAll([]netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), 0)})
	if err != nil {
		return c.openAll([]netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), 0)})
	}
	return conns, nil
}

func (c *Config) openAll(listen []netip.AddrPort) ([]transport.PacketConn, error) {
	var conns []transport.PacketConn
	for _, a := range listen {
		opts := c.Socket
		// 0.0.0.0 and [::] on one port: each takes its own family.
		beside := netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port())
		if a.Addr() == netip.IPv6Unspecified() && slices.Contains(listen, beside) {
			opts.V6Only = true
		}
		conn, err := transport.ListenUDP(a, opts)
		if err != nil {
			closeAll(conns)
			return nil, err
		}
		conns = append(conns, conn)
	}
	return conns, nil
}

func closeAll(conns []transport.PacketConn) {
	for _, c := range conns {
		c.Close()
	}
}
