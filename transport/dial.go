package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// resolve turns an endpoint into addresses as datagrams inbound have them. It returns when ctx
// ends, even if Config.ResolveEndpoint does not.
func (t *Transport) resolve(ctx context.Context, endpoint string) ([]netip.AddrPort, error) {
	if t.cfg.ResolveEndpoint == nil {
		return resolveEndpoint(ctx, endpoint)
	}
	var remotes []netip.AddrPort
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		remotes, err = t.cfg.ResolveEndpoint(endpoint)
	}()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-done:
	}
	plain := make([]netip.AddrPort, len(remotes))
	for i, r := range remotes {
		plain[i] = netip.AddrPortFrom(namedZone(r.Addr().Unmap()), r.Port())
	}
	return plain, err
}

// resolveEndpoint is the default of Config.ResolveEndpoint: the system's
// resolver, all addresses.
func resolveEndpoint(ctx context.Context, endpoint string) ([]netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	portNumber, err := net.DefaultResolver.LookupPort(ctx, "udp", port)
	if err != nil {
		return nil, err
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	remotes := make([]netip.AddrPort, len(ips))
	for i, ip := range ips {
		remotes[i] = netip.AddrPortFrom(namedZone(ip.Unmap()), uint16(portNumber))
	}
	return remotes, nil
}

// namedZone writes a numeric zone as the interface's name, as addresses of
// datagrams inbound have it: the two must compare equal.
func namedZone(ip netip.Addr) netip.Addr {
	if index, err := strconv.Atoi(ip.Zone()); err == nil {
		if ifi, err := net.InterfaceByIndex(index); err == nil {
			return ip.WithZone(ifi.Name)
		}
	}
	return ip
}

// startDial runs a handshake with p in a goroutine of its own, until p stops.
func (t *Transport) startDial(p *peer) {
	ctx, hangUp := context.WithCancel(t.ctx)
	p.mu.Lock()
	p.hangUp = hangUp
	stopped := p.stopped
	p.mu.Unlock()
	if stopped || !t.spawn(func() {
		defer hangUp()
		p.dialDone(t.dial(ctx, p))
	}) {
		hangUp()
	}
}

// dial tries p's addresses one after the other. An endpoint's name is resolved
// anew each time; for a rekey the address where the peer is comes first.
func (t *Transport) dial(ctx context.Context, p *peer) error {
	remotes, err := t.dialTargets(ctx, p)
	if err != nil {
		return err
	}
	patience := p.timing.HandshakeTimeout / time.Duration(min(len(remotes), 3))
	var errs []error
	for _, remote := range remotes {
		attempt, cancel := context.WithTimeout(ctx, patience)
		err := t.call(attempt, p, remote)
		if refused := (*refusedError)(nil); errors.As(err, &refused) && refused.retry() {
			// The peer is under load and has verified our address: once more, at once. Anybody
			// can forge such an alert, so only once.
			err = t.call(attempt, p, remote)
		}
		cancel()
		if err == nil {
			return nil
		}
		errs = append(errs, fmt.Errorf("%v: %w", remote, err))
		if ctx.Err() != nil || errors.Is(err, errYielded) {
			break
		}
	}
	return errors.Join(errs...)
}

func (t *Transport) dialTargets(ctx context.Context, p *peer) ([]netip.AddrPort, error) {
	var remotes []netip.AddrPort
	s := p.slots.Load()
	if a := s.newest(); a != nil {
		remotes = append(remotes, a.path.Load().remote)
	}
	if p.endpoint == "" {
		if len(remotes) == 0 {
			return nil, errGone
		}
		return remotes, nil
	}
	resolved, err := t.resolve(ctx, p.endpoint)
	if err != nil && len(remotes) == 0 {
		return nil, fmt.Errorf("endpoint %s: %w", p.endpoint, err)
	}
	for _, r := range resolved {
		if !slices.Contains(remotes, r) && t.socketFor(r) != nil {
			remotes = append(remotes, r)
		}
	}
	if len(remotes) == 0 {
		return nil, fmt.Errorf("endpoint %s: no socket of ours reaches any of %v", p.endpoint, resolved)
	}
	return remotes, nil
}

// call runs one handshake as the DTLS client and installs what comes of it.
func (t *Transport) call(ctx context.Context, p *peer, remote netip.AddrPort) error {
	at := t.wayTo(p, remote)
	if at == nil {
		return errors.New("no socket of ours reaches it")
	}
	ctx, abandon := context.WithCancelCause(ctx)
	defer abandon(nil)
	hc := newHandshakeConn(at.conn.LocalAddr(), remote, func(d []byte) { t.sendDatagram(at, d) })
	pend := &pending{conn: hc, callee: p, abandon: abandon}
	if err := t.halfOpen.addCall(remote, pend); err != nil {
		hc.Close()
		return err
	}
	s, err := p.identity.client(ctx, hc)
	t.halfOpen.remove(remote, pend)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, errOtherKey) {
			err = handshakeCause(cause)
		}
		return err
	}
	return t.install(p, s, at)
}

// wayTo is how p is called at remote. Where it is heard from there that is the way by which it comes: another address of
// ours it may not be able to answer, and if it can it would move there. Who is silent is called by whatever way the routing table has now.
func (t *Transport) wayTo(p *peer, remote netip.AddrPort) *path {
	if at := p.livePath(); at != nil && at.remote == remote {
		return at
	}
	conn := t.socketFor(remote)
	if conn == nil {
		return nil
	}
	return &path{conn: conn, remote: remote}
}

// handshakeCause turns the end of a handshake's context into words.
func handshakeCause(cause error) error {
	if errors.Is(cause, context.DeadlineExceeded) {
		return errNoAnswer
	}
	return cause
}

// serve runs one handshake as the DTLS server. pend is in the half-open table
// already; it stays there until the association is confirmed, so that pion can
// repeat its last flight.
func (t *Transport) serve(ctx context.Context, pend *pending, at *path) {
	s, err := t.answer(ctx, pend)
	if err != nil {
		t.halfOpen.remove(at.remote, pend)
		t.log.Debug("handshake from stranger failed", "remote", at.remote, "err", err)
		return
	}
	p := t.proven(pend, s)
	if p == nil || !t.halfOpen.completed(at.remote, pend, s) || t.install(p, s, at) != nil {
		t.halfOpen.remove(at.remote, pend)
		<-s.retire()
	}
}

// answer runs pion's part of a handshake that we serve.
func (t *Transport) answer(ctx context.Context, pend *pending) (*agreement, error) {
	if pend.session == nil {
		return t.handshaker.server(ctx, pend.conn, t.knownPeer)
	}
	secret := pend.session.secret.Load()
	if secret == nil {
		pend.conn.Close()
		return nil, errNoDatagrams
	}
	return t.handshaker.sessionServer(ctx, pend.conn, secret)
}

// proven is the peer with whom a handshake was completed, nil if it has left in the meantime.
func (t *Transport) proven(pend *pending, s *agreement) *peer {
	if pend.session != nil {
		return pend.session.peer
	}
	return t.peerByKey(s.remote)
}

// install gives a completed handshake to its peer, unless that has a better one or is gone, and the pump's work to the
// records that came before it was complete here.
func (t *Transport) install(p *peer, s *agreement, at *path) error {
	if err := p.install(s, at); err != nil {
		return err
	}
	if early := s.takeEarly(); len(early) > 0 {
		in := newInbound(t, at.conn)
		for _, record := range early {
			in.single(p, *at, record)
		}
		in.deliver()
	}
	return nil
}
