package openconnect

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Client is what the server knows of who is asking. Only Remote and Certificate are
// more than hearsay.
type Client struct {
	Remote      netip.AddrPort
	Local       netip.AddrPort    // of the server, where the client's connection has come
	Certificate *x509.Certificate // verified against the server's CAs; nil when there is none
	ServerName  string            // of the TLS handshake (SNI)
	UserAgent   string
	Device      Device
	URL         string // <group-access>: the server as the client calls it; only in Begin
}

// Group is one choice of a sign-in's group list.
type Group struct {
	Name  string // what the client answers
	Label string // what the user sees; empty: Name
}

// Ask is what a client is asked in one step.
type Ask struct {
	Banner  string // shown once, above everything
	Message string // shown above the form; empty: a plain sentence
	Error   string // why this is asked, perhaps again: "Wrong user name or password."

	Username bool    // asks for it
	Password bool    // asks for it
	Groups   []Group // asks to choose, if there are two or more
	Group    string  // the choice that is offered first
	Factor   string  // label of a second factor's prompt, such as "Code:"; empty: not asked

	// State is handed back with the answers, sealed in the meantime in a cookie on
	// the client: who has passed the password, for instance. At most 1 KiB. A
	// client can send the same one again as long as it has not expired.
	State []byte
}

// Answers is what the client has said to an Ask. Texts are as the user typed them, of
// at most 4 KiB each; what was not asked is empty.
type Answers struct {
	Username, Password, Group, Factor string
	State                             []byte // of the Ask
}

// Decision is an Authenticator's word. Of its three fields the first that is set counts;
// none set means denied.
type Decision struct {
	Cookie string // signed in, and this is the session; see Handler for its alphabet
	Ask    *Ask   // more is wanted, or the same again with Ask.Error
	Denied string // turned away; the user is shown this
}

// Authenticator decides who may sign in. Its methods are called concurrently, without
// any order that a client could not break: all they know is in their arguments. What
// they need beyond (ban points, limits on tries by address) is theirs to keep.
// An error means that they could not decide: it is logged, and the client told no more
// than that.
type Authenticator interface {
	// Begin is asked at the start: group is what the client chose beforehand, "" if
	// nothing. A certificate may be reason enough to let it in at once.
	Begin(ctx context.Context, c *Client, group string) (Decision, error)
	// Answer is asked with the answers to an earlier Ask.
	Answer(ctx context.Context, c *Client, a *Answers) (Decision, error)
}

// Attempt is a CONNECT that wants to become a tunnel.
type Attempt struct {
	Client  *Client
	Request *ConnectRequest
	// PSK is the key for DTLS, 32 bytes exported from this TLS connection; nil, with
	// NoPSK saying why, when the client has not offered it or TLS refuses.
	PSK   []byte
	NoPSK string
}

// Admission is a tunnel that was admitted.
type Admission struct {
	// Settings are sent but for what the client has not asked for: addresses, servers
	// and networks of an IP version that it does not take, and DTLS without a key.
	Settings Settings
	// Start takes the connection, after the answer was written. It is called on the
	// goroutine of the request, which may as well serve the tunnel.
	Start func(*Handover)
	// Abort is called instead of Start when the answer could not be written.
	Abort func(error)
}

// Handover is the connection of a tunnel: frames from now on, in both directions.
type Handover struct {
	Conn     net.Conn // without deadlines; a *tls.Conn
	Buffered []byte   // the first inbound bytes, already read
}

// Sessions is where cookies are looked up. Its methods are called concurrently.
type Sessions interface {
	// Connect admits a tunnel. It must be ready for the client's DTLS when it
	// returns: the client may be quicker than Start. The cookie stays good: clients
	// reconnect with it, and some connect twice. Errors: ErrCookie (the client has
	// to sign in again), *UnavailableError (503 with its reason); anything else is
	// logged, and a 503.
	Connect(ctx context.Context, a *Attempt) (*Admission, error)
	// Logout ends the session of a cookie; one it does not know is no error.
	Logout(ctx context.Context, c *Client, cookie string)
}

// Handler answers HTTPS requests of clients. Its fields are set before it serves and not
// changed after. It keeps nothing in memory before a client is signed in: the state
// of a sign-in is in a sealed cookie.
//
// A session cookie must be of letters, digits and -._~+/ only: openconnect takes an
// equals sign for the end of a name.
type Handler struct {
	Authenticator Authenticator
	Sessions      Sessions

	// Secret seals the state of sign-ins, 16 bytes or more of randomness. Servers
	// that share an address share it. Empty: one is made up, and clients in the
	// middle of a sign-in start again after a restart.
	Secret []byte

	// SignInTime is how long a form may lie unanswered; 0 is 5 minutes.
	SignInTime time.Duration

	// Title is shown to browsers, which get one plain page; empty: "VPN server".
	Title string

	Logger *slog.Logger // nil: none

	seal sealer
}

// Bounds of the server's side, for NewServer. A user may take minutes to type a
// password; the connection need not wait, as the state is in the cookie.
const (
	headerTime     = 10 * time.Second
	requestTime    = 20 * time.Second
	answerTime     = 60 * time.Second // somebody's telephone may have to be asked
	idleTime       = 60 * time.Second
	maxRequestHead = 16 << 10 // openconnect's are below 2 KiB
)

// NewServer makes an http.Server with what the protocol and hostile clients ask for:
// HTTP/1.1 only, TLS 1.2 or newer, headers within 10 s and 16 KiB, requests within
// 20 s; an Authenticator has 60 s, of which its context knows nothing. Who makes his own sets the same fields. config has the certificate and is
// copied; for client certificates set ClientAuth to tls.VerifyClientCertIfGiven, and
// ClientCAs. The caller sets ErrorLog and calls ServeTLS(listener, "", "").
func NewServer(h *Handler, config *tls.Config) *http.Server {
	config = config.Clone()
	config.NextProtos = []string{"http/1.1"}
	if config.MinVersion == 0 {
		config.MinVersion = tls.VersionTLS12
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Server{
		Handler:           h,
		TLSConfig:         config,
		Protocols:         protocols,
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       requestTime,
		WriteTimeout:      answerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxRequestHead,
	}
}
