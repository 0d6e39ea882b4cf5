package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// fallbackDelay is how long the first address family gets before the other is tried beside
// it (RFC 8305 5 recommends 250 ms; the net package uses 300).
const fallbackDelay = 300 * time.Millisecond

// Dial connects to an address inside the VPN. Networks are tcp, tcp4, tcp6, udp, udp4 and
// udp6. A name in address is resolved as Config.DNS says, and its addresses are
// tried in turn, the two families racing as in [net.Dialer]. The connection is a
// *[TCPConn] or a *[UDPConn]. ctx bounds the dialling only, not the connection.
func (n *Node) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	proto, version, ok := family(network)
	if !ok {
		return nil, badNetwork("dial", network)
	}
	ctx, cancel := n.bound(ctx)
	defer cancel()
	addrs, err := n.lookup(ctx, proto, version, address)
	if err != nil {
		return nil, opError("dial", network, nil, nil, n.dialErr(ctx, err))
	}
	dial := n.dialTCP
	if proto == "udp" {
		dial = n.dialUDP
	}
	return n.dialParallel(ctx, network, addrs, dial)
}

// bound derives a context that also ends when the node closes.
func (n *Node) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(n.ctx, cancel)
	return ctx, func() { stop(); cancel() }
}

// dialErr says why dialling under ctx ended.
func (n *Node) dialErr(ctx context.Context, err error) error {
	switch {
	case n.isClosed():
		return net.ErrClosed
	case err == context.Canceled, err == context.DeadlineExceeded:
		return ctxErr(err)
	}
	return err
}

type dialFunc func(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error)

// dialParallel tries the addresses of the first one's family, and after fallbackDelay or
// failure those of the other beside them. The first connection wins, the others are
// closed.
func (n *Node) dialParallel(ctx context.Context, network string, addrs []netip.AddrPort, dial dialFunc) (net.Conn, error) {
	first, other := splitFamilies(addrs)
	if len(other) == 0 {
		return n.dialSerial(ctx, network, first, dial)
	}
	type result struct {
		conn  net.Conn
		err   error
		first bool
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // stops the loser
	results := make(chan result)
	won := make(chan struct{})
	defer close(won)
	race := func(addrs []netip.AddrPort, isFirst bool) {
		c, err := n.dialSerial(ctx, network, addrs, dial)
		select {
		case results <- result{c, err, isFirst}:
		case <-won:
			if c != nil {
				c.Close()
			}
		}
	}
	go race(first, true)
	delay := time.NewTimer(fallbackDelay)
	defer delay.Stop()
	running, fellBack := 1, false
	fallBack := func() {
		if !fellBack {
			fellBack = true
			running++
			go race(other, false)
		}
	}
	var firstErr error
	for {
		select {
		case <-delay.C:
			fallBack()
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			if r.first || firstErr == nil {
				firstErr = r.err
			}
			running--
			fallBack()
			if running == 0 {
				return nil, firstErr
			}
		}
	}
}

// splitFamilies separates the addresses of the first one's family from the others.
func splitFamilies(addrs []netip.AddrPort) (first, other []netip.AddrPort) {
	for _, a := range addrs {
		if a.Addr().Is4() == addrs[0].Addr().Is4() {
			first = append(first, a)
		} else {
			other = append(other, a)
		}
	}
	return first, other
}

// dialSerial tries the addresses in turn, dividing the time left among them, and
// returns the error of the first.
func (n *Node) dialSerial(ctx context.Context, network string, addrs []netip.AddrPort, dial dialFunc) (net.Conn, error) {
	var firstErr error
	for i, a := range addrs {
		if ctx.Err() != nil && firstErr != nil {
			break
		}
		c, err := n.dialOne(ctx, network, a, len(addrs)-i, dial)
		if err == nil {
			return c, nil
		}
		if firstErr == nil {
			firstErr = err
		}
	}
	return nil, firstErr
}

// dialOne gives one of left addresses its share of the time until ctx's deadline.
func (n *Node) dialOne(ctx context.Context, network string, a netip.AddrPort, left int, dial dialFunc) (net.Conn, error) {
	if end, ok := ctx.Deadline(); ok && left > 1 {
		// At least 2 seconds, like the net package, but never beyond the deadline.
		share := max(time.Until(end)/time.Duration(left), 2*time.Second)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, share)
		defer cancel()
	}
	return dial(ctx, network, a)
}

