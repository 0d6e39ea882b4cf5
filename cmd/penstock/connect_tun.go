package main

import (
	"log/slog"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/hostnet"
	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/signin"
)

// A clientHost is what a client of a server does to its host: addresses, routes and DNS are what the server gives.
type clientHost struct {
	*host
	log     *slog.Logger
	resolve atomic.Pointer[hostnet.Endpoints] // the server's name by the host's network; nil before the host is changed
	behind  []netip.Prefix                    // as first told; of changed alone
}

// prepareClientHost is prepareHost for a client. It completes k, which then signs in beside the tunnel, and n, whose
// OpenConnect completes the rest when the server has told it.
func prepareClientHost(k *connection, n *netstack.Config, log *slog.Logger) (*clientHost, error) {
	h, err := prepareHost(hostnet.Config{
		Interface: k.tun, Owner: "https://" + k.host, Folder: hostnet.Folder(control.Folder()),
		Table: hostnet.TableAuto, FwMark: hostnet.DefaultFwMark, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	c := &clientHost{host: h, log: log}
	k.dialer.Dial = signin.MarkedDial(h.cfg.FwMark, func(address string) ([]netip.AddrPort, error) {
		if e := c.resolve.Load(); e != nil {
			return e.Resolve(address)
		}
		return nil, nil
	})
	n.Socket.Mark = h.cfg.FwMark
	n.OpenConnect.Prepare = func(given netstack.OpenConnectNetwork, n *netstack.Config) error {
		h.cfg.Addresses, h.cfg.Routes, h.cfg.Exclude = given.Addresses, given.Routes, given.Exclude
		if !k.noDNS {
			h.cfg.DNS = hostnet.DNS{Servers: given.DNS.Servers, Search: given.DNS.Search}
			for _, s := range given.DNS.Split {
				h.cfg.DNS.Split = append(h.cfg.DNS.Split, hostnet.SplitDNS{Domains: s.Domains, Servers: s.Servers})
			}
		}
		h.node(n, 0)
		c.resolve.Store(hostnet.NewEndpoints(h.cfg.FwMark, h.cfg.DNS))
		return hostnet.Check(h.cfg)
	}
	return c, nil
}

// apply changes the host when the tunnel is up.
func (c *clientHost) apply(node *netstack.Node) error {
	if remote, err := netip.ParseAddrPort(node.OpenConnect().Remote); err == nil {
		c.cfg.Endpoints = []netip.Addr{remote.Addr().Unmap()}
	}
	return c.host.apply(node)
}

// changed is told of every change of the tunnel. The host's routes stay what they were at first.
func (c *clientHost) changed(s netstack.OpenConnectStatus) {
	switch {
	case s.State != netstack.OpenConnectUp:
	case c.behind == nil:
		c.behind = s.AllowedIPs
	case !slices.Equal(c.behind, s.AllowedIPs):
		c.behind = s.AllowedIPs
		c.log.Warn("the server has other networks behind it now; the routes here stay until this program is started again", "behind", joined(s.AllowedIPs))
	}
}
