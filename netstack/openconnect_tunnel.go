package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// Times of the tunnel to an OpenConnect server.
const (
	// retryFirst and retryMost are the pauses between attempts to connect, doubling, each
	// shortened at random by up to half: a server that restarts shall not be called by all at once.
	retryFirst = time.Second
	retryMost  = 30 * time.Second
	// steadyTime is how long a connection has to last to count as one. What is lost sooner was an attempt that has failed: a
	// server that hangs up on everybody, or two clients with one cookie.
	steadyTime = 5 * time.Second
	// watchPause is how often the way to the server is looked up, to notice another network. It is a
	// question to the host's routing table, some microseconds.
	watchPause = 2 * time.Second
	// knownAddressTime is what the server's last address gets before its name is looked up again:
	// the resolver may be behind the tunnel that is down.
	knownAddressTime = 5 * time.Second
)

// An openconnectTunnel keeps the tunnel of Config.OpenConnect. Its goroutine is run; the fields below mu
// are for others, the rest is its own once it runs.
type openconnectTunnel struct {
	cfg  *OpenConnect
	mark uint32
	log  *slog.Logger
	node *Node // set by start

	ctx    context.Context // ends with stop
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended; nil before start

	login    openconnect.Login
	settings *openconnect.Settings
	allowed  []netip.Prefix
	session  *transport.Session
	rekeyAt  time.Time
	since    time.Time     // when the connection in use was made
	retry    time.Duration // the next pause

	lost  chan error // the stream is; a reason waiting is enough
	ended chan error // the session is; another one for each

	mu     sync.Mutex
	status OpenConnectStatus
	remote netip.AddrPort // of the TCP connection
	local  netip.Addr     // our end of it

	tellMu sync.Mutex // held while Changed is called
}

// connectOpenConnect makes the first connection for a Config and completes that with what the
// server gives.
func connectOpenConnect(c *Config) (*openconnectTunnel, *openconnect.Tunnel, error) {
	if err := c.validateClient(); err != nil {
		return nil, nil, fmt.Errorf("netstack: %w", err)
	}
	o := &openconnectTunnel{
		cfg: c.OpenConnect, mark: c.Socket.Mark, log: c.Logger,
		login: c.OpenConnect.Login, retry: retryFirst,
		lost: make(chan error, 1),
	}
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	o.status = OpenConnectStatus{Server: o.login.Host, State: OpenConnectConnecting, Path: string(transport.PathNone)}
	t, err := o.connect(o.ctx)
	if err != nil {
		o.cancel()
		return nil, nil, fmt.Errorf("netstack: connect to %s: %w", o.login.Host, err)
	}
	c.applySettings(t.Settings)
	if prepare := o.cfg.Prepare; prepare != nil {
		if err := prepare(o.cfg.network(t.Settings, c.DNS), c); err != nil {
			o.giveUp(t)
			return nil, nil, err
		}
	}
	return o, t, nil
}

// start makes the session of the first connection, which it takes, and runs.
func (o *openconnectTunnel) start(n *Node, t *openconnect.Tunnel) error {
	o.node = n
	if err := o.adopt(t); err != nil {
		return fmt.Errorf("netstack: OpenConnect: %w", err)
	}
	o.done = make(chan struct{})
	go o.run()
	return nil
}

// giveUp is stop for a tunnel that was not started; nil has none. t may be nil too.
func (o *openconnectTunnel) giveUp(t *openconnect.Tunnel) {
	if o == nil {
		return
	}
	o.cancel()
	if t != nil {
		t.Conn.Close()
	}
}

// stop ends the tunnel, with a goodbye unless the session is to stay.
func (o *openconnectTunnel) stop() {
	o.cancel()
	if o.done != nil {
		<-o.done
	}
	if o.session == nil {
		return
	}
	if o.cfg.KeepSession {
		o.session.Abandon()
	} else {
		o.session.Close(nil)
	}
}

// run keeps the tunnel until it ends.
func (o *openconnectTunnel) run() {
	defer close(o.done)
	tick := time.NewTicker(watchPause)
	defer tick.Stop()
	for {
		var why error
		select {
		case <-o.ctx.Done():
			return
		case err := <-o.ended:
			o.session = nil
			if goodbye := (*transport.Goodbye)(nil); errors.As(err, &goodbye) {
				o.end(err)
				return
			}
			why = err
		case why = <-o.lost:
		case <-tick.C:
			if why = o.due(); why == nil {
				continue
			}
		}
		if !o.reconnect(why) {
			return
		}
	}
}

