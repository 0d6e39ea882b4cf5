package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/net/dns/dnsmessage"
)

// LookupNetIP resolves a name as Dial does: by Config.Resolver, or as Config.DNS says.
// Networks are ip, ip4 and ip6; with ip only addresses of the families that the node
// speaks are asked for, IPv6 first. A literal address asks nobody. The errors are
// *[net.DNSError].
func (n *Node) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	if network != "ip" && network != "ip4" && network != "ip6" {
		return nil, badNetwork("lookup", network)
	}
	if network == "ip" && n.v4 != n.v6 {
		network = "ip4"
		if n.v6 {
			network = "ip6"
		}
	}
	if a, err := netip.ParseAddr(host); err == nil {
		a = a.Unmap()
		if network == "ip" || a.Is4() == (network == "ip4") {
			return []netip.Addr{a}, nil
		}
		return nil, notFound(host)
	}
	ctx, cancel := n.bound(ctx)
	defer cancel()
	var addrs []netip.Addr
	var err error
	switch {
	case n.cfg.Resolver != nil:
		addrs, err = n.cfg.Resolver.LookupNetIP(ctx, network, host)
	case n.cfg.DNS.empty() && len(n.cfg.DNS.Search) == 0:
		addrs, err = net.DefaultResolver.LookupNetIP(ctx, network, host)
	default:
		addrs, err = n.dns.search(ctx, n.cfg.DNS.Search, network, host)
	}
	if n.isClosed() {
		return nil, net.ErrClosed
	}
	return addrs, err
}

func notFound(name string) error {
	return &net.DNSError{Err: "no such host", Name: name, IsNotFound: true}
}

// candidates are the complete names that host may mean, in order.
func candidates(host string, search []string) (names []string) {
	name := canonical(host)
	if strings.HasSuffix(host, ".") {
		return []string{name}
	}
	for _, d := range search {
		names = append(names, name+"."+canonical(d))
	}
	if strings.Contains(name, ".") {
		return append([]string{name}, names...)
	}
	return append(names, name)
}

// search looks host up as it is and with the search domains. It stops at the first name that
// exists, and at a failure: a name further on would be another host.
func (c *dnsClient) search(ctx context.Context, search []string, network, host string) ([]netip.Addr, error) {
	if isLocalhost(canonical(host)) {
		return loopback(network), nil
	}
	for _, name := range candidates(host, search) {
		if !isName(name) {
			continue
		}
		addrs, err := c.lookup(ctx, network, name)
		var de *net.DNSError
		switch {
		case err == nil:
			return addrs, nil
		case !errors.As(err, &de) || !de.IsNotFound:
			return nil, err
		}
	}
	return nil, notFound(host)
}

// lookup asks for the addresses of one canonical name.
func (c *dnsClient) lookup(ctx context.Context, network, name string) ([]netip.Addr, error) {
	r := c.rule(name)
	if r.system() {
		return net.DefaultResolver.LookupNetIP(ctx, network, name+".")
	}
	var types []dnsmessage.Type
	if network != "ip4" {
		types = append(types, dnsmessage.TypeAAAA)
	}
	if network != "ip6" {
		types = append(types, dnsmessage.TypeA)
	}
	type result struct {
		addrs []netip.Addr
		err   error
	}
	results := make([]chan result, len(types))
	for i, t := range types {
		results[i] = make(chan result, 1)
		go func() {
			addrs, err := c.addresses(ctx, r, name, t)
			results[i] <- result{addrs, err}
		}()
	}
	var addrs []netip.Addr
	var failure error
	for _, ch := range results {
		res := <-ch
		addrs = append(addrs, res.addrs...)
		if res.err != nil {
			failure = res.err
		}
	}
	switch {
	case len(addrs) > 0: // one family is enough
		return addrs, nil
	case failure != nil:
		return nil, lookupError(name, failure)
	}
	return nil, notFound(name)
}

// addresses asks for one type of record.
func (c *dnsClient) addresses(ctx context.Context, r *dnsRule, name string, t dnsmessage.Type) ([]netip.Addr, error) {
	q, err := newQuestion(name, t)
	if err != nil {
		return nil, err
	}
	msg, err := c.exchange(ctx, r, q)
	if err != nil {
		return nil, err
	}
	h, _, err := readQuery(msg)
	if err != nil {
		return nil, err
	}
	a, err := readAnswer(msg, h.ID, q)
	return a.addrs, err
}

// lookupError says in the net package's words why name was not resolved.
func lookupError(name string, err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, context.Canceled) {
		return err
	}
	e := &net.DNSError{Err: err.Error(), Name: name, IsTemporary: true, UnwrapErr: err}
	var se *dnsServerError
	if errors.As(err, &se) {
		e.Server, e.Err = se.server.String(), se.err.Error()
	}
	e.IsTimeout = errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
	if e.IsTimeout {
		e.Err = "no answer in time"
	}
	return e
}

// isLocalhost tells whether a canonical name is one that no server is asked for (RFC 6761 6.3).
func isLocalhost(name string) bool {
	return name == "localhost" || strings.HasSuffix(name, ".localhost")
}

func loopback(network string) (addrs []netip.Addr) {
	if network != "ip4" {
		addrs = append(addrs, netip.IPv6Loopback())
	}
	if network != "ip6" {
		addrs = append(addrs, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	}
	return addrs
}
