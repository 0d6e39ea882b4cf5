package openconnect

import (
	"errors"
	"fmt"
)

// Errors of the client's side that callers branch on.
var (
	// ErrDenied: the server does not let this user in: wrong password, no such
	// group, no certificate. Asking the same again is pointless. The error found
	// by errors.As as *DeniedError has the server's words.
	ErrDenied = errors.New("sign-in denied")

	// ErrCookie: the server does not know the cookie (any more): sign in again.
	// On the server's side Sessions.Connect returns it to say just that.
	ErrCookie = errors.New("session cookie not accepted")
)

// DeniedError is a refused sign-in. It matches ErrDenied.
type DeniedError struct {
	Reason string // the server's words; may be empty
}

// Error implements error.
func (e *DeniedError) Error() string {
	if e.Reason == "" {
		return ErrDenied.Error()
	}
	return ErrDenied.Error() + ": " + e.Reason
}

// Unwrap makes it match ErrDenied.
func (e *DeniedError) Unwrap() error { return ErrDenied }

// UnavailableError: the server has no place for a tunnel now (503 with X-Reason):
// it is full, the user has too many sessions, addresses have run out. The cookie
// stays good. Sessions.Connect returns it to answer so.
type UnavailableError struct {
	Reason string // shown to the user; printable ASCII is safe with every client
}

// Error implements error.
func (e *UnavailableError) Error() string {
	if e.Reason == "" {
		return "server unavailable"
	}
	return "server unavailable: " + e.Reason
}

// StatusError is an answer of the server that the protocol has no meaning for.
type StatusError struct {
	During string // what was asked: "sign-in", "CONNECT"
	Status string // such as "404 Not Found"
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("unexpected answer to %s: %s", e.During, e.Status)
}

// CertificateError: the server's certificate was not accepted. Its message holds the
// pin that would accept it, as stock clients print it.
type CertificateError struct {
	Host string // as it was called
	Pin  string // of the key that the server has shown: pin-sha256:BASE64
	Want string // the pin that was expected; empty when the CAs decided
	Err  error  // why the CAs did not accept it; nil with a pin
}

// Error implements error.
func (e *CertificateError) Error() string {
	if e.Want != "" {
		return fmt.Sprintf("%s has another key than expected: it shows %s, expected is %s", e.Host, e.Pin, e.Want)
	}
	return fmt.Sprintf("certificate of %s: %v; if you trust this server, its key is %s", e.Host, e.Err, e.Pin)
}

// Unwrap returns the verdict of the CA check.
func (e *CertificateError) Unwrap() error { return e.Err }

// errTooBig ends the reading of what is longer than the protocol has need of.
var errTooBig = errors.New("longer than allowed")

// malformed tells what is wrong with a document, a header or a form.
func malformed(format string, args ...any) error {
	return fmt.Errorf("malformed: "+format, args...)
}
