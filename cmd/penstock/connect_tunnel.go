package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/signin"
)

// A client is a node with a tunnel to a server, and what is around it.
type client struct {
	log    *slog.Logger
	stdout io.Writer

	tunnel  netstack.OpenConnect
	session *signin.Session // nil with a cookie
	host    *clientHost     // nil without --tun
	node    *netstack.Node
	ended   chan error // why the tunnel has, for good

	hostClosed chan struct{} // closed when the host is as it was

	socket      string // of control
	stopControl func()
}

// tunnel signs in, connects, and stays until a signal, or the end of the tunnel.
func (k *connection) tunnel(ctx context.Context, up context.CancelFunc, signals <-chan os.Signal, cmd *cobra.Command, log *slog.Logger) error {
	c := &client{log: log, stdout: cmd.OutOrStdout(), ended: make(chan error, 1), hostClosed: make(chan struct{}), socket: k.socketPath()}
	// First, since it tells whether there is a connection already.
	l, err := control.Listen(c.socket)
	if errors.Is(err, control.ErrRunning) {
		return fmt.Errorf("%w; a second connection needs another --control", err)
	}
	if err != nil {
		return err
	}
	c.stopControl = func() { l.Close() }
	err = c.start(ctx, k, l, cmd)
	up()
	if err != nil {
		return errors.Join(k.explained(err), c.close())
	}
	manager := notifyReady(func() string { return nodeLine(c.node.Status()) }, log)
	var failure error
	select {
	case s := <-signals:
		c.tunnel.KeepSession = s == syscall.SIGHUP
		log.Info("closing", "signal", s.String(), "session", map[bool]string{true: "left to the server", false: "ended"}[s == syscall.SIGHUP])
	case err := <-c.ended:
		failure = fmt.Errorf("the tunnel to %s has ended: %w", k.host, err)
	}
	manager.closing()
	if err := finish(c.hostClosed, c.close, signals); err != nil {
		return errors.Join(failure, err)
	}
	log.Info("closed")
	return failure
}

// start starts everything. With an error c is to be closed.
func (c *client) start(ctx context.Context, k *connection, l net.Listener, cmd *cobra.Command) error {
	n := netstack.Config{OpenConnect: &c.tunnel, Logger: c.log}
	n.Socket.Logger = c.log
	var err error
	if k.tun != "" {
		// First, since what a dead node has left may be in the way of the server.
		if c.host, err = prepareClientHost(k, &n, c.log); err != nil {
			return err
		}
	}
	if err := c.signIn(ctx, k, cmd); err != nil {
		return err
	}
	if c.node, err = newNode(ctx, n); err != nil {
		c.signOut(k)
		return err
	}
	if err := c.serve(k); err != nil {
		return err
	}
	if c.host != nil {
		if err := c.host.apply(c.node); err != nil {
			return err
		}
	}
	c.stopControl = control.Serve(l, c.reporter(k), c.node)
	c.logUp()
	return nil
}

// signIn gets a cookie, by signing in or from the user, and says what kind of tunnel is wanted.
func (c *client) signIn(ctx context.Context, k *connection, cmd *cobra.Command) error {
	t := &c.tunnel
	t.Connect.Dialer = k.dialer
	t.Connect.NoDTLS, t.Connect.NoIPv6, t.Connect.BaseMTU, t.Connect.Hostname = k.noDTLS, k.noIPv6, k.baseMTU, k.hostname
	t.Connect.Dial = nil // the node's own, which honours its mark
	t.Changed = func(s netstack.OpenConnectStatus) {
		if c.host != nil {
			c.host.changed(s)
		}
		if s.State == netstack.OpenConnectEnded {
			select {
			case c.ended <- s.Err:
			default: // it ends once
			}
		}
	}
	cookie := k.cookie
	if k.cookieStdin {
		line, ok, err := k.stdin.get(ctx, 0, 0)
		if err != nil || !ok {
			return exitWith(exitUsage, errors.Join(errors.New("--cookie-on-stdin: the standard input has no line"), err))
		}
		cookie = line
	}
	if cookie != "" {
		t.Login = signin.Login{Host: k.host, Cookie: cookieOf(cookie), Pin: k.pin}
		return nil
	}
	session, err := k.session(ctx, cmd.InOrStdin(), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	login, err := session.SignIn(ctx)
	if err != nil {
		return err
	}
	if k.printCookie {
		fmt.Fprintln(cmd.OutOrStdout(), cookieName+login.Cookie)
	}
	t.Login, t.SignIn, c.session = *login, session.SignIn, session
	c.log.Info("signed in", "server", login.Host, "key", login.Pin)
	return nil
}

// signOutTime is what a goodbye may take when somebody is waiting for the program to end.
const signOutTime = 3 * time.Second

// signOut ends the session of a sign-in that has come to nothing. A cookie of the user's is left alone.
func (c *client) signOut(k *connection) {
	if c.session == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), signOutTime)
	defer cancel()
	if err := signin.Logout(ctx, &c.tunnel.Login, k.dialer); err != nil {
		c.log.Warn("the session is left to the server", "err", err)
	}
}

