//go:build linux

package stock

import (
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// ClientOptions describe an openconnect.
type ClientOptions struct {
	URL      string
	Pin      string // for --servercert; "": the system's authorities
	User     string
	Password string // "": none is given
	// Input are further lines of its standard input: answers to what it asks beside the password.
	Input  []string
	NoDTLS bool
	Args   []string // further ones
}

// Client is a running openconnect.
type Client struct {
	*process
	dir string
}

// A Tunnel is what openconnect has told its script.
type Tunnel struct {
	Interface      string
	Addr4, Addr6   netip.Addr // zero: none was given
	MTU            int
	Env            map[string]string // all of it: CISCO_*, INTERNAL_*
	DTLS           bool              // by the line that it prints, at the time
	DTLSSuite, TLS string            // as it prints them
}

// script configures the interface by openconnect's words and leaves the namespace's resolver
// alone. Split includes become routes; without any the server's networks are on link.
const script = `#!/bin/sh
dir=$(dirname "$0")
env >"$dir/env.new"
case $reason in
connect)
	ip link set "$TUNDEV" up mtu "$INTERNAL_IP4_MTU"
	[ -z "$INTERNAL_IP4_ADDRESS" ] || ip addr add "$INTERNAL_IP4_ADDRESS/${INTERNAL_IP4_NETMASKLEN:-32}" dev "$TUNDEV"
	[ -z "$INTERNAL_IP6_ADDRESS" ] || ip addr add "$INTERNAL_IP6_ADDRESS/64" dev "$TUNDEV" nodad
	i=0
	while [ $i -lt "${CISCO_SPLIT_INC:-0}" ]; do
		eval "ip route add \$CISCO_SPLIT_INC_${i}_ADDR/\$CISCO_SPLIT_INC_${i}_MASKLEN dev $TUNDEV"
		i=$((i + 1))
	done
	i=0
	while [ $i -lt "${CISCO_IPV6_SPLIT_INC:-0}" ]; do
		eval "ip route add \$CISCO_IPV6_SPLIT_INC_${i}_ADDR/\$CISCO_IPV6_SPLIT_INC_${i}_MASKLEN dev $TUNDEV"
		i=$((i + 1))
	done
	;;
esac
mv "$dir/env.new" "$dir/env.$reason" # now it is done
`

// StartClient starts openconnect and returns at once.
func StartClient(t testing.TB, o ClientOptions) *Client {
	t.Helper()
	path := find(t, "openconnect")
	c := &Client{dir: t.TempDir()}
	file := filepath.Join(c.dir, "script")
	if err := os.WriteFile(file, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"--protocol=anyconnect", "--script", file, "--timestamp"}
	if len(o.Input) == 0 {
		args = append(args, "--non-inter") // what it would have to ask for is an error
	}
	if o.User != "" {
		args = append(args, "--user", o.User)
	}
	var input strings.Builder
	if o.Password != "" {
		args = append(args, "--passwd-on-stdin")
		input.WriteString(o.Password + "\n")
	}
	for _, line := range o.Input {
		input.WriteString(line + "\n")
	}
	if o.Pin != "" {
		args = append(args, "--servercert", o.Pin)
	}
	if o.NoDTLS {
		args = append(args, "--no-dtls")
	}
	args = append(append(args, o.Args...), o.URL)
	c.process = launch(t, input.String(), path, args...)
	return c
}

// Connected waits until the client has configured its interface and, unless it was started
// with NoDTLS or the server offers none, its DTLS is decided.
func (c *Client) Connected(patience time.Duration) Tunnel {
	c.t.Helper()
	how := c.Await(patience, `Configured as .*, with SSL connected and DTLS (\w+)`)
	tunnel := Tunnel{Env: map[string]string{}, DTLS: how[1] == "connected" || how[1] == "established"}
	end := time.Now().Add(patience)
	var env []byte
	for {
		var err error
		if env, err = os.ReadFile(filepath.Join(c.dir, "env.connect")); err == nil {
			break
		}
		if time.Now().After(end) {
			c.t.Fatalf("openconnect has not called its script: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	for line := range strings.Lines(string(env)) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "="); ok {
			tunnel.Env[name] = value
		}
	}
	tunnel.Interface = tunnel.Env["TUNDEV"]
	tunnel.Addr4, _ = netip.ParseAddr(tunnel.Env["INTERNAL_IP4_ADDRESS"])
	tunnel.Addr6, _ = netip.ParseAddr(tunnel.Env["INTERNAL_IP6_ADDRESS"])
	tunnel.MTU, _ = strconv.Atoi(tunnel.Env["INTERNAL_IP4_MTU"])
	for line := range strings.Lines(c.Log()) {
		if _, s, ok := strings.Cut(line, "with ciphersuite "); ok {
			tunnel.TLS = strings.TrimSpace(s)
		}
		if _, s, ok := strings.Cut(line, "Established DTLS connection (using GnuTLS). Ciphersuite "); ok {
			tunnel.DTLSSuite = strings.TrimSuffix(strings.TrimSpace(s), ".")
		}
	}
	return tunnel
}
