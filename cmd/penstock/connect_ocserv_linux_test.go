package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// ocserv starts the stock server in the server's place, with ada (password lovelace).
func (w *connectNet) ocserv(change func(*stock.ServerOptions)) (s *stock.Server) {
	o := stock.ServerOptions{
		Listen: netip.MustParseAddrPort(connectServer + ":443"), Users: map[string]string{"ada": "lovelace"},
		Config: "max-ban-score = 0\nroute = 10.97.0.0/255.255.255.0\nroute = fd97::/64\ndns = 10.97.0.1\ndefault-domain = corp.example\n",
	}
	if change != nil {
		change(&o)
	}
	w.inServer(func() { s = stock.StartServer(w.t, o) })
	return s
}

// signedIn are the arguments of penstock connect for ada.
func signedIn(s *stock.Server, more ...string) []string {
	return append([]string{"penstock", "connect", s.URL, "-u", "ada", "--passwd-on-stdin", "--servercert", s.Pin}, more...)
}

// report is what penstock status says.
func (w *connectNet) report(as user) (r control.Report) {
	w.t.Helper()
	got := w.run(as, "", "penstock", "status", "--json")
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil || r.Node.OpenConnect == nil {
		w.t.Fatalf("penstock status: %v %+v", err, got)
	}
	return r
}

// As an ordinary user: proxies, forwards, the control socket, and what signals do to the session.
func TestConnectRootless(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(nil)
	w.web()
	p := w.start(asNobody, "lovelace\n", signedIn(s, "--socks5", "127.0.0.1:1080", "--http", "127.0.0.1:3128",
		"--forward", "tcp 127.0.0.1:8080=10.97.0.1:80", "--forward", "127.0.0.1:8086=[fd97::1]:80", "--printcookie")...)
	p.await(`path=dtls why="datagrams arrive"`)
	cookie := strings.TrimSpace(p.stdout.String())
	own := w.report(asNobody).Node.Addresses
	if len(own) != 2 {
		t.Fatalf("addresses %v", own)
	}
	for _, tt := range []struct {
		from int
		curl []string
	}{
		{0, []string{"-x", "socks5h://127.0.0.1:1080", "http://10.97.0.1/"}},
		{1, []string{"-x", "socks5h://127.0.0.1:1080", "http://[fd97::1]/"}},
		{0, []string{"-x", "http://127.0.0.1:3128", "http://10.97.0.1/"}},
		{0, []string{"http://127.0.0.1:8080/"}},
		{1, []string{"http://127.0.0.1:8086/"}},
	} {
		if from, err := w.fetch(tt.curl...); err != nil || from != own[tt.from].Addr().String() {
			t.Errorf("curl %v: from %s, want %v; %v", tt.curl, from, own[tt.from], err)
		}
	}
	if got := w.run(asNobody, "", "penstock", "ping", "-n", "1", "10.97.0.1"); got.code != 0 {
		t.Errorf("ping: %+v", got)
	}
	if got := w.run(asNobody, "", "penstock", "status"); !strings.Contains(got.stdout, "tunnel to 10.9.1.2:443: up") ||
		!strings.Contains(got.stdout, "packets by  dtls (datagrams arrive)") || !strings.Contains(got.stdout, "10.97.0.0/24, fd97::/64") {
		t.Errorf("status:\n%s", got.stdout)
	}
	// A second one to the same server is told so.
	if got := w.run(asNobody, "lovelace\n", signedIn(s)...); got.code != exitFailure || !strings.Contains(got.stderr, "--control") {
		t.Errorf("a second one: %+v", got)
	}
	if code := p.end(syscall.SIGHUP); code != exitOK {
		t.Errorf("SIGHUP: exit code %d", code)
	}
	// The cookie is still good, and gives the same addresses; SIGINT ends that.
	p = w.start(asNobody, cookie+"\n", "penstock", "connect", s.URL, "--cookie-on-stdin", "--servercert", s.Pin)
	p.await("msg=up")
	if again := w.report(asNobody).Node.Addresses; fmt.Sprint(again) != fmt.Sprint(own) {
		t.Errorf("addresses %v, were %v", again, own)
	}
	// Without flags there is a proxy, which is printed.
	m := regexp.MustCompile(`curl -x (socks5h://127\.0\.0\.1:\d+) `).FindStringSubmatch(p.stdout.String())
	if m == nil {
		t.Fatalf("no proxy: %q", &p.stdout)
	}
	if _, err := w.fetch("-x", m[1], "http://10.97.0.1/"); err != nil {
		t.Error(err)
	}
	if code := p.end(syscall.SIGINT); code != exitOK {
		t.Errorf("SIGINT: exit code %d", code)
	}
	got := w.run(asNobody, "", "penstock", "connect", s.URL, "-C", cookie, "--servercert", s.Pin)
	if got.code != exitFailure || !strings.Contains(got.stderr, "cookie not accepted") {
		t.Errorf("a spent cookie: %+v", got)
	}
}