func (n *Node) dialTCP(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, opError("dial", network, nil, net.TCPAddrFromAddrPort(to), n.dialErr(ctx, err))
	}
	if err := n.reachable(to.Addr()); err != nil {
		return fail(err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	var wq waiter.Queue
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(to.Addr()), &wq)
	if terr != nil {
		return fail(errnoOf(terr))
	}
	entry, connected := waiter.NewChannelEntry(waiter.WritableEvents | alwaysEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Connect(fullAddress(to))
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-connected:
		case <-ctx.Done():
			ep.Close()
			return fail(ctx.Err())
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		return fail(errnoOf(terr))
	}
	return newTCPConn(n, ep, &wq), nil
}

func (n *Node) dialUDP(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, opError("dial", network, nil, net.UDPAddrFromAddrPort(to), n.dialErr(ctx, err))
	}
	if err := n.reachable(to.Addr()); err != nil {
		return fail(err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	var wq waiter.Queue
	ep, terr := n.stack.NewEndpoint(udp.ProtocolNumber, protocolOf(to.Addr()), &wq)
	if terr != nil {
		return fail(errnoOf(terr))
	}
	if terr := ep.Connect(fullAddress(to)); terr != nil {
		ep.Close()
		return fail(errnoOf(terr))
	}
	return newUDPConn(n, ep, &wq), nil
}

// lookup turns "host:port" into the addresses that the node can speak to, in order of
// preference. Literal addresses ask nobody.
func (n *Node) lookup(ctx context.Context, proto string, version int, address string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	port, err := n.resolver.LookupPort(ctx, proto, service)
	if err != nil {
		return nil, err
	}
	var ips []netip.Addr
	ip, parseErr := netip.ParseAddr(host)
	switch {
	case host == "" || parseErr == nil && ip.IsUnspecified():
		ips = n.ownAddrs() // the node itself, as for the net package
	case parseErr == nil:
		ips = []netip.Addr{ip}
	default:
		if ips, err = n.LookupNetIP(ctx, ipNetwork(version), host); err != nil {
			return nil, lookupErr(ctx, err)
		}
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		ip = ip.Unmap().WithZone("")
		if version == 0 || (version == 4) == ip.Is4() {
			addrs = append(addrs, netip.AddrPortFrom(ip, uint16(port)))
		}
	}
	if len(addrs) == 0 {
		return nil, &net.AddrError{Err: "no suitable address found", Addr: host}
	}
	// Addresses that lead nowhere come last, so that their error is seen only if nothing
	// else is there.
	slices.SortStableFunc(addrs, func(a, b netip.AddrPort) int {
		return unreachableRank(n, a) - unreachableRank(n, b)
	})
	return addrs, nil
}

// ipNetwork names an IP version, 0 for both.
func ipNetwork(version int) string {
	switch version {
	case 4:
		return "ip4"
	case 6:
		return "ip6"
	}
	return "ip"
}

func unreachableRank(n *Node, a netip.AddrPort) int {
	if n.reachable(a.Addr()) != nil {
		return 1
	}
	return 0
}

// lookupErr gives a deadline precedence over what the resolver makes of it.
func lookupErr(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctxErr(ctx.Err())
	}
	return err
}

// ownAddrs are the node's addresses in the order of the configuration.
func (n *Node) ownAddrs() []netip.Addr {
	addrs := make([]netip.Addr, 0, len(n.cfg.Addresses))
	for _, p := range n.cfg.Addresses {
		addrs = append(addrs, p.Addr())
	}
	return addrs
}
