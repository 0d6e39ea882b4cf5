package openconnect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// pinMap holds the pins of hosts: connections are made on goroutines of net/http.
type pinMap struct{ m sync.Map }

func (p *pinMap) Store(host, pin string) { p.m.Store(host, pin) }

func (p *pinMap) load(host string) string {
	pin, _ := p.m.Load(host)
	s, _ := pin.(string)
	return s
}

// defaultBaseMTU is Ethernet's.
const defaultBaseMTU = 1500

// Connect opens a tunnel with the cookie of a sign-in: a TLS connection of its own, to the
// same key as then. The tunnel's Conn is the caller's. Errors: ErrCookie: sign in again;
// *UnavailableError: the server has no place now; *CertificateError; *StatusError;
// those of the network.
func Connect(ctx context.Context, login *Login, o ConnectOptions) (*Tunnel, error) {
	if login.Pin != "" {
		if err := CheckPin(login.Pin); err != nil {
			return nil, err
		}
	}
	if !validCookie(login.Cookie) {
		return nil, malformed("a cookie with characters that no cookie has")
	}
	r, err := o.reach(ctx, login.Host, login.Pin)
	if err != nil {
		return nil, err
	}
	t, err := o.open(ctx, login, r)
	if err != nil {
		r.conn.Close()
		return nil, err
	}
	return t, nil
}

// open sends CONNECT and reads the answer.
func (o *ConnectOptions) open(ctx context.Context, login *Login, r *reached) (*Tunnel, error) {
	host, port, err := net.SplitHostPort(login.Host)
	if err != nil {
		return nil, err
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, malformed("port %.16q", port)
	}
	ctx, cancel := context.WithTimeout(ctx, responseTime)
	defer cancel()
	defer interrupt(ctx, r.conn)()

	t := &Tunnel{Conn: r.conn, Remote: r.remote, Proxied: r.proxied, Host: login.Host}
	request := o.request(hostPort(host, int(number)), login.Cookie, r)
	// What has no key is not asked for: the server then need not wait for it.
	state := r.conn.ConnectionState()
	switch {
	case o.NoDTLS:
		t.NoPSK = "not wanted"
	default:
		if t.PSK, t.NoPSK = exportPSK(&state); t.PSK != nil {
			request.CipherSuites = []string{PSKNegotiate}
		}
	}
	if _, err := r.conn.Write(request.AppendTo(nil)); err != nil {
		return nil, fmt.Errorf("CONNECT: %w", ctxError(ctx, err))
	}
	status, header, early, err := readHead(r.conn)
	if err != nil {
		return nil, fmt.Errorf("CONNECT: %w", ctxError(ctx, err))
	}
	switch status.code {
	case http.StatusOK:
	case http.StatusUnauthorized:
		return nil, ErrCookie
	case http.StatusServiceUnavailable:
		return nil, &UnavailableError{Reason: firstOf(printable(header.Get("X-Reason"), maxText), status.phrase)}
	default:
		return nil, &StatusError{During: "CONNECT", Status: status.String()}
	}
	if t.Settings, err = ParseSettings(header); err != nil {
		return nil, err
	}
	t.Buffered = early
	s := t.Settings
	switch {
	case s.MTU == 0:
		return nil, malformed("the server says no MTU")
	case len(s.Addresses) == 0:
		return nil, malformed("the server gives no address")
	case s.CSTPEncoding != "":
		return nil, malformed("the server compresses (%.32q), though nobody asked", s.CSTPEncoding)
	}
	if t.PSK != nil && !s.PSK() {
		t.PSK = nil
		if t.NoPSK = "the server offers no DTLS"; s.DTLSPort > 0 {
			t.NoPSK = fmt.Sprintf("the server offers only what AnyConnect had before %s", PSKNegotiate)
		}
	}
	return t, nil
}

// request says what is wanted.
func (o *ConnectOptions) request(host, cookie string, r *reached) *ConnectRequest {
	base := o.BaseMTU
	if base == 0 {
		base = defaultBaseMTU
	}
	name := o.Hostname
	if name == "" {
		name, _ = os.Hostname() // a name is a courtesy
	}
	c := &ConnectRequest{
		Host: host, UserAgent: o.userAgent(), Cookie: cookie, Hostname: hostname(name), Device: o.device(),
		BaseMTU: base, MTU: InnerMTU(base, r.remote.Addr()),
		IPv4: !o.NoIPv4, IPv6: !o.NoIPv6, FullIPv6: !o.NoIPv6,
	}
	for _, a := range o.Addresses {
		if a.Is4() && c.IPv4 || a.Is6() && c.IPv6 {
			c.Addresses = append(c.Addresses, a)
		}
	}
	return c
}

// Reason of a DISCONNECT frame: the user's wish. openconnect 9.01 sends the same.
const disconnectUser = 0xb0

// AppendDisconnect appends the CSTP frame that ends a session for good: unlike a lost
// connection it takes the cookie along.
func AppendDisconnect(b []byte, reason string) []byte {
	if len(reason) > maxText {
		reason = reason[:maxText]
	}
	b = append(b, "STF\x01"...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(reason)+1))
	b = append(b, 5, 0, disconnectUser)
	return append(b, reason...)
}

// Logout ends the session of a cookie, when there is no tunnel on which to say so. A
// server of this package is asked by its own path; any other gets a tunnel that is
// disconnected at once. A cookie that is no longer good is no error.
func Logout(ctx context.Context, login *Login, d Dialer) error {
	done, err := logoutByPath(ctx, login, &d)
	if done || err != nil {
		return err
	}
	t, err := Connect(ctx, login, ConnectOptions{Dialer: d, NoDTLS: true})
	if errors.Is(err, ErrCookie) {
		return nil
	} else if err != nil {
		return err
	}
	defer t.Conn.Close()
	t.Conn.SetDeadline(time.Now().Add(headerTime))
	if _, err := t.Conn.Write(AppendDisconnect(nil, "signed out")); err != nil {
		return fmt.Errorf("saying goodbye: %w", err)
	}
	return t.Conn.CloseWrite()
}

// logoutByPath asks for /logout; done tells that the server took the cookie back.
func logoutByPath(ctx context.Context, login *Login, d *Dialer) (done bool, err error) {
	r, err := d.reach(ctx, login.Host, login.Pin)
	if err != nil {
		return false, err
	}
	defer r.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	defer interrupt(ctx, r.conn)()
	w := lines("GET /logout HTTP/1.1\r\n")
	w.add("Host", login.Host)
	w.text("User-Agent", d.userAgent())
	w.add("Cookie", cookieName+"="+clean(login.Cookie))
	w.add("Connection", "close")
	if _, err := r.conn.Write(append(w, "\r\n"...)); err != nil {
		return false, fmt.Errorf("logout: %w", ctxError(ctx, err))
	}
	status, header, _, err := readHead(r.conn)
	if err != nil {
		return false, fmt.Errorf("logout: %w", ctxError(ctx, err))
	}
	if status.code != http.StatusOK {
		return false, nil
	}
	for _, line := range header.Values("Set-Cookie") {
		if pair, _, _ := strings.Cut(line, ";"); strings.TrimSpace(pair) == cookieName+"=" {
			return true, nil
		}
	}
	return false, nil
}
