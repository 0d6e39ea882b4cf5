package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/speed"
	"github.com/penstock-vpn/penstock/netstack"
)

func newUp() *cobra.Command {
	var file, level, format string
	cmd := &cobra.Command{
		Use:   "up -c FILE",
		Short: "run a node in the foreground",
		Long: `Up runs the node that a configuration describes until it is interrupted (SIGINT,
SIGTERM or SIGHUP; a second one ends it at once) or told by penstock down. Logs go to
the standard error.

With device = "tun" it takes back first what nodes have left that were killed, and
whatever signal ends it, but SIGKILL, leaves the host as it was.

Nothing is started when the configuration has a mistake (exit code 2), and
everything is stopped again when a part cannot be started (exit code 1).`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			c, err := load(file, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			log, err := newLogger(cmd.ErrOrStderr(), c, level, format)
			if err != nil {
				return err
			}
			return up(c, log)
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().StringVar(&level, "log-level", "", "debug, info, warn or error (default: the file's, or info)")
	cmd.Flags().StringVar(&format, "log-format", "", "text or json (default: the file's, or text)")
	complete(cmd, "log-level", "debug", "info", "warn", "error")
	complete(cmd, "log-format", "text", "json")
	return cmd
}

// complete gives a flag the values that the shell offers.
func complete(cmd *cobra.Command, flag string, values ...string) {
	// The error is for a flag that does not exist.
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// newLogger writes as the flags say, or else as the file does.
func newLogger(w io.Writer, c *config.Config, level, format string) (*slog.Logger, error) {
	return newLoggerOf(w, c.Node.LogLevel, c.Node.LogFormat, level, format)
}

// newLoggerOf writes as the flags level and format say, or else as the file does.
func newLoggerOf(w io.Writer, fileLevel slog.Level, fileFormat, level, format string) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{Level: fileLevel}
	if level != "" {
		l, ok := config.LogLevel(level)
		if !ok {
			return nil, exitWith(exitUsage, fmt.Errorf("--log-level %q: expected debug, info, warn or error", level))
		}
		opts.Level = l
	}
	if format == "" {
		format = fileFormat
	}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, exitWith(exitUsage, fmt.Errorf("--log-format %q: expected text or json", format))
}

// up runs a node until it is interrupted.
func up(c *config.Config, log *slog.Logger) error {
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, endings(c.TUN != nil)...)
	defer signal.Stop(interrupts)
	down := make(chan struct{}, 1)

	r, err := bringUp(c, log, func() {
		select {
		case down <- struct{}{}:
		default: // it knows already
		}
	})
	if err != nil {
		return err
	}
	manager := notifyReady(func() string { return nodeLine(r.node.Status()) }, log)
	why := "penstock down"
	select {
	case s := <-interrupts:
		why = s.String()
	case <-down:
	}
	log.Info("closing", "signal", why)
	manager.closing()
	if err := finish(r.hostClosed, r.close, interrupts); err != nil {
		return err
	}
	log.Info("closed")
	return nil
}

// finish waits for close to end, or for one more signal. Before done is closed, if it is not nil, close
// is given up only for a third one.
func finish(done <-chan struct{}, close func() error, interrupts <-chan os.Signal) error {
	closed := make(chan error, 1)
	go func() { closed <- close() }()
	select {
	case err := <-closed:
		return err
	case s := <-interrupts:
		err := fmt.Errorf("interrupted again (%v) before everything was closed", s)
		if done != nil {
			select {
			case <-done:
			case <-interrupts:
			}
		}
		return err
	}
}

// running is a node and what answers for it.
type running struct {
	node        *netstack.Node
	host        *host         // nil unless the node has an interface of the kernel
	speed       *speed.Server // nil unless the configuration allows it
	stopControl func()
	hostClosed  chan struct{} // closed when the host is as it was
}

// bringUp starts everything or, with an error, nothing. down is called when somebody asks the
// node to end.
func bringUp(c *config.Config, log *slog.Logger, down func()) (*running, error) {
	path := socketPath(c)
	// First, since it tells whether the node runs already.
	l, err := control.Listen(path)
	if err != nil {
		return nil, err
	}
	if c.Node.SocketGroup != "" {
		if err := control.Share(path, c.Node.SocketGroup); err != nil {
			l.Close()
			return nil, err
		}
	}
	r := &running{stopControl: func() { l.Close() }, hostClosed: make(chan struct{})}
	if err := r.start(c, log); err != nil {
		return nil, errors.Join(err, r.close())
	}
	r.stopControl = control.Serve(l, reporter(c, r.node), r.node, control.OnDown(down))
	logUp(log, r.node, path)
	return r, nil
}

// start starts what is behind the control socket. The host changes last, when packets can go where
// they are led to. With an error r is to be closed.
func (r *running) start(c *config.Config, log *slog.Logger) (err error) {
	if c.TUN != nil {
		if r.host, err = prepareHost(hostConfig(c, log)); err != nil {
			return err
		}
	}
	var edit func(*netstack.Config)
	if r.host != nil {
		edit = func(n *netstack.Config) { r.host.node(n, c.TUN.Queues) }
	}
	if r.node, err = startNode(c, log, edit); err != nil {
		return err
	}
	if c.Node.Speedtest {
		if r.speed, err = speed.Serve(r.node); err != nil {
			return fmt.Errorf("speedtest: %w", err)
		}
	}
	if r.host != nil {
		return r.host.apply(r.node)
	}
	return nil
}

// startNode starts the node and its ports. edit, if not nil, has the last word about the node.
func startNode(c *config.Config, log *slog.Logger, edit func(*netstack.Config)) (*netstack.Node, error) {
	n := nodeConfig(c, log)
	if edit != nil {
		edit(&n)
	}
	node, err := netstack.New(n)
	var mistake *netstack.ConfigError
	if errors.As(err, &mistake) {
		return nil, exitWith(exitUsage, fmt.Errorf("%s: %w", c.File, err))
	}
	if err != nil {
		return nil, err
	}
	for _, p := range c.Publishes {
		if _, err := node.Publish(p.Network, p.Listen, p.To); err != nil {
			node.Close()
			return nil, fmt.Errorf("publish %s %s: %w", p.Network, p.Listen, err)
		}
	}
	for _, p := range c.Forwards {
		if _, err := node.Forward(p.Network, p.Listen, p.To); err != nil {
			node.Close()
			return nil, fmt.Errorf("forward %s %s: %w", p.Network, p.Listen, err)
		}
	}
	if err := serveProxies(node, &c.Proxy); err != nil {
		node.Close()
		return nil, err
	}
	return node, nil
}

// serveProxies opens the ports of [proxy]: one for both protocols if they have the same.
func serveProxies(node *netstack.Node, p *config.Proxy) error {
	o := netstack.ProxyOptions{User: p.User, Password: p.Password}
	serve := func(key, listen string, noSOCKS5, noHTTP bool) error {
		if listen == "" {
			return nil
		}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return fmt.Errorf("proxy.%s: %w", key, err)
		}
		o.NoSOCKS5, o.NoHTTP = noSOCKS5, noHTTP
		_, err = node.ServeProxy(l, o)
		return err
	}
	if p.SOCKS5 == p.HTTP {
		return serve("socks5", p.SOCKS5, false, false)
	}
	if err := serve("socks5", p.SOCKS5, false, true); err != nil {
		return err
	}
	return serve("http", p.HTTP, true, false)
}

