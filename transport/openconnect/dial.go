package openconnect

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"runtime"
	"strings"
	"time"

	"golang.org/x/net/proxy"
)

// Bounds of the client's side, for each connection and for each answer. A server may
// ask somebody's telephone before it answers a password.
const (
	dialTime     = 30 * time.Second
	responseTime = 90 * time.Second
)

// reached is a TLS connection to a server.
type reached struct {
	conn    *tls.Conn
	remote  netip.AddrPort
	proxied bool
	pin     string // of the key that it has shown
}

// reach connects to a server, HOST:PORT, and checks that it is the one: by pin, or by the
// CAs when pin is empty.
func (d *Dialer) reach(ctx context.Context, server, pin string) (*reached, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	host, _, err := net.SplitHostPort(server)
	if err != nil {
		return nil, err
	}
	through, err := d.proxyFor(server)
	if err != nil {
		return nil, fmt.Errorf("the proxy for %s: %w", server, err)
	}
	r := &reached{proxied: through != nil}
	var raw net.Conn
	if through == nil {
		raw, err = d.dial(ctx, "tcp", server)
	} else {
		raw, err = d.dialProxy(ctx, through, server)
	}
	if err != nil {
		return nil, err
	}
	r.remote = addrPortOf(raw.RemoteAddr())
	r.conn = tls.Client(raw, d.tlsConfig(host, pin, &r.pin))
	if err := r.conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if refused, ok := errors.AsType[*CertificateError](err); ok {
			refused.Host = server
			return nil, refused
		}
		return nil, fmt.Errorf("TLS with %s: %w", server, err)
	}
	return r, nil
}

// tlsConfig checks certificates by itself, so that it can name the pin of a refused one;
// shown becomes the pin of the key that the server has shown.
func (d *Dialer) tlsConfig(host, want string, shown *string) *tls.Config {
	config := &tls.Config{
		ServerName:         host,
		MinVersion:         tls.VersionTLS12,
		MaxVersion:         d.MaxVersion,
		InsecureSkipVerify: true, // VerifyConnection does it
		// A frame is one record: stock servers insist on it.
		DynamicRecordSizingDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return errors.New("the server shows no certificate")
			}
			leaf := state.PeerCertificates[0]
			*shown = Pin(leaf)
			if want != "" {
				if !samePin(*shown, want) {
					return &CertificateError{Pin: *shown, Want: want}
				}
				return nil
			}
			options := x509.VerifyOptions{DNSName: host, Roots: d.RootCAs, Intermediates: x509.NewCertPool()}
			for _, c := range state.PeerCertificates[1:] {
				options.Intermediates.AddCert(c)
			}
			if _, err := leaf.Verify(options); err != nil {
				return &CertificateError{Pin: *shown, Err: err}
			}
			return nil
		},
	}
	if d.Certificate != nil {
		// Whatever CAs the server names: people give a certificate to have it shown.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return d.Certificate, nil
		}
	}
	return config
}

// proxyFor is the proxy on the way to a server; nil for none.
func (d *Dialer) proxyFor(server string) (*url.URL, error) {
	u := &url.URL{Scheme: "https", Host: server}
	if d.Proxy == nil {
		return http.ProxyFromEnvironment(&http.Request{URL: u})
	}
	return d.Proxy(u)
}

func (d *Dialer) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if d.Dial != nil {
		return d.Dial(ctx, network, address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, address)
}

// dialFunc makes the SOCKS client of x/net use our dialling.
type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

func (f dialFunc) Dial(network, address string) (net.Conn, error) {
	return f(context.Background(), network, address)
}

func (f dialFunc) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return f(ctx, network, address)
}

// dialProxy reaches a server through a proxy.
func (d *Dialer) dialProxy(ctx context.Context, through *url.URL, server string) (net.Conn, error) {
	switch through.Scheme {
	case "http":
	case "socks5", "socks5h":
		socks, err := proxy.FromURL(through, dialFunc(d.dial))
		if err != nil {
			return nil, err
		}
		conn, err := socks.(proxy.ContextDialer).DialContext(ctx, "tcp", server)
		if err != nil {
			return nil, fmt.Errorf("through the proxy %s: %w", through.Host, err)
		}
		return conn, nil
	default:
		return nil, fmt.Errorf("a proxy of scheme %q: expected http or socks5", through.Scheme)
	}
	address := through.Host
	if through.Port() == "" {
		address = net.JoinHostPort(through.Hostname(), "80")
	}
	conn, err := d.dial(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("the proxy: %w", err)
	}
	if err := askProxy(ctx, conn, through.User, server); err != nil {
		conn.Close()
		return nil, fmt.Errorf("through the proxy %s: %w", through.Host, err)
	}
	return conn, nil
}

