package netstack

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"go4.org/netipx"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// OpenConnect is a tunnel to an OpenConnect (AnyConnect) server, such as ocserv or `penstock serve`.
// The node is its client: the server gives the addresses and says what lies behind it.
//
// [New] connects, and fails if that fails. From then on the node keeps the tunnel: it
// connects again, with the same cookie and so the same addresses, when the connection was lost, when
// the host's network has changed, and when the server wants new keys. Packets go by DTLS
// where datagrams arrive, else by TLS (CSTP).
type OpenConnect struct {
	// Login is a sign-in that has succeeded: of [openconnect.SignIn], or kept from one.
	Login openconnect.Login
	// Connect says what kind of tunnel is wanted. Its Dial, where set, makes the TCP connections;
	// else they carry Config.Socket.Mark.
	Connect openconnect.ConnectOptions
	// SignIn is called when the server no longer accepts the cookie. nil: the tunnel ends then. It
	// has no time limit of its own, and ctx ends with the node.
	SignIn func(ctx context.Context) (*openconnect.Login, error)
	// Timeout bounds one attempt to connect; 0 means [DefaultOpenConnectTimeout].
	Timeout time.Duration

	// AllowedIPs, where set, replace what the server says lies behind it.
	AllowedIPs []netip.Prefix
	// KeepSession leaves the session to the server when the node closes, so that the cookie can be
	// used again. Without, closing says goodbye, which ends it. It is looked at by Close, and may be changed
	// until then.
	KeepSession bool

	// Prepare is called once, before the node is made, with what the server has given and the Config that New
	// makes of it, which it may change: set TUN, say. An error of it ends New. nil: nothing is to be prepared.
	Prepare func(network OpenConnectNetwork, c *Config) error

	// Changed is called after every change of the tunnel's state, one call at a time. It must not call
	// [Node.Close]. nil: nobody is told.
	Changed func(OpenConnectStatus)
}

// DefaultOpenConnectTimeout is how long one attempt to connect to an OpenConnect server may take.
const DefaultOpenConnectTimeout = 30 * time.Second

// OpenConnectState is what a tunnel to an OpenConnect server is doing.
type OpenConnectState string

const (
	OpenConnectUp         OpenConnectState = "up"         // the server has a connection of ours
	OpenConnectConnecting OpenConnectState = "connecting" // it has none, or it is lost
	OpenConnectEnded      OpenConnectState = "ended"      // for good: the server wants it, or the cookie is spent
)

// OpenConnectNetwork is what a server has given its client.
type OpenConnectNetwork struct {
	// Addresses are the client's. Bits are those of the network that the address is part of.
	Addresses []netip.Prefix
	// Routes are the networks behind the server, with those of the addresses and the name servers; Exclude are
	// parts of them that are not behind it.
	Routes, Exclude []netip.Prefix
	DNS             DNS
	MTU             int // of packets inside, in bytes
}

// OpenConnectStatus is a snapshot of the tunnel to an OpenConnect server.
type OpenConnectStatus struct {
	Server string           `json:"server"` // as signed in to, HOST:PORT
	Remote string           `json:"remote"` // where it is now
	State  OpenConnectState `json:"state"`
	// Path is how packets go now, "dtls" or "cstp", or "none"; Why says in words why that way.
	Path string `json:"path"`
	Why  string `json:"why"`
	// LastError is why the last attempt failed, the connection was lost or the tunnel has ended.
	LastError  string    `json:"last_error,omitempty"`
	Connected  time.Time `json:"connected"` // the connection in use
	Reconnects uint64    `json:"reconnects"`
	// AllowedIPs are the addresses behind the server.
	AllowedIPs []netip.Prefix `json:"allowed_ips"`
	// Settings are what the server has pushed.
	Settings *openconnect.Settings `json:"-"`
	// Err is LastError when the tunnel has ended.
	Err error `json:"-"`
}

// validate reports what can be seen before the server is called.
func (o *OpenConnect) validate(c *Config, bad complain) {
	if o.Login.Host == "" || o.Login.Cookie == "" {
		bad("OpenConnect.Login", "", "what openconnect.SignIn returns: a host and a cookie")
	}
	if len(c.Addresses) > 0 {
		bad("Addresses", c.Addresses[0].String(), "nothing when OpenConnect is set: the server gives them")
	}
	if o.Timeout < 0 {
		bad("OpenConnect.Timeout", o.Timeout.String(), "0 or a positive time")
	}
	for i, p := range o.AllowedIPs {
		if !p.IsValid() || p.Addr().Is4In6() {
			bad(index("OpenConnect.AllowedIPs", i), p.String(), "a prefix such as 10.0.0.0/8 or fd00::/8")
		}
	}
}

// validateClient reports every mistake in c, whose OpenConnect is set, before the server is called. It makes up a
// key if there is none: only static peers need to know it.
func (c *Config) validateClient() error {
	var errs []error
	c.OpenConnect.validate(c, func(key, value, want string) {
		errs = append(errs, &ConfigError{Key: key, Value: value, Want: want})
	})
	if c.PrivateKey.IsZero() {
		key, err := GenerateKey()
		if err != nil {
			return err
		}
		c.PrivateKey = key
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	complete := *c
	complete.Addresses = []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("2001:db8::1/128")} // RFC 5737, RFC 3849
	return complete.validate()
}

