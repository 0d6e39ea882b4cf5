package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/sandbox"
	"github.com/penstock-vpn/penstock/netstack"
)

func newRun() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run -c FILE [--publish [ADDRESS:]PORT[:PORT]]... [--] PROGRAM [ARG...]",
		Short: "run a program whose only network is the VPN",
		Long: `Run starts the node of a configuration and a program whose whole network it is: a
network namespace of its own with one interface, at the node's addresses, with
routes to the peers' allowed_ips and to nothing else, a loopback, and a resolv.conf
with the servers of [dns]. The program needs no proxy and knows nothing of it. No
privileges are needed where ordinary users may make user namespaces. Linux only.

The program keeps its user, files, terminal and environment. Peers reach the ports
that it listens on at the node's address; --publish makes one a port of the host
too. Signals are passed on to it. What it leaves behind ends with it.

Exit codes: the program's; 128 and the number of the signal that it died of; 125
when penstock has failed, 126 when the program cannot be executed, 127 when there
is none.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return exitWith(sandbox.ExitFailed, errors.New("which program? see penstock run --help"))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			code, err := o.run(cmd, args)
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
		},
	}
	configFlag(cmd, &o.file)
	cmd.Flags().SetInterspersed(false) // what follows the program is the program's
	cmd.Flags().StringArrayVarP(&o.publish, "publish", "p", nil, "make a TCP port of the program one of the host: `[ADDRESS:]PORT[:PORT]`, at 127.0.0.1 unless there is an address")
	cmd.Flags().StringVar(&o.level, "log-level", "warn", "debug, info, warn or error")
	cmd.Flags().StringVar(&o.format, "log-format", "", "text or json (default: the file's, or text)")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitWith(sandbox.ExitFailed, err) })
	complete(cmd, "log-level", "debug", "info", "warn", "error")
	complete(cmd, "log-format", "text", "json")
	return cmd
}

type runOptions struct {
	file, level, format string
	publish             []string
}

// run runs a node and a program in it, and returns the program's exit code.
func (o *runOptions) run(cmd *cobra.Command, args []string) (int, error) {
	c, err := load(o.file, cmd.ErrOrStderr())
	if err != nil {
		return 0, err
	}
	log, err := newLogger(cmd.ErrOrStderr(), c, o.level, o.format)
	if err != nil {
		return 0, err
	}
	box := sandboxConfig(c, log, args)
	if box.Publish, err = parsePublish(o.publish); err != nil {
		return 0, err
	}
	signals := make(chan os.Signal, 16)
	if s := sandbox.Forwarded(); len(s) > 0 { // none would mean all
		signal.Notify(signals, s...)
	}
	defer signal.Stop(signals)

	path := socketPath(c)
	// First, since it tells whether the node runs already.
	l, err := control.Listen(path)
	if err != nil {
		return 0, err
	}
	s, err := sandbox.Start(box)
	if err != nil {
		l.Close()
		return 0, err
	}
	defer s.Close()
	for _, n := range s.Notes() {
		log.Warn("the program's namespace lacks something", "reason", n)
	}
	node, err := startNode(c, log, func(n *netstack.Config) {
		n.TUN = &netstack.TUNConfig{FD: s.TakeTUN(), MTUChanged: s.SetMTU}
	})
	if err != nil {
		l.Close()
		return 0, err
	}
	defer node.Close()
	down := control.OnDown(func() { s.Signal(syscall.SIGTERM) })
	defer control.Serve(l, reporter(c, node), node, down)()
	logUp(log, node, path)
	s.Go()
	return attend(s, signals)
}

// attend passes signals on until the program has ended.
func attend(s *sandbox.Sandbox, signals <-chan os.Signal) (int, error) {
	for {
		select {
		case <-s.Done():
			return s.Wait()
		case sig := <-signals:
			s.Signal(sig.(syscall.Signal))
			sandbox.StopFor(sig)
		}
	}
}

// sandboxConfig says what the program's namespace is like.
func sandboxConfig(c *config.Config, log *slog.Logger, args []string) sandbox.Config {
	box := sandbox.Config{
		Addresses: c.Node.Addresses, MTU: c.Node.MTU, Search: c.DNS.Search, Program: args[0], Args: args[1:],
	}
	if box.MTU == 0 {
		box.MTU = netstack.DefaultMTU
	}
	for _, p := range c.Peers {
		box.Routes = append(box.Routes, p.AllowedIPs...)
	}
	servers := c.DNS.Servers
	for _, rule := range c.DNS.Split {
		switch {
		case rule.ViaHost:
			log.Warn("the program cannot ask over the host's network", "domains", strings.Join(rule.Domains, ", "))
		case len(rule.Domains) == 1 && rule.Domains[0] == ".":
			servers = rule.Servers
		default:
			log.Warn("the program asks the servers of [dns] for all names", "domains", strings.Join(rule.Domains, ", "))
		}
	}
	for _, a := range servers {
		if a.Port() != 53 { // which a resolv.conf cannot say
			log.Warn("the program cannot ask at another port than 53", "server", a)
			continue
		}
		box.Servers = append(box.Servers, a.Addr())
	}
	return box
}

// parsePublish reads [ADDRESS:]PORT[:PORT], an IPv6 address in brackets.
func parsePublish(texts []string) (all []sandbox.Publish, err error) {
	for _, text := range texts {
		p, ok := publishOf(text)
		if !ok {
			return nil, fmt.Errorf("--publish %q: expected [ADDRESS:]PORT[:PORT], such as 8080:80 or [::1]:8080:80", text)
		}
		all = append(all, p)
	}
	return all, nil
}

func publishOf(text string) (p sandbox.Publish, ok bool) {
	addr, rest := netip.AddrFrom4([4]byte{127, 0, 0, 1}), text
	if strings.ContainsAny(text, ".[") {
		end := strings.Index(text, ":")
		if strings.HasPrefix(text, "[") {
			end = strings.Index(text, "]:") + 1
		}
		if end <= 0 {
			return p, false
		}
		var err error
		if addr, err = netip.ParseAddr(strings.Trim(text[:end], "[]")); err != nil {
			return p, false
		}
		rest = text[end+1:]
	}
	outside, inside, two := strings.Cut(rest, ":")
	if !two {
		inside = outside
	}
	port := func(s string) uint16 { // 0: none
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			return 0
		}
		return uint16(n)
	}
	p.Listen, p.Port = netip.AddrPortFrom(addr, port(outside)), port(inside)
	return p, p.Listen.Port() != 0 && p.Port != 0
}
