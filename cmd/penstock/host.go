package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/hostnet"
	"github.com/penstock-vpn/penstock/netstack"
)

// A host is what a node with an interface of the kernel does to its host.
type host struct {
	cfg hostnet.Config

	mu    sync.Mutex
	mtu   int            // of the path, once it has changed
	state *hostnet.State // nil before apply
}

// prepareHost takes back what dead nodes have left, and finds out what would fail.
func prepareHost(cfg hostnet.Config) (*host, error) {
	log := cfg.Logger
	did, err := hostnet.Recover(cfg.Folder, nil)
	if err != nil {
		return nil, err
	}
	for _, r := range did {
		if r.Err != nil {
			log.Warn("of a node that died something is left", "interface", r.Interface, "config", r.Owner, "error", r.Err)
			continue
		}
		log.Info("took back what a node left that died", "interface", r.Interface, "config", r.Owner, "steps", r.Steps)
	}
	if err := hostnet.Check(cfg); err != nil {
		return nil, err
	}
	return &host{cfg: cfg}, nil
}

// hostConfig says the file's content in hostnet's words.
func hostConfig(c *config.Config, log *slog.Logger) hostnet.Config {
	h := hostnet.Config{
		Interface: c.TUN.Name,
		Owner:     absolute(c.File),
		Folder:    hostnet.Folder(control.Folder()),
		Addresses: c.Node.Addresses,
		Table:     c.TUN.Routes,
		FwMark:    c.TUN.FwMark,
		Logger:    log,
	}
	if h.FwMark == 0 && h.Table == hostnet.TableAuto {
		h.FwMark = hostnet.DefaultFwMark
	}
	for _, p := range c.Peers {
		h.Routes = append(h.Routes, p.AllowedIPs...)
		if a, err := netip.ParseAddrPort(p.Endpoint); err == nil {
			h.Endpoints = append(h.Endpoints, a.Addr())
		} else {
			h.Anywhere = true // it has a name, or calls
		}
	}
	if c.TUN.NoDNS {
		return h
	}
	h.DNS = hostnet.DNS{Servers: c.DNS.Servers, Search: c.DNS.Search}
	for _, s := range c.DNS.Split {
		if !s.ViaHost { // the others stay with the host's servers
			h.DNS.Split = append(h.DNS.Split, hostnet.SplitDNS{Domains: s.Domains, Servers: s.Servers})
		}
	}
	return h
}

// node adds to the node's configuration what the host needs of it.
func (h *host) node(n *netstack.Config, queues int) {
	n.TUN = &netstack.TUNConfig{Name: h.cfg.Interface, Queues: queues, MTUChanged: h.pathMTU}
	n.Socket.Mark = h.cfg.FwMark
	if e := hostnet.NewEndpoints(h.cfg.FwMark, h.cfg.DNS); e != nil {
		n.ResolveEndpoint = e.Resolve
	}
}

// apply changes the host for the interface that the node has opened.
func (h *host) apply(node *netstack.Node) error {
	cfg := h.cfg
	cfg.Interface = node.Status().TUN.Name
	s, err := hostnet.Apply(cfg)
	if err != nil {
		return err
	}
	h.mu.Lock()
	h.state = s
	mtu := h.mtu
	h.mu.Unlock()
	if mtu != 0 {
		h.setMTU(s, mtu)
	}
	return nil
}

// pathMTU makes the interface follow the path.
func (h *host) pathMTU(mtu int) {
	h.mu.Lock()
	h.mtu = mtu
	s := h.state
	h.mu.Unlock()
	if s != nil {
		h.setMTU(s, mtu)
	}
}

func (h *host) setMTU(s *hostnet.State, mtu int) {
	if err := s.SetMTU(mtu); err != nil && !errors.Is(err, os.ErrClosed) {
		h.cfg.Logger.Warn("the interface's MTU cannot follow the path's", "mtu", mtu, "error", err)
	}
}

// close makes the host as it was.
func (h *host) close() error {
	if h == nil || h.state == nil {
		return nil
	}
	if err := h.state.Close(); err != nil {
		return fmt.Errorf("something is left on the host, for penstock down to take back: %w", err)
	}
	return nil
}

func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}
