// Package signin signs in to an OpenConnect server for a command: it answers what the server asks
// from what the user has said beforehand, computes one-time codes, and asks the user for the rest.
//
//	[Options.Server] ◀── openconnect.SignIn ── a question ──▶ [Session] ── said before? ── no ──▶ [Options.Ask]
//
// A [Session] remembers the answers, so that it can sign in again when a cookie has expired.
//
// Programs that answer by themselves need no more than transport/openconnect.
package signin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// The words of transport/openconnect that a command needs.
type (
	// Login is a sign-in that has succeeded.
	Login = openconnect.Login
	// Dialer is what reaches a server.
	Dialer = openconnect.Dialer
	// Question is one field of a form; Form, Field and Option are what it is made of.
	Question = openconnect.Question
	Form     = openconnect.Form
	Field    = openconnect.Field
	Option   = openconnect.Option
	// CertificateError: the server's certificate was not accepted.
	CertificateError = openconnect.CertificateError
	// UnavailableError: the server has no place for a tunnel now.
	UnavailableError = openconnect.UnavailableError
)

// Errors that callers branch on; see transport/openconnect.
var (
	ErrDenied = openconnect.ErrDenied
	ErrCookie = openconnect.ErrCookie
)

// Fields of a form, as far as who asks has to tell them apart.
const (
	Text     = openconnect.FieldText
	Password = openconnect.FieldPassword
	Select   = openconnect.FieldSelect
)

// Logout ends the session of a login to which there is no tunnel.
func Logout(ctx context.Context, login *Login, d Dialer) error {
	return openconnect.Logout(ctx, login, d)
}

// HostPort is where a server is, HOST:PORT, as a Login says it.
func HostPort(server string) (string, error) { return openconnect.HostPort(server) }

// CheckPin says what is wrong with a pin's form.
func CheckPin(pin string) error { return openconnect.CheckPin(pin) }

// MarkedDial makes TCP connections for a Dialer whose packets carry a mark, as those of a node with Config.Socket.Mark
// do. resolve turns HOST:PORT into addresses; where it returns nil, or is nil itself, the system's resolver does.
func MarkedDial(mark uint32, resolve func(address string) ([]netip.AddrPort, error)) func(context.Context, string, string) (net.Conn, error) {
	d := &net.Dialer{Control: transport.MarkControl(mark)}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		var found []netip.AddrPort
		var err error
		if resolve != nil {
			if found, err = resolve(address); err != nil {
				return nil, err
			}
		}
		if len(found) == 0 {
			return d.DialContext(ctx, network, address)
		}
		for _, a := range found {
			var c net.Conn
			if c, err = d.DialContext(ctx, network, a.String()); err == nil {
				return c, nil
			}
		}
		return nil, err
	}
}

// LoadCertificate reads a client's certificate, and its key from the same file if keyFile is empty. Both are
// PEM, and the key is not encrypted.
func LoadCertificate(certFile, keyFile string) (*tls.Certificate, error) {
	if keyFile == "" {
		keyFile = certFile
	}
	c, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("client certificate %s, key %s: %w", certFile, keyFile, err)
	}
	if now := time.Now(); c.Leaf != nil && now.After(c.Leaf.NotAfter) {
		return nil, fmt.Errorf("client certificate %s: expired on %s", certFile, c.Leaf.NotAfter.Format(time.DateOnly))
	}
	return &c, nil
}

// LoadCAs reads the authorities of a PEM file, beside those of the system if system is set.
func LoadCAs(file string, system bool) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if system {
		if s, err := x509.SystemCertPool(); err == nil { // where there is none, the file's have to do
			pool = s
		}
	}
	if file == "" {
		return pool, nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: %w", file, errors.New("no certificate in it (PEM)"))
	}
	return pool, nil
}
