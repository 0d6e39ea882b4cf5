package openconnect

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gate is an Authenticator and Sessions for tests: alice with the password "open
// <sesame> & more", perhaps a group, a code or a certificate.
type gate struct {
	groups      []Group
	factor      string // the code wanted after the password; empty: none
	together    bool   // the code is asked beside the password
	certificate bool   // a certificate alone lets in
	settings    Settings
	refuse      error // what Connect answers

	mu       sync.Mutex
	cookies  map[string]string // of the signed in: their names and groups
	attempts []*Attempt
	started  chan *Handover
	clients  []Client
}

const (
	testUser     = "alice"
	testPassword = `open <sesame> & "more" é`
)

func newGate() *gate {
	return &gate{
		cookies: make(map[string]string),
		started: make(chan *Handover, 16),
		settings: Settings{
			ServerName: "test",
			Addresses:  []netip.Prefix{netip.MustParsePrefix("10.9.0.2/24"), netip.MustParsePrefix("fd00:9::2/64")},
			Include:    []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")},
			DNS:        []netip.Addr{netip.MustParseAddr("10.9.0.1")},
			MTU:        1434, BaseMTU: 1500,
			CSTP:     Timers{DPD: 30 * time.Second, Keepalive: 20 * time.Second, RekeyMethod: RekeyNone},
			DTLSPort: 4433, AppID: []byte("0123456789abcdef0123456789abcdef"), CipherSuite: PSKNegotiate,
			DTLS: Timers{DPD: 30 * time.Second},
		},
	}
}

func (g *gate) Begin(_ context.Context, c *Client, group string) (Decision, error) {
	g.mu.Lock()
	g.clients = append(g.clients, *c)
	g.mu.Unlock()
	if g.certificate {
		if c.Certificate == nil {
			return Decision{Denied: "A client certificate is needed."}, nil
		}
		return g.admit(c.Certificate.Subject.CommonName), nil
	}
	return Decision{Ask: g.ask(group, "")}, nil
}

func (g *gate) ask(group, problem string) *Ask {
	a := &Ask{Banner: "Mind the gap.", Error: problem, Username: true, Password: true, Groups: g.groups, Group: group}
	if g.together {
		a.Factor = "Code:"
	}
	return a
}

func (g *gate) Answer(_ context.Context, _ *Client, a *Answers) (Decision, error) {
	if user, passed := strings.CutPrefix(string(a.State), "passed "); passed {
		if a.Factor != g.factor {
			return Decision{Denied: "Wrong code."}, nil
		}
		return g.admit(user), nil
	}
	user := a.Username
	if a.Group != "" {
		user += "@" + a.Group
	}
	switch {
	case a.Username == "broken":
		return Decision{}, errors.New("the database is away")
	case a.Username == "banned":
		return Decision{Denied: "You are banned: <100> & counting."}, nil
	case a.Username != testUser || a.Password != testPassword || g.together && a.Factor != g.factor:
		return Decision{Ask: g.ask(a.Group, "Wrong user name or password.")}, nil
	case g.factor != "" && !g.together:
		return Decision{Ask: &Ask{Message: "Second step", Factor: "Code:", State: []byte("passed " + user)}}, nil
	}
	return g.admit(user), nil
}

func (g *gate) admit(user string) Decision {
	g.mu.Lock()
	defer g.mu.Unlock()
	cookie := rand.Text()
	g.cookies[cookie] = user
	return Decision{Cookie: cookie}
}

func (g *gate) Connect(_ context.Context, a *Attempt) (*Admission, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.attempts = append(g.attempts, a)
	if _, known := g.cookies[a.Request.Cookie]; !known {
		return nil, ErrCookie
	}
	if g.refuse != nil {
		return nil, g.refuse
	}
	return &Admission{Settings: g.settings, Start: func(h *Handover) { g.started <- h }}, nil
}

func (g *gate) Logout(_ context.Context, _ *Client, cookie string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.cookies, cookie)
}

// user is whose a cookie is.
func (g *gate) user(cookie string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.cookies[cookie]
}

// last is the last CONNECT.
func (g *gate) last(t *testing.T) *Attempt {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.attempts) == 0 {
		t.Fatal("no CONNECT has arrived")
	}
	return g.attempts[len(g.attempts)-1]
}

// authority is a CA of a test, with certificates in files for tools.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), pool: x509.NewCertPool()}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key, a.cert = a.make(template, template, nil)
	a.pool.AddCert(a.cert)
	a.file = a.write("ca.pem", "CERTIFICATE", a.cert.Raw)
	return a
}

func (a *authority) make(template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert
}

func (a *authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// issue makes a certificate for a name, and its files.
func (a *authority) issue(name string) (certificate tls.Certificate, certFile, keyFile string) {
	a.t.Helper()
	key, cert := a.make(&x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}, a.cert, a.key)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	certificate = tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
	return certificate, a.write(name+".pem", "CERTIFICATE", cert.Raw), a.write(name+".key", "PRIVATE KEY", der)
}

// server is our Handler on loopback.
type server struct {
	*gate
	ca   *authority
	addr string // HOST:PORT
	pin  string
	http *http.Server
}

// serve starts a server on address, such as 127.0.0.1:0. change may alter it first.
func serve(t *testing.T, g *gate, address string, change func(*Handler, *tls.Config), tune ...func(*http.Server)) *server {
	t.Helper()
	s := &server{gate: g, ca: newAuthority(t)}
	certificate, _, _ := s.ca.issue("localhost")
	h := &Handler{Authenticator: g, Sessions: g, Title: "Test <VPN>"}
	config := &tls.Config{Certificates: []tls.Certificate{certificate}}
	if change != nil {
		change(h, config)
	}
	s.pin = Pin(certificate.Leaf)
	s.http = NewServer(h, config)
	s.http.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	for _, tune := range tune {
		tune(s.http)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s.addr = l.Addr().String()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.http.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		s.http.Close()
		<-done
		for {
			select {
			case h := <-g.started:
				h.Conn.Close()
			default:
				return
			}
		}
	})
	return s
}
