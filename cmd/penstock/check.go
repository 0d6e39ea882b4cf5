package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
)

func newCheck() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "check -c FILE",
		Short: "validate a configuration without starting anything",
		Long: `Check reads a configuration, of a node or of a server (penstock serve), prints every mistake in it with its line and what is
expected, or else a summary of what the node would do. It opens no socket and
resolves no name.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			if file != "" && config.IsServer(file) {
				c, err := loadServer(file, cmd.ErrOrStderr())
				if err != nil {
					return err
				}
				return serverSummary(cmd.OutOrStdout(), c)
			}
			c, err := load(file, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return summary(cmd.OutOrStdout(), c)
		}),
	}
	configFlag(cmd, &file)
	return cmd
}

// load reads the file of -c and prints its warnings. Its errors are of usage: a
// file that cannot be read too.
func load(file string, stderr io.Writer) (*config.Config, error) {
	if file == "" {
		return nil, exitWith(exitUsage, errors.New("which configuration? name it with -c FILE"))
	}
	if config.IsServer(file) {
		return nil, exitWith(exitUsage, fmt.Errorf("%s is the configuration of a server: see penstock serve --help", file))
	}
	c, err := config.Load(file)
	if err != nil {
		return nil, exitWith(exitUsage, err)
	}
	for _, w := range c.Warnings {
		fmt.Fprintf(stderr, "%v (warning)\n", w)
	}
	return c, nil
}

// summary prints what a node would do.
func summary(w io.Writer, c *config.Config) error {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s "+format+"\n", append([]any{key}, args...)...)
	}
	fmt.Fprintf(&b, "%s: ok\n", c.File)
	line("public key", "%v", c.Node.PrivateKey.Public())
	line("address", "%s", joined(c.Node.Addresses))
	if len(c.Node.Listen) == 0 {
		line("listen", "any port")
	} else {
		line("listen", "%s", joined(c.Node.Listen))
	}
	if c.Node.MTU == 0 {
		line("mtu", "from the path")
	} else {
		line("mtu", "%d", c.Node.MTU)
	}
	if t := c.TUN; t != nil {
		routes := map[int]string{config.RoutesAuto: "a table of their own", config.RoutesNone: "none"}[t.Routes]
		if routes == "" {
			routes = fmt.Sprintf("table %d", t.Routes)
		}
		line("interface", "%s, routes: %s", t.Name, routes)
	}
	for _, p := range c.Peers {
		endpoint := p.Endpoint
		if endpoint == "" {
			endpoint = "calls us"
		}
		line("peer", "%s (%s): %s", peerName(p.Name, p.PublicKey.String()), endpoint, joined(p.AllowedIPs))
		if len(p.KnownAs) > 0 {
			line("", "knows us as %s", joined(p.KnownAs))
		}
	}
	for _, p := range c.Forwards {
		line("forward", "%s %s -> %s in the VPN", p.Network, p.Listen, p.To)
	}
	for _, p := range c.Publishes {
		line("publish", "%s %s in the VPN -> %s", p.Network, p.Listen, p.To)
	}
	switch p := c.Proxy; {
	case p.SOCKS5 != "" && p.SOCKS5 == p.HTTP:
		line("proxy", "SOCKS5 and HTTP on %s", p.SOCKS5)
	default:
		if p.SOCKS5 != "" {
			line("proxy", "SOCKS5 on %s", p.SOCKS5)
		}
		if p.HTTP != "" {
			line("proxy", "HTTP on %s", p.HTTP)
		}
	}
	for _, s := range c.DNS.Split {
		line("dns", "%s: %s", strings.Join(s.Domains, ", "), askedOf(s.Servers, s.ViaHost))
	}
	if len(c.DNS.Servers) > 0 {
		line("dns", "%s", askedOf(c.DNS.Servers, false))
	}
	if len(c.DNS.Search) > 0 {
		line("search", "%s", strings.Join(c.DNS.Search, ", "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// askedOf says who answers for a domain.
func askedOf(servers []netip.AddrPort, viaHost bool) string {
	switch {
	case len(servers) == 0:
		return "the system"
	case viaHost:
		return joined(servers) + " by the host's network"
	}
	return joined(servers) + " through the VPN"
}

// peerName is how a peer is called: by its name, or by the begin of its key.
func peerName(name, key string) string {
	if name == "" && len(key) >= 8 {
		return key[:8]
	}
	return name
}

func joined[T netip.Prefix | netip.AddrPort | netip.Addr](items []T) string {
	s := make([]string, len(items))
	for i, it := range items {
		s[i] = fmt.Sprint(it)
	}
	return strings.Join(s, ", ")
}
