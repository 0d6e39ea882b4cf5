package openconnect

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"time"
)

// DefaultUserAgent is how this client introduces itself. Servers tell clients apart by
// the beginning: ocserv knows "OpenConnect VPN Agent" and pushes no IPv6 routes
// to agents that it does not know.
const DefaultUserAgent = "OpenConnect VPN Agent (Penstock)"

// Dialer is what reaches a server, for SignIn and Connect alike. The zero value calls
// it directly or through the proxy that the environment names, and trusts the
// system's CAs.
type Dialer struct {
	// Dial makes TCP connections; nil: net.Dialer. What it returns may be a wrapper:
	// TLS runs on top of it.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// Proxy names the HTTP proxy for a URL, nil for none. If this is nil itself,
	// HTTPS_PROXY and NO_PROXY of the environment decide.
	Proxy func(*url.URL) (*url.URL, error)

	// Pin is the key that the server must show, as stock clients write it:
	// pin-sha256:BASE64 of the SHA-256 of its public key (SPKI). CAs and names are then
	// not looked at. Empty: the CAs decide.
	Pin string

	// RootCAs replaces the system's.
	RootCAs *x509.CertPool

	// Certificate is the client's own, for servers that ask.
	Certificate *tls.Certificate

	// MaxVersion limits TLS, as in tls.Config; 0: no limit.
	MaxVersion uint16

	// UserAgent replaces DefaultUserAgent.
	UserAgent string

	// Device describes this machine; an empty Platform is that of the build.
	Device Device

	Logger *slog.Logger // nil: none
}

// Options says how to sign in.
type Options struct {
	Dialer

	// Server is https://HOST[:PORT][/GROUP], or just the host.
	Server string

	// Prompt answers what the server asks; nil: any question ends the sign-in. What it
	// returns as an error ends it too, unchanged.
	Prompt func(ctx context.Context, q Question) (string, error)

	// Group is chosen where the server offers groups, without asking.
	Group string

	// Tries is how often the same form may be asked before the sign-in ends with
	// ErrDenied; 0 is 3.
	Tries int

	exchangeTime time.Duration // for a question and the whole answer; 0: dialTime + responseTime
}

// Question is one field of a form that the server wants filled in.
type Question struct {
	Form  *Form  // with Banner, Message and Error to show
	Field *Field // what is asked: its Kind, Name and Label
	First bool   // of the form's fields that are asked: time to show the texts
	Try   int    // 0 the first time, then how often this has been answered before
}

// Login is a sign-in that has succeeded: all that Connect needs.
type Login struct {
	Host   string // HOST:PORT that the cookie is good for, after redirects
	Cookie string // a secret
	Pin    string // of the server's key, pin-sha256:BASE64
	Banner string // what the server had to say, if anything
}

// ConnectOptions says what kind of tunnel is wanted. The Dialer's Pin is not looked at:
// the Login's is, so that both connections are to the same server.
type ConnectOptions struct {
	Dialer

	Hostname string // own name; empty: the system's
	// BaseMTU is what the path to the server carries; 0: 1500.
	BaseMTU int
	// NoIPv4 and NoIPv6 decline addresses.
	NoIPv4, NoIPv6 bool
	// Addresses are those of the session that is to be continued.
	Addresses []netip.Addr
	// NoDTLS asks for a tunnel over TLS alone.
	NoDTLS bool
}

// Tunnel is a connection whose CONNECT was answered: frames from now on.
type Tunnel struct {
	Conn     *tls.Conn // without deadlines; over what Dial returned
	Buffered []byte    // the first inbound bytes, already read
	Settings *Settings
	Remote   netip.AddrPort // the server's (or a proxy's); DTLS goes to its Settings.DTLSPort
	Proxied  bool           // there is a proxy between: DTLS would go around it
	Host     string         // of the Login

	// PSK is the key for DTLS, 32 bytes; nil, with NoPSK saying why, when there
	// can be no DTLS.
	PSK   []byte
	NoPSK string
}