// What goes wrong has a message and an exit code.
func TestConnectRefused(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(nil)
	for _, tt := range []struct {
		name, stdin string
		args        []string
		code        int
		want        string
	}{
		{"wrong password", "byron\n", signedIn(s), exitFailure, "Login failed"},
		{"unknown certificate", "lovelace\n", []string{"penstock", "connect", s.URL, "-u", "ada", "--passwd-on-stdin"}, exitFailure, "--servercert " + s.Pin},
		{"another key", "lovelace\n", append(signedIn(s), "--servercert", "pin-sha256:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), exitFailure, "shows the key " + s.Pin},
		{"no password", "", signedIn(s), exitUsage, "the standard input has no line"},
		{"nobody to ask", "", []string{"penstock", "connect", s.URL, "-u", "ada", "--servercert", s.Pin}, exitUsage, "--passwd-on-stdin"},
		{"no user", "", []string{"penstock", "connect", s.URL, "--servercert", s.Pin}, exitUsage, "--user"},
		{"nobody there", "lovelace\n", []string{"penstock", "connect", "10.9.1.2:444", "-u", "ada", "--passwd-on-stdin"}, exitFailure, "connection refused"},
		{"a port in use", "lovelace\n", signedIn(s, "--socks5", "192.0.2.1:1080"), exitFailure, "cannot assign requested address"},
		{"a made up cookie", "", []string{"penstock", "connect", s.URL, "-C", "AAAA", "--servercert", s.Pin}, exitFailure, "server unavailable"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := w.run(asNobody, tt.stdin, tt.args...)
			if got.code != tt.code || !strings.Contains(got.stderr, tt.want) || strings.Contains(got.stderr, "lovelace") {
				t.Errorf("exit code %d, want %d; %q in\n%s", got.code, tt.code, tt.want, got.stderr)
			}
		})
	}
	if left, _ := filepath.Glob(filepath.Join(w.dir, "penstock-*", "*.sock")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Debian's default is TLS 1.2, where there is no key for DTLS.
func TestConnectTLS12(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(func(o *stock.ServerOptions) { o.NoTLS13 = true })
	w.web()
	p := w.start(asNobody, "lovelace\n", signedIn(s)...)
	p.await("msg=up")
	if o := w.report(asNobody).Node.OpenConnect; o.Path != "cstp" || !strings.Contains(o.Why, "extended master secret") {
		t.Errorf("packets by %s (%s)", o.Path, o.Why)
	}
	if _, err := w.fetch("-x", "socks5h://127.0.0.1:1080", "http://10.97.0.1/"); err != nil {
		t.Error(err)
	}
	if code := p.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	p = w.start(asNobody, "lovelace\n", signedIn(s, "--no-dtls", "--disable-ipv6")...)
	p.await("msg=up")
	r := w.report(asNobody).Node
	if o := r.OpenConnect; o.Path != "cstp" || !strings.Contains(o.Why, "switched off") || len(r.Addresses) != 1 {
		t.Errorf("packets by %s (%s), addresses %v", o.Path, o.Why, r.Addresses)
	}
}

// Groups are chosen by name or by label, and a missing choice is an error that names the flag.
func TestConnectGroup(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(func(o *stock.ServerOptions) {
		o.Groups = map[string]string{"ada": "staff,ops"}
		o.Config += "select-group = staff\nselect-group = ops[Operators]\n"
	})
	for _, group := range []string{"ops", "Operators"} {
		if got := w.run(asNobody, "lovelace\n", signedIn(s, "--authgroup", group, "--cookieonly")...); got.code != exitOK || len(got.stdout) < 10 {
			t.Errorf("%s: %+v", group, got)
		}
	}
	if got := w.run(asNobody, "lovelace\n", signedIn(s, "--cookieonly")...); got.code != exitUsage || !strings.Contains(got.stderr, "--authgroup") || !strings.Contains(got.stderr, "staff, ops") {
		t.Errorf("no choice: %+v", got)
	}
	if got := w.run(asNobody, "lovelace\n", signedIn(s, "--cookieonly", "--authgroup", "board")...); got.code != exitFailure || !strings.Contains(got.stderr, "denied") {
		t.Errorf("another group: %+v", got)
	}
}

// certificates makes a CA and a certificate for ada, UID and all, in files that everybody can read.
func (w *connectNet) certificates() (ca, cert, key string) {
	issue := func(name string, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		w.check(err)
		template := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			Subject: pkix.Name{CommonName: name, ExtraNames: []pkix.AttributeTypeAndValue{{Type: []int{0, 9, 2342, 19200300, 100, 1, 1}, Value: name}}},
			IsCA:    parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		if parent == nil {
			parent, signer = template, private
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &private.PublicKey, signer)
		w.check(err)
		made, err := x509.ParseCertificate(der)
		w.check(err)
		secret, err := x509.MarshalPKCS8PrivateKey(private)
		w.check(err)
		certFile, keyFile := filepath.Join(w.dir, name+".pem"), filepath.Join(w.dir, name+".key")
		w.check(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
		w.check(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o644))
		return made, private, certFile, keyFile
	}
	authority, signer, ca, _ := issue("ca", nil, nil)
	_, _, cert, key = issue("ada", authority, signer)
	return ca, cert, key
}

func TestConnectCertificate(t *testing.T) {
	w := newConnectNet(t)
	ca, cert, key := w.certificates()
	s := w.ocserv(func(o *stock.ServerOptions) { o.Users, o.ClientCA = nil, ca })
	w.web()
	// The server's own certificate is self-signed: it is its own authority.
	p := w.start(asNobody, "", "penstock", "connect", s.URL, "-c", cert, "-k", key, "--cafile", w.readable(s.Cert))
	p.await("msg=up")
	if _, err := w.fetch("-x", "socks5h://127.0.0.1:1080", "http://10.97.0.1/"); err != nil {
		t.Error(err)
	}
	p.end(syscall.SIGTERM)
	if got := w.run(asNobody, "", "penstock", "connect", s.URL, "--servercert", s.Pin); got.code != exitFailure || !strings.Contains(got.stderr, "denied") {
		t.Errorf("without a certificate: %+v", got)
	}
}

// readable is a copy of a file that everybody can read.
func (w *connectNet) readable(path string) string {
	b, err := os.ReadFile(path)
	w.check(err)
	copied := filepath.Join(w.dir, filepath.Base(path))
	w.check(os.WriteFile(copied, b, 0o644))
	return copied
}

// One program can sign in and the other connect.
func TestConnectCookieOfOthers(t *testing.T) {
	w := newConnectNet(t)
	s := w.ocserv(nil)
	w.web()
	script := `eval "$(echo lovelace | openconnect --authenticate --passwd-on-stdin -u ada --servercert "$2" "$1")" || exit 9
		printf '%s\n' "$COOKIE" | exec "$3" connect "$CONNECT_URL" --cookie-on-stdin --servercert "$FINGERPRINT"`
	p := w.start(asNobody, "", "sh", "-c", script, "sh", s.URL, s.Pin, w.penstock)
	p.await("msg=up")
	if _, err := w.fetch("-x", "socks5h://127.0.0.1:1080", "http://10.97.0.1/"); err != nil {
		t.Error(err)
	}
	p.end(syscall.SIGTERM)

	got := w.run(asNobody, "lovelace\n", signedIn(s, "--authenticate")...)
	if got.code != exitOK {
		t.Fatalf("%+v", got)
	}
	cmd := w.start(asRoot, got.stdout, "sh", "-c", `eval "$(cat)"
		exec openconnect -C "$COOKIE" --servercert "$FINGERPRINT" --script true "$CONNECT_URL" >&2`)
	cmd.await("Configured as 10.97.0.")
	cmd.end(syscall.SIGTERM)
}
