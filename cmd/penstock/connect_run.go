package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/sandbox"
	"github.com/penstock-vpn/penstock/netstack"
)

// runProgram is run with a program whose only network is the one behind the server. Its exit codes are those of penstock run.
func (c *connectFlags) runProgram(cmd *cobra.Command, server string, program []string) error {
	code, err := c.program(cmd, server, program)
	var e *sandbox.Error
	switch {
	case errors.As(err, &e):
		code = e.Code
	case err != nil:
		code = sandbox.ExitFailed
	case code == exitOK:
		return nil
	}
	return &exitError{code, err}
}

func (c *connectFlags) program(cmd *cobra.Command, server string, program []string) (code int, err error) {
	k, err := c.check(server, cmd.InOrStdin())
	if err != nil {
		return 0, err
	}
	if c.tun != "" || c.cookieOnly || c.authenticate || c.printCookie {
		return 0, errors.New("--tun, --cookieonly, --authenticate and --printcookie are not for a program")
	}
	log, err := newLoggerOf(cmd.ErrOrStderr(), slog.LevelWarn, "text", c.level, c.format)
	if err != nil {
		return 0, err
	}
	k.dialer.Logger = log
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, endings(false)...)
	defer signal.Stop(signals)
	ctx, up := interruptible(signals)
	defer up()

	l := &client{log: log, stdout: cmd.OutOrStdout(), ended: make(chan error, 1), hostClosed: make(chan struct{}), stopControl: func() {}}
	box, err := l.startInside(ctx, k, cmd, program)
	if box != nil {
		defer box.Close()
	}
	defer func() { err = errors.Join(err, l.close()) }()
	if err != nil {
		return 0, k.explained(err)
	}
	// From now on signals are the program's.
	theirs := make(chan os.Signal, 16)
	if s := sandbox.Forwarded(); len(s) > 0 { // none would mean all
		signal.Notify(theirs, s...)
	}
	defer signal.Stop(theirs)
	up()
	if l.session != nil {
		l.session.Unattended() // so is the terminal
	}
	box.Go()
	return attend(box, theirs)
}

// startInside signs in, and makes the node with a sandbox for the program. With an error both may be there, to be
// closed.
func (c *client) startInside(ctx context.Context, k *connection, cmd *cobra.Command, program []string) (box *sandbox.Sandbox, err error) {
	var l net.Listener
	if k.control != "" {
		if l, err = control.Listen(k.control); err != nil {
			return nil, err
		}
		c.stopControl = func() { l.Close() }
	}
	if err := c.signIn(ctx, k, cmd); err != nil {
		return nil, err
	}
	n := netstack.Config{OpenConnect: &c.tunnel, Logger: c.log}
	n.Socket.Logger = c.log
	c.tunnel.Prepare = func(given netstack.OpenConnectNetwork, n *netstack.Config) error {
		var err error
		if box, err = sandbox.Start(insideConfig(given, c.log, program)); err != nil {
			return err
		}
		for _, note := range box.Notes() {
			c.log.Warn("the program's namespace lacks something", "reason", note)
		}
		n.TUN = &netstack.TUNConfig{FD: box.TakeTUN(), MTUChanged: box.SetMTU}
		return nil
	}
	if c.node, err = newNode(ctx, n); err != nil {
		c.signOut(k)
		return box, err
	}
	for _, p := range k.forwards {
		if _, err := c.node.Forward(p.Network, p.Listen, p.To); err != nil {
			return box, err
		}
	}
	if err := serveProxies(c.node, &config.Proxy{SOCKS5: k.socks5, HTTP: k.http}); err != nil {
		return box, err
	}
	if l != nil {
		c.stopControl = control.Serve(l, c.reporter(k), c.node)
	}
	c.logUp()
	return box, nil
}

// insideConfig says what the program's namespace is like: as the server has it. Parts that the server excludes are not
// reached at all.
func insideConfig(given netstack.OpenConnectNetwork, log *slog.Logger, program []string) sandbox.Config {
	c := &config.Config{DNS: given.DNS}
	if len(c.DNS.Servers) == 0 {
		// Servers of some domains alone. The host's, which are asked about the rest, are out of the program's reach.
		for _, rule := range given.DNS.Split {
			c.DNS.Servers = append(c.DNS.Servers, rule.Servers...)
		}
	}
	c.Node.Addresses, c.Node.MTU = given.Addresses, given.MTU
	box := sandboxConfig(c, log, program)
	box.Routes = given.Routes
	return box
}