// applySettings makes what the server has pushed part of c. Only what c leaves open is touched.
func (c *Config) applySettings(s *openconnect.Settings) {
	c.tunnelMTU = s.MTU
	c.Addresses = nil
	for _, a := range s.Addresses {
		c.Addresses = append(c.Addresses, netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
	}
	if !c.DNS.empty() || len(c.DNS.Search) > 0 || c.Resolver != nil {
		return
	}
	c.DNS.Search = searchDomains(s.DefaultDomain)
	var servers []netip.AddrPort
	for _, a := range s.DNS {
		servers = append(servers, netip.AddrPortFrom(a, 53))
	}
	switch {
	case len(servers) == 0:
	case len(s.SplitDNS) > 0 && !s.TunnelAllDNS:
		c.DNS.Split = []SplitDNS{{Domains: slices.Clone(s.SplitDNS), Servers: servers}}
	default:
		c.DNS.Servers = servers
	}
}

// searchDomains takes apart what the server says of the default domain: openconnect allows
// several, with spaces or commas between.
func searchDomains(s string) []string {
	d := strings.FieldsFunc(s, func(r rune) bool { return r == ' ' || r == ',' })
	return d[:min(len(d), maxSearch)]
}

// network is what the server has given, with o's own word on what is behind it if there is one. Else that
// is what the server includes, everything if it names nothing, without what it excludes, and in any
// case its DNS servers and the networks that the addresses are part of, to which stock clients
// make routes too.
func (o *OpenConnect) network(s *openconnect.Settings, d DNS) OpenConnectNetwork {
	n := OpenConnectNetwork{Addresses: slices.Clone(s.Addresses), DNS: d, MTU: s.MTU}
	if len(o.AllowedIPs) > 0 {
		n.Routes = slices.Clone(o.AllowedIPs)
		return n
	}
	var v4, v6 bool
	for _, a := range s.Addresses {
		v4, v6 = v4 || a.Addr().Is4(), v6 || a.Addr().Is6()
	}
	other := func(a netip.Addr) bool { return a.Is4() && !v4 || a.Is6() && !v6 }
	n.Routes = slices.Clone(s.Include)
	if len(n.Routes) == 0 {
		n.Routes = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}
	}
	n.Exclude = slices.Clone(s.Exclude)
	for _, list := range []*[]netip.Prefix{&n.Routes, &n.Exclude} {
		*list = slices.DeleteFunc(*list, func(p netip.Prefix) bool { return other(p.Addr()) })
		for i, p := range *list {
			(*list)[i] = p.Masked()
		}
	}
	// What is both included and excluded is not behind the server; what is needed to reach it at all is.
	n.Routes = slices.DeleteFunc(n.Routes, func(p netip.Prefix) bool { return slices.Contains(n.Exclude, p) })
	var needed []netip.Prefix
	for _, a := range s.Addresses {
		needed = append(needed, a.Masked())
	}
	for _, a := range s.DNS {
		if !other(a) {
			needed = append(needed, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	n.Exclude = slices.DeleteFunc(n.Exclude, func(p netip.Prefix) bool { return slices.Contains(needed, p) })
	for _, p := range needed {
		if !slices.Contains(n.Routes, p) {
			n.Routes = append(n.Routes, p)
		}
	}
	return n
}

// allowedIPs are the addresses behind the server.
func (o *OpenConnect) allowedIPs(s *openconnect.Settings) ([]netip.Prefix, error) {
	n := o.network(s, DNS{})
	// A prefix is behind the server if the longest one that has it is a route and no exclusion.
	all := make([]routeOrNot, 0, len(n.Routes)+len(n.Exclude))
	for _, p := range n.Routes {
		all = append(all, routeOrNot{p, true})
	}
	for _, p := range n.Exclude {
		all = append(all, routeOrNot{p, false})
	}
	slices.SortStableFunc(all, func(a, b routeOrNot) int { return a.prefix.Bits() - b.prefix.Bits() })
	var b netipx.IPSetBuilder
	for _, r := range all {
		if r.behind {
			b.AddPrefix(r.prefix)
		} else {
			b.RemovePrefix(r.prefix)
		}
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, err
	}
	return set.Prefixes(), nil
}

type routeOrNot struct {
	prefix netip.Prefix
	behind bool
}

// timeout is that of one attempt.
func (o *OpenConnect) timeout() time.Duration {
	if o.Timeout == 0 {
		return DefaultOpenConnectTimeout
	}
	return o.Timeout
}

// datagramPort is where the server's datagram channel is, "" if there is none for us, and why.
func datagramPort(t *openconnect.Tunnel, off bool) (port, why string) {
	switch {
	case off:
		return "", "DTLS is switched off"
	case t.Proxied:
		return "", "the server is behind a proxy, which carries TCP only"
	case t.PSK == nil: // then the server was not asked for DTLS, or offers none
		return "", t.NoPSK
	case t.Settings.DTLSPort == 0:
		return "", "the server offers no DTLS"
	}
	return strconv.Itoa(t.Settings.DTLSPort), ""
}