// Reasons for another connection that are no failure.
var (
	errRekeyDue = errors.New("new keys are due")
	errMoved    = errors.New("the host's network has changed")
)

// due tells whether another connection is wanted though the one in use works.
func (o *openconnectTunnel) due() error {
	if !o.rekeyAt.IsZero() && time.Now().After(o.rekeyAt) {
		return errRekeyDue
	}
	o.mu.Lock()
	remote, local := o.remote, o.local
	o.mu.Unlock()
	if !remote.IsValid() || !local.IsValid() || o.cfg.Connect.Dial != nil {
		return nil // it is not the host's routing table alone that says where from
	}
	from, err := o.sourceFor(remote)
	if err != nil || from == local {
		return nil // without any network there is nothing to go to
	}
	return errMoved
}

// sourceFor asks the host which of its addresses it would call remote from.
func (o *openconnectTunnel) sourceFor(remote netip.AddrPort) (netip.Addr, error) {
	d := net.Dialer{Control: transport.MarkControl(o.mark)}
	c, err := d.DialContext(o.ctx, "udp", remote.String()) // no datagram leaves
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// reconnect connects until it succeeds. It reports false when the tunnel has ended, which it has said.
func (o *openconnectTunnel) reconnect(why error) bool {
	working := why == errRekeyDue || why == errMoved
	if working {
		o.log.Info("openconnect: connecting again", "server", o.login.Host, "reason", why)
	} else {
		o.log.Warn("openconnect: connection lost", "server", o.login.Host, "reason", why)
		o.change(func(s *OpenConnectStatus) { s.State, s.LastError = OpenConnectConnecting, why.Error() })
	}
	if time.Since(o.since) >= steadyTime {
		o.retry = retryFirst
	} else if !working && !o.pause() {
		return false
	}
	fresh := false // the cookie is of a sign-in just now
	for {
		if o.session != nil {
			o.session.Renewing(true)
		}
		t, err := o.connect(o.ctx)
		if err == nil {
			if err = o.adopt(t); err == nil {
				return true
			}
		}
		if o.session != nil {
			o.session.Renewing(false)
		}
		switch {
		case o.ctx.Err() != nil:
			return false
		case errors.Is(err, openconnect.ErrCookie):
			// ocserv lets a user in who has too many sessions, and then refuses his cookie.
			if fresh && !o.pause() {
				return false
			}
			if err = o.signIn(err); err == nil {
				fresh = true
				continue
			}
			if o.ctx.Err() != nil {
				return false
			}
			if !passing(err) {
				o.end(err)
				return false
			}
		}
		o.log.Warn("openconnect: no connection", "server", o.login.Host, "err", err, "retry", o.retry)
		o.change(func(s *OpenConnectStatus) { s.LastError = err.Error() })
		if !o.pause() {
			return false
		}
		select { // a session that has ended in the meantime is not to be renewed
		case ended := <-o.ended:
			o.session = nil
			if goodbye := (*transport.Goodbye)(nil); errors.As(ended, &goodbye) {
				o.end(ended)
				return false
			}
		default:
		}
	}
}

// pause waits before the next attempt. It reports false when the node closes.
func (o *openconnectTunnel) pause() bool {
	d := o.retry/2 + rand.N(o.retry/2+1)
	o.retry = min(2*o.retry, retryMost)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-o.ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// passing tells whether an error of a sign-in may be none the next time: one of the network, or of a server that cannot
// answer now.
func passing(err error) bool {
	var network net.Error
	var full *openconnect.UnavailableError
	var status *openconnect.StatusError
	return errors.As(err, &network) || errors.As(err, &full) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &status) && strings.HasPrefix(status.Status, "5")
}

// signIn gets another cookie, because of the error of the last one.
func (o *openconnectTunnel) signIn(cause error) error {
	if o.cfg.SignIn == nil {
		return cause
	}
	o.log.Info("openconnect: signing in again", "server", o.login.Host)
	l, err := o.cfg.SignIn(o.ctx)
	if err != nil {
		return fmt.Errorf("%w, and signing in again failed: %w", cause, err)
	}
	o.login = *l
	return nil
}

// connect makes one attempt.
func (o *openconnectTunnel) connect(ctx context.Context) (*openconnect.Tunnel, error) {
	ctx, cancel := context.WithTimeout(ctx, o.cfg.timeout())
	defer cancel()
	options := o.cfg.Connect
	options.Dial = o.dial
	if o.settings != nil {
		for _, a := range o.settings.Addresses {
			options.Addresses = append(slices.Clip(options.Addresses), a.Addr())
		}
	}
	t, err := openconnect.Connect(ctx, &o.login, options)
	if err != nil {
		return nil, err
	}
	if len(t.Settings.Addresses) == 0 {
		t.Conn.Close()
		return nil, errors.New("the server gives no address")
	}
	if t.Settings.MTU < minMTU4 {
		t.Conn.Close()
		return nil, fmt.Errorf("the server gives an MTU of %d, at least %d is needed", t.Settings.MTU, minMTU4)
	}
	return t, nil
}

// dial makes the TCP connection under the TLS one, to where the server was before if it was anywhere.
func (o *openconnectTunnel) dial(ctx context.Context, network, address string) (net.Conn, error) {
	dial := o.cfg.Connect.Dial
	if dial == nil {
		d := net.Dialer{Control: transport.MarkControl(o.mark)}
		dial = d.DialContext
	}
	o.mu.Lock()
	known := o.remote
	o.mu.Unlock()
	if _, port, err := net.SplitHostPort(address); err == nil && known.IsValid() && port == fmt.Sprint(known.Port()) {
		first, cancel := context.WithTimeout(ctx, knownAddressTime)
		c, err := dial(first, network, known.String())
		cancel()
		if err == nil {
			return transport.NewStreamConn(c), nil
		}
	}
	addresses, err := o.resolve(address)
	if err != nil {
		return nil, err
	}
	for _, a := range addresses {
		var c net.Conn
		if c, err = dial(ctx, network, a); err == nil {
			return transport.NewStreamConn(c), nil
		}
	}
	return nil, err
}

// resolve is where to dial: address itself, which the system's resolver sees to, unless Config.ResolveEndpoint
// does. There is no node yet for the first connection, and no tunnel that could be in the way.
func (o *openconnectTunnel) resolve(address string) ([]string, error) {
	if o.node == nil || o.node.cfg.ResolveEndpoint == nil {
		return []string{address}, nil
	}
	found, err := o.node.cfg.ResolveEndpoint(address)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has no address", address)
	}
	var addresses []string
	for _, a := range found {
		addresses = append(addresses, a.String())
	}
	return addresses, nil
}