// newNode is netstack.New, given up when ctx ends.
func newNode(ctx context.Context, cfg netstack.Config) (*netstack.Node, error) {
	type result struct {
		node *netstack.Node
		err  error
	}
	got := make(chan result, 1)
	go func() {
		n, err := netstack.New(cfg)
		got <- result{n, err}
	}()
	select {
	case r := <-got:
		return r.node, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-got:
		if r.err == nil {
			return nil, errors.Join(context.Cause(ctx), r.node.Close())
		}
	case <-time.After(signOutTime):
	}
	return nil, context.Cause(ctx)
}

// serve opens proxies and forwards.
func (c *client) serve(k *connection) error {
	for _, p := range k.forwards {
		if _, err := c.node.Forward(p.Network, p.Listen, p.To); err != nil {
			return fmt.Errorf("--forward %s %s: %w", p.Network, p.Listen, err)
		}
	}
	if k.socks5 != "" || k.http != "" {
		return serveProxies(c.node, &config.Proxy{SOCKS5: k.socks5, HTTP: k.http})
	}
	if len(k.forwards) > 0 || k.tun != "" {
		return nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:1080") // IANA's port of SOCKS
	if err != nil {
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
	}
	address := l.Addr().String()
	if _, err := c.node.ServeProxy(l, netstack.ProxyOptions{}); err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.stdout, "proxy on %s, SOCKS5 and HTTP; for example\n\tcurl -x socks5h://%s http://HOST/\n", address, address)
	return err
}

// socketPath is where the connection answers penstock status.
func (k *connection) socketPath() string {
	if k.control != "" {
		return k.control
	}
	name := strings.Map(func(r rune) rune {
		if r == '/' || r == ':' || r == '[' || r == ']' || r == '%' {
			return '-'
		}
		return r
	}, strings.TrimSuffix(k.host, ":443"))
	return control.Path("connect-" + name + ".")
}

func (c *client) reporter(k *connection) func() control.Report {
	version := readBuild().version
	return func() control.Report {
		return control.Report{Version: version, PID: os.Getpid(), Config: "https://" + strings.TrimSuffix(k.host, ":443"), Node: c.node.Status()}
	}
}

// logUp says that the tunnel is up.
func (c *client) logUp() {
	s := c.node.OpenConnect()
	c.log.Info("up", "server", s.Remote, "address", joined(c.node.Addresses()), "behind", joined(s.AllowedIPs), "control", c.socket)
	if s.Settings != nil && s.Settings.Banner != "" {
		c.log.Info("the server says", "banner", printable(s.Settings.Banner))
	}
	for _, r := range c.node.Status().Relays {
		c.log.Info(r.Kind, "network", r.Network, "listen", r.Listen, "to", r.To)
	}
}

// close stops everything, as running.close does.
func (c *client) close() error {
	c.stopControl()
	var err error
	if c.host != nil {
		err = c.host.close()
	}
	close(c.hostClosed)
	if c.node == nil {
		return err
	}
	return errors.Join(err, c.node.Close())
}
