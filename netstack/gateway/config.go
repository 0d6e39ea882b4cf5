package gateway

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// Config describes a [Server]. Users, Node.Addresses and Profile.Pool are required.
type Config struct {
	// Listen are the addresses for TCP, and for UDP at the same ports. Empty: [::]:443.
	Listen []netip.AddrPort
	// PublicPort is the port, of TCP and UDP, by which clients reach the server where that is not
	// the one it listens on: behind a port mapping, or a balancer. 0: the same.
	PublicPort int

	// Certificate and Key are PEM files, read again when they change. Without them the
	// server has a self-signed certificate of its own in StateDir.
	Certificate, Key string
	StateDir         string
	// Names are what the self-signed certificate is for, the first of them being how clients call the server.
	Names []string

	Users  Users
	Method Method // empty: Password
	// ClientCAs is a PEM file with who signs the clients' certificates.
	ClientCAs string
	// CertificateUser is the user's name in a certificate; empty: CertificateCN.
	CertificateUser CertificateUser

	Profile Profile // for users without a group, and what groups do not say themselves
	Groups  []Group

	MaxClients int // tunnels at once; 0: 4096
	MaxPerUser int // sessions of one user, on all servers that share the store; 0: 10

	Ban BanConfig

	// Store is where sessions live; nil: in memory. The Server takes it.
	Store Store
	// ServerID tells servers that share a store apart; empty: a random one.
	ServerID string

	// Node is the inside: addresses, router, kernel interface and all the rest. Its PrivateKey is
	// made up if there is none, Listen is not used, and MTU 0 means [DefaultMTU]. The rules of its ACL can name groups, [DefaultGroup]
	// for clients without; they are asked before those of OnlyRoutes, but for a last one that allows everything.
	Node netstack.Config

	// SessionCheck is how often a session's user is looked up again; 0: a minute.
	SessionCheck time.Duration

	Logger *slog.Logger // nil: discarded
}

// Defaults.
const (
	defaultMaxClients = 4096
	defaultMaxPerUser = 10
)

// DefaultMTU is the packet that fits one record on a path of 1500 bytes over IPv4; see
// [openconnect.InnerMTU]. Clients get less as their path asks for it.
const DefaultMTU = 1434

// ConfigError is one mistake in a [Config].
type ConfigError = netstack.ConfigError

// complete checks c and fills in what is not set. The mistakes of Node are found when it starts.
func (c *Config) complete() error {
	var errs []error
	bad := func(key, value, want string) { errs = append(errs, &ConfigError{Key: key, Value: value, Want: want}) }
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if len(c.Listen) == 0 {
		c.Listen = []netip.AddrPort{netip.MustParseAddrPort("[::]:443")}
	}
	for _, l := range c.Listen {
		if !l.IsValid() {
			bad("Listen", l.String(), "an address and port such as [::]:443")
		}
	}
	if c.PublicPort < 0 || c.PublicPort > 65535 {
		bad("PublicPort", fmt.Sprint(c.PublicPort), "a port, or 0 for that of Listen")
	}
	switch {
	case (c.Certificate == "") != (c.Key == ""):
		bad("Key", c.Key, "both a certificate and its key, or neither")
	case c.Certificate == "" && c.StateDir == "":
		bad("StateDir", "", "a folder for the self-signed certificate, or Certificate and Key")
	}
	if c.Users == nil {
		bad("Users", "", "who may come in")
	}
	or(&c.Method, Password)
	switch c.Method {
	case Password, Certificate, Either, Both:
	default:
		bad("Method", string(c.Method), "password, certificate, either or both")
	}
	if c.Method.certificates() && c.ClientCAs == "" {
		bad("ClientCAs", "", "a file with who signs the clients' certificates")
	}
	or(&c.CertificateUser, CertificateCN)
	switch c.CertificateUser {
	case CertificateCN, CertificateUID, CertificateEmail, CertificateDNS, CertificateURI:
	default:
		bad("CertificateUser", string(c.CertificateUser), "cn, uid, email, dns or uri")
	}
	c.checkProfiles(bad)
	for _, v := range []struct {
		key string
		n   *int
		d   int
	}{{"MaxClients", &c.MaxClients, defaultMaxClients}, {"MaxPerUser", &c.MaxPerUser, defaultMaxPerUser}} {
		if *v.n < 0 {
			bad(v.key, fmt.Sprint(*v.n), "a number above 0, or 0 for the default")
		}
		or(v.n, v.d)
	}
	or(&c.SessionCheck, time.Minute)
	if c.ServerID == "" {
		b := make([]byte, 8)
		rand.Read(b) // never fails
		c.ServerID = hex.EncodeToString(b)
	}
	if len(errs) > 0 {
		return fmt.Errorf("gateway: %w", errors.Join(errs...))
	}
	return nil
}

func (c *Config) checkProfiles(bad func(key, value, want string)) {
	check := func(key string, p *Profile) {
		for _, r := range p.Pool {
			if problem := r.problem(); problem != "" {
				bad(key+"Pool", r.String(), "a range of addresses; it "+problem)
			}
		}
		for _, list := range [][]netip.Prefix{p.Routes, p.NoRoutes} {
			for _, r := range list {
				if !r.IsValid() || r != r.Masked() {
					bad(key+"Routes", r.String(), "a prefix such as 10.0.0.0/8")
				}
			}
		}
		if p.MTU != 0 && (p.MTU < 576 || p.MTU > 1<<14-1) {
			bad(key+"MTU", fmt.Sprint(p.MTU), "0 or 576 to 16383 bytes")
		}
	}
	check("Profile.", &c.Profile)
	names := map[string]bool{}
	for i := range c.Groups {
		g := &c.Groups[i]
		key := fmt.Sprintf("Groups[%d].", i)
		if problem := CheckName(g.Name); problem != "" || names[g.Name] || strings.Contains(g.Name, ",") || g.Name == DefaultGroup {
			bad(key+"Name", g.Name, "a name of its own, without colons, commas and spaces, and not "+DefaultGroup)
		}
		names[g.Name] = true
		check(key, &g.Profile)
		if len(g.Profile.over(c.Profile).Pool) == 0 {
			bad(key+"Pool", "", "addresses for clients")
		}
	}
	if len(c.Profile.Pool) == 0 && len(c.Groups) == 0 {
		bad("Profile.Pool", "", "addresses for clients such as 10.9.0.0/24")
	}
}
