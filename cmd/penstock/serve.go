package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/hostnet"
	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

func newServe() *cobra.Command {
	var file, level, format string
	var fast bool
	var q quick
	cmd := &cobra.Command{
		Use:   "serve -c FILE | --quick",
		Short: "run a server for OpenConnect and AnyConnect clients in the foreground",
		Long: `Serve runs the VPN server that a configuration describes until it is interrupted
(SIGINT, SIGTERM or SIGHUP; a second one ends it at once): HTTPS and CSTP on TCP, DTLS on UDP at the
same port. It needs no privileges, but for a port below 1024. docs/server.md has everything.

With --quick it needs no configuration either: it makes a user with a new password and a
certificate of its own, lets the user reach whatever this machine reaches, and
prints the command by which openconnect connects.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			if fast == (file != "") {
				return exitWith(exitUsage, errors.New("which server? name its configuration with -c FILE, or say --quick"))
			}
			for _, name := range []string{"listen", "host", "user", "state"} {
				if !fast && cmd.Flags().Changed(name) {
					return exitWith(exitUsage, fmt.Errorf("--%s goes with --quick; with -c the file says it", name))
				}
			}
			if fast {
				return q.serve(cmd.OutOrStdout(), cmd.ErrOrStderr(), level, format)
			}
			c, err := loadServer(file, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			log, err := newLoggerOf(cmd.ErrOrStderr(), c.LogLevel, c.LogFormat, level, format)
			if err != nil {
				return err
			}
			return serve(c, log, func() error { return nil }, func(*gateway.Server) {})
		}),
	}
	configFlag(cmd, &file)
	f := cmd.Flags()
	f.BoolVar(&fast, "quick", false, "a server without a configuration")
	f.StringVar(&q.listen, "listen", "[::]:4443", "with --quick: `ADDRESS:PORT` for TCP and UDP")
	f.StringVar(&q.host, "host", "", "with --quick: the `NAME` or address by which clients call the server (default: that of --listen, or this machine's)")
	f.StringVar(&q.user, "user", "me", "with --quick: the user's `NAME`")
	f.StringVar(&q.state, "state", "", "with --quick: the `FOLDER` for certificate and user (default: one for this user)")
	f.StringVar(&level, "log-level", "", "debug, info, warn or error (default: the file's, or info)")
	f.StringVar(&format, "log-format", "", "text or json (default: the file's, or text)")
	complete(cmd, "log-level", "debug", "info", "warn", "error")
	complete(cmd, "log-format", "text", "json")
	return cmd
}

// loadServer reads the file of -c and prints its warnings. Its errors are of usage: a
// file that cannot be read too.
func loadServer(file string, stderr io.Writer) (*config.Server, error) {
	c, err := config.LoadServer(file)
	if err != nil {
		return nil, exitWith(exitUsage, err)
	}
	for _, w := range c.Warnings {
		fmt.Fprintf(stderr, "%v (warning)\n", w)
	}
	return c, nil
}

// serve runs a server until it is interrupted. prepare is called when it is sure that this server does not run
// already, up when everything runs.
func serve(c *config.Server, log *slog.Logger, prepare func() error, up func(*gateway.Server)) error {
	interrupts := make(chan os.Signal, 2)
	signal.Notify(interrupts, endings(c.TUN != nil)...)
	defer signal.Stop(interrupts)

	path := serverSocket(c)
	l, err := control.Listen(path)
	if err != nil {
		return err
	}
	if err := prepare(); err != nil {
		l.Close()
		return err
	}
	h, err := serverHost(c, log)
	if err != nil {
		l.Close()
		return err
	}
	server, err := startServer(c, h, log)
	if err == nil && h != nil {
		if err = h.apply(server.Node()); err != nil {
			err = errors.Join(err, server.Close())
		}
	}
	if err != nil {
		l.Close()
		return err
	}
	stopControl := control.ServeGateway(l, serverReporter(c, server), server)
	hostClosed := make(chan struct{})
	closeAll := func() error {
		stopControl()
		err := h.close()
		close(hostClosed)
		return errors.Join(err, server.Close())
	}
	logServer(log, server, path)
	up(server)
	manager := notifyReady(func() string { return serverLine(server.Status()) }, log)
	s := <-interrupts
	log.Info("closing", "signal", s.String())
	manager.closing()
	if err := finish(hostClosed, closeAll, interrupts); err != nil {
		return err
	}
	log.Info("closed")
	return nil
}

// serverHost prepares the host for an interface of the kernel; nil without one.
func serverHost(c *config.Server, log *slog.Logger) (*host, error) {
	if c.TUN == nil {
		return nil, nil
	}
	mtu := c.MTU
	if mtu == 0 {
		mtu = gateway.DefaultMTU
	}
	return prepareHost(hostnet.Config{
		Interface: c.TUN.Name, Owner: absolute(c.File), Folder: hostnet.Folder(control.Folder()),
		Addresses: c.Addresses, MTU: mtu, Table: hostnet.TableNone, Logger: log,
	})
}

// clientsApart are rules that keep clients from each other where the kernel would forward from one to the other.
func clientsApart(c *config.Server) []netstack.ACLRule {
	var own, clients []netip.Prefix
	for _, a := range c.Addresses {
		own = append(own, netip.PrefixFrom(a.Addr(), a.Addr().BitLen()))
		clients = append(clients, a.Masked())
	}
	return []netstack.ACLRule{{To: own}, {Deny: true, Direction: "in", To: clients}, {}}
}

// warnForwarding says what the kernel still lacks.
func warnForwarding(c *config.Server, log *slog.Logger) {
	for _, a := range c.Addresses {
		name := "net.ipv6.conf.all.forwarding"
		if a.Addr().Is4() {
			name = "net.ipv4.ip_forward"
		}
		text, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
		if err == nil && strings.TrimSpace(string(text)) == "0" {
			log.Warn("the kernel does not forward: clients reach nothing but this host", "sysctl", name+"=1")
		}
	}
}

// startServer says the file's content in the library's words. h is nil without an interface of the kernel.
func startServer(c *config.Server, h *host, log *slog.Logger) (*gateway.Server, error) {
	users, err := gateway.OpenUserFile(c.Auth.Users, log)
	if err != nil {
		return nil, exitWith(exitUsage, err)
	}
	if needsState(c) {
		if err := makeState(stateFolder(c)); err != nil {
			return nil, err
		}
	}
	store, err := openStore(c)
	if err != nil {
		return nil, err
	}
	g := gateway.Config{
		Listen: c.Listen, PublicPort: c.PublicPort,
		Certificate: c.Certificate, Key: c.Key, StateDir: stateFolder(c), Names: c.Names,
		Users: users, Method: c.Auth.Method, ClientCAs: c.Auth.ClientCA, CertificateUser: c.Auth.CertificateUser,
		Profile: c.Clients, Groups: c.Groups,
		MaxClients: c.MaxClients, MaxPerUser: c.MaxPerUser,
		Ban: c.Ban, Store: store, ServerID: c.ID,
		Node: netstack.Config{
			Addresses: c.Addresses, MTU: c.MTU, Router: c.Router, Switch: c.ClientToClient,
			TCP: c.TCP, NoGSO: c.Offload.NoSuperpackets,
		},
		Logger: log,
	}
	switch {
	case h != nil:
		g.Node.TUN = &netstack.TUNConfig{Name: c.TUN.Name, Queues: c.TUN.Queues, MTUChanged: h.pathMTU}
		if !c.ClientToClient {
			// Flows would be work, and clients could use up what there is room for.
			g.Node.ACL, g.Node.ACLLimits.Stateless = clientsApart(c), true
		}
		warnForwarding(c, log)
	case g.Node.Router == nil:
		g.Node.Router = &netstack.RouterConfig{} // nothing
	}
	setSocket(&g.Node, c.Offload, log)
	server, err := gateway.New(g)
	var mistake *gateway.ConfigError
	if errors.As(err, &mistake) {
		return nil, exitWith(exitUsage, fmt.Errorf("%s: %w", c.File, err))
	}
	if err != nil {
		return nil, err
	}
	for _, p := range c.Publishes {
		if _, err := server.Node().Publish(p.Network, p.Listen, p.To); err != nil {
			server.Close()
			return nil, fmt.Errorf("publish %s %s: %w", p.Network, p.Listen, err)
		}
	}
	return server, nil
}

func openStore(c *config.Server) (gateway.Store, error) {
	switch c.Store.Engine {
	case "bbolt":
		path := c.Store.Path
		if path == "" {
			path = filepath.Join(stateFolder(c), "store.db")
		}
		return gateway.OpenBoltStore(path)
	case "redis":
		return gateway.OpenRedisStore(gateway.RedisOptions{URL: c.Store.URL, Password: c.Store.Password, Name: c.Store.Name})
	}
	return gateway.NewMemoryStore(), nil
}

// needsState tells whether something is kept in the state folder.
func needsState(c *config.Server) bool {
	return c.Certificate == "" || c.Store.Engine == "bbolt" && c.Store.Path == ""
}

// stateFolder is what [server] state says; what systemd has made for the service; or else a folder for the
// file's name below /var/lib for root, and below the user's own state.
func stateFolder(c *config.Server) string {
	if c.State != "" {
		return c.State
	}
	if dir := os.Getenv("STATE_DIRECTORY"); filepath.IsAbs(dir) {
		dir, _, _ = strings.Cut(dir, ":") // systemd separates several
		return dir
	}
	name := strings.TrimSuffix(filepath.Base(c.File), filepath.Ext(c.File))
	return filepath.Join(userState(), name)
}

// makeState makes a folder that nobody else can read. Those above it root shares with the servers that systemd
// runs as other users.
func makeState(folder string) error {
	above := os.FileMode(0o700)
	if os.Geteuid() == 0 {
		above = 0o755
	}
	if err := os.MkdirAll(filepath.Dir(folder), above); err != nil {
		return err
	}
	if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// userState is where this user's programs keep state (XDG Base Directory Specification).
func userState() string {
	if os.Geteuid() == 0 {
		return "/var/lib/penstock"
	}
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "penstock")
	}
	if home, err := os.UserHomeDir(); err == nil {
		return filepath.Join(home, ".local", "state", "penstock")
	}
	return control.Folder()
}

// serverSocket is where the server of a configuration answers.
func serverSocket(c *config.Server) string {
	if c.Socket != "" {
		return c.Socket
	}
	return control.Path(c.File)
}

func serverReporter(c *config.Server, server *gateway.Server) func() control.Report {
	file, err := filepath.Abs(c.File)
	if err != nil {
		file = c.File
	}
	version := readBuild().version
	return func() control.Report {
		status := server.Status()
		return control.Report{Version: version, PID: os.Getpid(), Config: file, Node: server.Node().Status(), Server: &status}
	}
}

// logServer says that the server is up, and how to come in.
func logServer(log *slog.Logger, server *gateway.Server, path string) {
	log.Info("serving", "listen", joined(server.Addrs()), "address", joined(server.Node().Addresses()), "control", path)
	if server.SelfSigned() {
		log.Info("the certificate is self-signed; clients connect with", "command", server.Command("HOST", "USER"))
	}
	for _, s := range server.Node().Status().Tunnel.Sockets {
		c := s.Capabilities
		log.Info("socket", "local", s.Local, "gso", c.GSO.String(), "gro", c.GRO.String(),
			"receive_buffer", c.ReceiveBuffer, "send_buffer", c.SendBuffer)
	}
}

// serverSummary prints what a server would do.
func serverSummary(w io.Writer, c *config.Server) error {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{key}, args...)...)
	}
	fmt.Fprintf(&b, "%s: ok\n", c.File)
	listen := "[::]:443"
	if len(c.Listen) > 0 {
		listen = joined(c.Listen)
	}
	line("listen", "%s, TCP and UDP", listen)
	if c.PublicPort != 0 {
		line("public port", "%d", c.PublicPort)
	}
	line("address", "%s", joined(c.Addresses))
	if c.Certificate != "" {
		line("certificate", "%s", c.Certificate)
	} else {
		line("certificate", "self-signed, in %s", stateFolder(c))
	}
	line("sign-in", "%s, users in %s", c.Auth.Method, c.Auth.Users)
	for _, r := range c.Clients.Pool {
		line("pool", "%s", r)
	}
	for _, g := range c.Groups {
		label := g.Label
		if label == "" {
			label = g.Name
		}
		line("group", "%s (%s)", g.Name, label)
	}
	line("store", "%s", c.Store.Engine)
	if c.Router != nil {
		line("router", "%s, %d rules", joined(c.Router.Allow), len(c.Router.Rules))
	}
	for _, p := range c.Publishes {
		line("publish", "%s %s in the VPN -> %s", p.Network, p.Listen, p.To)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