// askProxy makes an HTTP proxy connect to a server (RFC 9110 9.3.6).
func askProxy(ctx context.Context, conn net.Conn, user *url.Userinfo, server string) error {
	defer interrupt(ctx, conn)()
	w := lines("CONNECT " + server + " HTTP/1.1\r\n")
	w.add("Host", server)
	if user != nil {
		password, _ := user.Password()
		w.add("Proxy-Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if _, err := conn.Write(append(w, "\r\n"...)); err != nil {
		return ctxError(ctx, err)
	}
	status, _, early, err := readHead(conn)
	if err != nil {
		return ctxError(ctx, err)
	}
	if status.code != http.StatusOK {
		return &StatusError{During: "CONNECT " + server, Status: status.String()}
	}
	if len(early) > 0 {
		return malformed("the proxy speaks before the server can")
	}
	return nil
}

// statusLine is the first line of an answer.
type statusLine struct {
	code   int
	phrase string
}

func (s statusLine) String() string { return fmt.Sprintf("%d %s", s.code, s.phrase) }

// readHead reads the head of an answer to CONNECT, and returns what was read beyond it.
func readHead(conn net.Conn) (s statusLine, h http.Header, early []byte, err error) {
	limited := &io.LimitedReader{R: conn, N: maxHeaderBytes}
	buffered := bufio.NewReaderSize(limited, 4096)
	defer func() {
		if err != nil && limited.N <= 0 {
			err = errTooBig
		}
	}()
	text := textproto.NewReader(buffered)
	line, err := text.ReadLine()
	if err != nil {
		return s, nil, nil, err
	}
	version, rest, _ := strings.Cut(line, " ")
	code, phrase, _ := strings.Cut(rest, " ")
	if _, err := fmt.Sscanf(code, "%3d", &s.code); err != nil || len(code) != 3 || !strings.HasPrefix(version, "HTTP/1.") {
		return s, nil, nil, malformed("%.64q: expected HTTP/1.1 and a status", line)
	}
	s.phrase = cut(phrase)
	header, err := text.ReadMIMEHeader()
	if err != nil {
		return s, nil, nil, err
	}
	early = make([]byte, buffered.Buffered())
	if _, err := io.ReadFull(buffered, early); err != nil {
		return s, nil, nil, err
	}
	return s, http.Header(header), early, nil
}

// interrupt makes reads and writes of conn end when ctx does; the function that it
// returns takes that back, and the deadline with it.
func interrupt(ctx context.Context, conn net.Conn) (release func()) {
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		conn.SetDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-done // else it could come after the deadline is taken back
		}
		conn.SetDeadline(time.Time{})
	}
}

// ctxError prefers the reason why a context ended over what its end did to a connection.
func ctxError(ctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return cause
	}
	return err
}

// addrPortOf is an address as a value, the zero one when it is none of IP.
func addrPortOf(a net.Addr) netip.AddrPort {
	if a == nil {
		return netip.AddrPort{}
	}
	parsed, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(parsed.Addr().Unmap(), parsed.Port())
}

func (d *Dialer) userAgent() string {
	if d.UserAgent == "" {
		return DefaultUserAgent
	}
	return d.UserAgent
}

// device describes this machine, by default with no more than the platform: what a
// server cannot do without.
func (d *Dialer) device() Device {
	device := d.Device
	if device.Platform == "" {
		switch runtime.GOOS {
		case "windows":
			device.Platform = "win"
		case "darwin":
			device.Platform = "mac-intel"
		case "android":
			device.Platform = "android"
		case "ios":
			device.Platform = "apple-ios"
		default:
			device.Platform = "linux-64"
		}
	}
	if device.ClientVersion == "" {
		device.ClientVersion = "penstock"
	}
	return device
}

func (d *Dialer) log() *slog.Logger {
	if d.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return d.Logger
}