// adopt makes t the tunnel's connection. It takes it, also when it fails.
func (o *openconnectTunnel) adopt(t *openconnect.Tunnel) error {
	allowed, err := o.cfg.allowedIPs(t.Settings)
	if err != nil {
		t.Conn.Close()
		return err
	}
	port, why := datagramPort(t, o.cfg.Connect.NoDTLS)
	link := transport.SessionLink{
		Stream: t.Conn, Buffered: t.Buffered, AppID: t.Settings.AppID, PSK: t.PSK, NoDatagrams: why,
		MTU: t.Settings.MTU, PackFrames: isPenstock(t.Settings),
	}
	endpoint := ""
	if port != "" {
		endpoint = net.JoinHostPort(t.Remote.Addr().String(), port)
	}
	o.noteRemote(t)
	select { // what the connection before had to say; the new one may have something to say at once
	case <-o.lost:
	default:
	}
	switch {
	case o.session != nil && slices.Equal(allowed, o.allowed) && (endpoint == "" || endpoint == o.session.Endpoint()):
		if err := o.session.Renew(link); err != nil {
			return err
		}
	default:
		if o.session != nil { // what it may carry, or where it is, has changed
			o.session.Abandon()
			o.session = nil
		}
		if err := o.newSession(link, endpoint, allowed, t.Settings); err != nil {
			return err
		}
	}
	if err := o.node.setBehindServer(allowed, o.knownAs(t.Settings)); err != nil {
		o.log.Error("openconnect: address translation", "err", err)
	}
	o.settings, o.allowed, o.since = t.Settings, allowed, time.Now()
	o.rekeyAt = rekeyTime(t.Settings)
	o.change(func(s *OpenConnectStatus) {
		if s.State != OpenConnectUp || !s.Connected.IsZero() {
			s.Reconnects++
		}
		if s.Connected.IsZero() {
			s.Reconnects = 0
		}
		s.State, s.Connected, s.Settings, s.Server = OpenConnectUp, time.Now(), t.Settings, o.login.Host
		s.Remote, s.AllowedIPs = t.Remote.String(), allowed
	})
	return nil
}

