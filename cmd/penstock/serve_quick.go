package main

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// quick is penstock serve --quick.
type quick struct {
	listen, host, user, state string
}

func (q *quick) serve(stdout, stderr io.Writer, level, format string) error {
	listen, err := netip.ParseAddrPort(q.listen)
	if err != nil {
		return exitWith(exitUsage, fmt.Errorf("--listen %q: expected an address and a port, such as [::]:4443", q.listen))
	}
	if problem := gateway.CheckName(q.user); problem != "" {
		return exitWith(exitUsage, fmt.Errorf("--user: the name %s", problem))
	}
	log, err := newLoggerOf(stderr, 0, "text", level, format)
	if err != nil {
		return err
	}
	switch {
	case q.host != "":
	case listen.Addr().IsUnspecified():
		q.host = ownAddress()
	default:
		q.host = listen.Addr().WithZone("").String()
	}
	if q.state == "" {
		q.state = filepath.Join(userState(), "quick")
	}
	if err := makeState(q.state); err != nil {
		return err
	}
	c, err := q.config(listen)
	if err != nil {
		return err
	}
	var password string
	// Not before, or the password of a server that runs already would be gone.
	prepare := func() (err error) {
		password, err = q.makeUser(c.Auth.Users)
		return err
	}
	return serve(c, log, prepare, func(s *gateway.Server) { q.explain(stdout, s, password) })
}

// makeUser gives the user of the file a new password: that of the last time is known to nobody any more.
func (q *quick) makeUser(file string) (password string, err error) {
	if password, err = newPassword(); err != nil {
		return "", err
	}
	hash, err := gateway.HashPassword(password)
	if err != nil {
		return "", err
	}
	return password, gateway.EditUsers(file, func(set *gateway.UserSet) error {
		if e, ok := set.Find(q.user); ok {
			e.Hash = hash
			return set.Replace(e)
		}
		return set.Add(gateway.UserEntry{Name: q.user, Hash: hash})
	})
}

// newPassword has 80 random bits, in groups that can be read out.
func newPassword() (string, error) {
	b := make([]byte, 10)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	text := hex.EncodeToString(b)
	var groups []string
	for i := 0; i < len(text); i += 5 {
		groups = append(groups, text[i:i+5])
	}
	return strings.Join(groups, "-"), nil
}

// config is what a file would say.
func (q *quick) config(listen netip.AddrPort) (*config.Server, error) {
	inside, err := freeNetwork()
	if err != nil {
		return nil, err
	}
	own := netip.PrefixFrom(inside.Addr().Next(), inside.Bits())
	pool, err := gateway.RangeOf(inside)
	if err != nil {
		return nil, err
	}
	c := &config.Server{
		File:      filepath.Join(q.state, "quick.toml"), // a name for the control socket; there is no such file
		Listen:    []netip.AddrPort{listen},
		State:     q.state,
		Names:     []string{q.host},
		Addresses: []netip.Prefix{own},
		Auth:      config.Auth{Method: gateway.Password, Users: filepath.Join(q.state, "users")},
		Clients:   gateway.Profile{Pool: gateway.Pool{pool}, Search: nil},
		Store:     config.Store{Engine: "bbolt"},
		LogFormat: "text",
		Router:    &netstack.RouterConfig{Allow: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}},
	}
	if hasIPv6() {
		// A network of RFC 4193; whose it is does not matter behind a router that hides it.
		six := netip.MustParsePrefix("fd70:656e:7374::/64")
		pool, err := gateway.RangeOf(six)
		if err != nil {
			return nil, err
		}
		c.Addresses = append(c.Addresses, netip.PrefixFrom(six.Addr().Next(), six.Bits()))
		c.Clients.Pool = append(c.Clients.Pool, pool)
		c.Router.Allow = append(c.Router.Allow, netip.MustParsePrefix("::/0"))
	}
	if resolver := hostResolver(); resolver != "" {
		c.Clients.DNS = []netip.Addr{own.Addr()}
		at := net.JoinHostPort(own.Addr().String(), "53")
		c.Publishes = []config.Port{{Network: "udp", Listen: at, To: resolver}, {Network: "tcp", Listen: at, To: resolver}}
	}
	return c, nil
}

// freeNetwork finds a network that this machine is not part of.
func freeNetwork() (netip.Prefix, error) {
	var taken []netip.Prefix
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			taken = append(taken, p.Masked())
		}
	}
next:
	for third := range 256 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 213, byte(third), 0}), 24)
		for _, t := range taken {
			if t.Overlaps(p) {
				continue next
			}
		}
		return p, nil
	}
	return netip.Prefix{}, errors.New("all of 10.213.0.0/16 is in use on this machine; serve with a configuration")
}

// ownAddress is how this machine is called from elsewhere, as far as it can know.
func ownAddress() string {
	for _, target := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		// Nothing is sent: the system only chooses the address that it would send from.
		if c, err := net.Dial("udp", target); err == nil {
			defer c.Close()
			return c.LocalAddr().(*net.UDPAddr).IP.String()
		}
	}
	return "127.0.0.1"
}

// hasIPv6 tells whether this machine has a way into the IPv6 Internet.
func hasIPv6() bool {
	c, err := net.Dial("udp6", "[2001:db8::1]:9")
	if err != nil {
		return false
	}
	defer c.Close()
	ip := c.LocalAddr().(*net.UDPAddr).IP
	return ip.IsGlobalUnicast()
}

// hostResolver is the first name server of this machine.
func hostResolver() string {
	data, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) >= 2 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil {
				return net.JoinHostPort(a.String(), "53")
			}
		}
	}
	return ""
}

// explain says how to connect.
func (q *quick) explain(w io.Writer, s *gateway.Server, password string) {
	command := s.Command(q.host, q.user)
	batch := strings.Replace(command, "openconnect", "openconnect --passwd-on-stdin", 1)
	fmt.Fprintf(w, `A VPN server is up on %s, TCP and UDP. Its clients reach what this machine reaches.

  user      %s
  password  %s   (of this run; the certificate stays)

On the other machine, with openconnect installed:

  sudo %s

or without being asked for the password:

  echo %s | sudo %s

Here: penstock sessions, penstock kick, penstock status. Ctrl-C ends it.
`, joined(s.Addrs()), q.user, password, command, password, batch)
}