// nodeConfig says the file's content in the library's words.
func nodeConfig(c *config.Config, log *slog.Logger) netstack.Config {
	n := netstack.Config{
		PrivateKey:   c.Node.PrivateKey,
		Addresses:    c.Node.Addresses,
		Listen:       c.Node.Listen,
		MTU:          c.Node.MTU,
		Queues:       c.Node.Queues,
		DNS:          c.DNS,
		Router:       c.Router,
		ACL:          c.ACL,
		ACLLimits:    c.ACLLimits,
		TCP:          c.TCP,
		Timing:       c.Timing,
		CipherSuites: c.Node.CipherSuites,
		NoGSO:        c.Offload.NoSuperpackets,
		Logger:       log,
	}
	setSocket(&n, c.Offload, log)
	for _, p := range c.Peers {
		n.Peers = append(n.Peers, netstack.Peer{
			Name: p.Name, PublicKey: p.PublicKey, Endpoint: p.Endpoint, AllowedIPs: p.AllowedIPs, KnownAs: p.KnownAs,
		})
	}
	return n
}

// setSocket says [offload] in the library's words.
func setSocket(n *netstack.Config, o config.Offload, log *slog.Logger) {
	n.Socket.DisableGSO = o.NoGSO
	n.Socket.DisableGRO = o.NoGRO
	n.Socket.SendBuffer = o.SendBuffer
	n.Socket.ReceiveBuffer = o.ReceiveBuffer
	n.Socket.MaxSegments = o.MaxSegments
	n.Socket.MaxPacingRate = uint64(o.PacingRate)
	n.Socket.Logger = log
}

// socketPath is where the node of a configuration answers.
func socketPath(c *config.Config) string {
	if c.Node.Socket != "" {
		return c.Node.Socket
	}
	return control.Path(c.File)
}

func reporter(c *config.Config, node *netstack.Node) func() control.Report {
	file, version := absolute(c.File), readBuild().version
	return func() control.Report {
		return control.Report{Version: version, PID: os.Getpid(), Config: file, Node: node.Status()}
	}
}

// logUp says that the node is up, and what will slow it down.
func logUp(log *slog.Logger, node *netstack.Node, path string) {
	status := node.Status()
	log.Info("up", "public_key", status.PublicKey, "address", joined(status.Addresses), "control", path)
	for _, s := range status.Tunnel.Sockets {
		c := s.Capabilities
		log.Info("socket", "local", s.Local, "gso", c.GSO.String(), "gro", c.GRO.String(),
			"receive_buffer", c.ReceiveBuffer, "send_buffer", c.SendBuffer)
	}
	if t := status.TUN; t != nil {
		log.Info("interface", "name", t.Name, "tso", t.Capabilities.TSO.String(), "uso", t.Capabilities.USO.String(),
			"gro_tcp", t.Capabilities.GROTCP.String(), "queues", t.Capabilities.Queues)
	}
	if r := status.Router; r != nil {
		log.Info("router", "ping4", r.Echo4, "ping6", r.Echo6)
	}
	for _, r := range status.Relays {
		log.Info(r.Kind, "network", r.Network, "listen", r.Listen, "to", r.To)
	}
}

// close stops everything. The control socket goes first: a node that closes is not
// to be asked, and the next one may start. Then the host gets its own ways back, while the node
// still takes what comes by the old ones.
func (r *running) close() error {
	r.stopControl()
	err := r.host.close()
	close(r.hostClosed)
	if r.speed != nil {
		r.speed.Close()
	}
	if r.node == nil {
		return err
	}
	return errors.Join(err, r.node.Close())
}