func (o *openconnectTunnel) noteRemote(t *openconnect.Tunnel) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.remote = t.Remote
	o.local = netip.Addr{}
	if a, ok := t.Conn.LocalAddr().(*net.TCPAddr); ok {
		o.local = a.AddrPort().Addr().Unmap()
	}
}

// newSession makes the transport's session over link, which it takes.
func (o *openconnectTunnel) newSession(link transport.SessionLink, endpoint string, allowed []netip.Prefix, s *openconnect.Settings) error {
	ended := make(chan error, 1)
	session, err := o.node.transport.AddSession(transport.SessionConfig{
		Name: o.login.Host, Client: true, Endpoint: endpoint, Link: link, AllowedIPs: allowed,
		Datagrams:    transport.Intervals{DPD: s.DTLS.DPD, Keepalive: s.DTLS.Keepalive},
		Stream:       transport.Intervals{DPD: s.CSTP.DPD, Keepalive: s.CSTP.Keepalive},
		TiedChannels: !isPenstock(s),
		Events: transport.SessionEvents{
			Closed:      func(reason error) { ended <- reason },
			StreamLost:  o.streamLost,
			PathChanged: o.pathChanged,
		},
	})
	if err != nil {
		return err
	}
	o.session, o.ended = session, ended
	return nil
}

// isPenstock tells whether the server is of our kind.
func isPenstock(s *openconnect.Settings) bool { return strings.Contains(s.ServerName, "Penstock") }

// streamLost is told by the session.
func (o *openconnectTunnel) streamLost(reason error) {
	select {
	case o.lost <- reason:
	default:
	}
}

// pathChanged is told by the session.
func (o *openconnectTunnel) pathChanged(path transport.SessionPath, why string) {
	o.change(func(s *OpenConnectStatus) { s.Path, s.Why = string(path), why })
}

// knownAs are the addresses by which the server knows the node if others than its own: it could
// not give the old ones again. They are translated; connections that are open are lost, new ones work.
func (o *openconnectTunnel) knownAs(s *openconnect.Settings) (known []netip.Addr) {
	for _, a := range s.Addresses {
		if own := firstOf(o.node.cfg.Addresses, a.Addr().Is4()); own.IsValid() && own != a.Addr() {
			known = append(known, a.Addr())
		}
	}
	if len(known) > 0 {
		o.log.Warn("openconnect: the server has given another address, which is translated", "address", known, "own", o.node.cfg.Addresses)
	}
	return known
}

// rekeyTime is when the server wants new keys, zero for never. Ours come with a new tunnel, whichever way it names.
func rekeyTime(s *openconnect.Settings) time.Time {
	after := time.Duration(0)
	for _, t := range []openconnect.Timers{s.CSTP, s.DTLS} {
		if t.Rekey > 0 && t.RekeyMethod != openconnect.RekeyNone && (after == 0 || t.Rekey < after) {
			after = t.Rekey
		}
	}
	if after == 0 {
		return time.Time{}
	}
	return time.Now().Add(after)
}

// end gives the tunnel up for good.
func (o *openconnectTunnel) end(err error) {
	o.log.Error("openconnect: the tunnel has ended", "server", o.login.Host, "reason", err)
	if o.session != nil {
		o.session.Abandon()
		o.session = nil
	}
	o.change(func(s *OpenConnectStatus) {
		s.State, s.Path, s.Why, s.LastError, s.Err = OpenConnectEnded, string(transport.PathNone), "", err.Error(), err
	})
}

// change makes the status another and tells it.
func (o *openconnectTunnel) change(f func(*OpenConnectStatus)) {
	o.tellMu.Lock()
	defer o.tellMu.Unlock()
	o.mu.Lock()
	f(&o.status)
	s := o.status
	o.mu.Unlock()
	if o.cfg.Changed != nil {
		o.cfg.Changed(s)
	}
}

func (o *openconnectTunnel) snapshot() *OpenConnectStatus {
	if o == nil {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.status
	return &s
}
