package signin

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
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pquerna/otp/totp"
	"go.uber.org/goleak"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const secret = "JBSWY3DPEHPK3PXP"

// door lets in ada with the password lovelace, and perhaps a code of secret.
type door struct {
	groups []openconnect.Group
	factor bool

	mu      sync.Mutex
	answers []openconnect.Answers
	used    map[string]bool // codes
}

func (d *door) Begin(context.Context, *openconnect.Client, string) (openconnect.Decision, error) {
	return openconnect.Decision{Ask: &openconnect.Ask{Username: true, Password: true, Groups: d.groups}}, nil
}

func (d *door) Answer(_ context.Context, _ *openconnect.Client, a *openconnect.Answers) (openconnect.Decision, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answers = append(d.answers, *a)
	if string(a.State) == "passed" {
		code, _ := totp.GenerateCode(secret, time.Now())
		if a.Factor != code || d.used[code] {
			return openconnect.Decision{Ask: &openconnect.Ask{Factor: "Code:", Error: "Wrong code.", State: []byte("passed")}}, nil
		}
		d.used[code] = true
		return openconnect.Decision{Cookie: rand.Text()}, nil
	}
	switch {
	case a.Username != "ada" || a.Password != "lovelace" || len(d.groups) > 0 && a.Group == "":
		return openconnect.Decision{Ask: &openconnect.Ask{Username: true, Password: true, Groups: d.groups, Error: "Wrong user name or password."}}, nil
	case d.factor:
		return openconnect.Decision{Ask: &openconnect.Ask{Factor: "Code:", State: []byte("passed")}}, nil
	}
	return openconnect.Decision{Cookie: rand.Text()}, nil
}

func (d *door) Connect(context.Context, *openconnect.Attempt) (*openconnect.Admission, error) {
	return nil, openconnect.ErrCookie
}
func (d *door) Logout(context.Context, *openconnect.Client, string) {}

// serve returns the options that reach a server with that door.
func (d *door) serve(t *testing.T) Options {
	t.Helper()
	d.used = map[string]bool{}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "door"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, _ := x509.ParseCertificate(der)
	s := openconnect.NewServer(&openconnect.Handler{Authenticator: d, Sessions: d},
		&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
	s.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		s.Close()
		<-done
	})
	return Options{Server: l.Addr().String(), Dialer: Dialer{Pin: openconnect.Pin(leaf)}}
}

// given answers secrets with a list.
func given(list ...string) func(context.Context, int) (string, bool, error) {
	return func(_ context.Context, n int) (string, bool, error) {
		if n >= len(list) {
			return "", false, nil
		}
		return list[n], true, nil
	}
}

// asked answers by the kind of field, and writes down what was asked.
type asked struct {
	answers map[string][]string
	log     []string
}

func (a *asked) ask(_ context.Context, q Question) (string, error) {
	a.log = append(a.log, q.Field.Name)
	list := a.answers[q.Field.Name]
	if len(list) == 0 {
		return "", fmt.Errorf("asked for %s, try %d", q.Field.Name, q.Try)
	}
	a.answers[q.Field.Name] = list[1:]
	return list[0], nil
}

func TestGiven(t *testing.T) {
	d := &door{}
	o := d.serve(t)
	o.User, o.Given = "ada", given("lovelace")
	s := New(o)
	for range 2 {
		l, err := s.SignIn(t.Context())
		if err != nil || l.Cookie == "" || l.Pin != o.Pin {
			t.Fatalf("%+v, %v", l, err)
		}
	}
}

// A password that was given and is wrong is sent once.
func TestGivenWrong(t *testing.T) {
	d := &door{}
	o := d.serve(t)
	o.User, o.Given = "ada", given("byron")
	_, err := New(o).SignIn(t.Context())
	if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "Wrong user name or password.") {
		t.Errorf("%v", err)
	}
	if len(d.answers) != 1 {
		t.Errorf("%d tries: %v", len(d.answers), d.answers)
	}
}

func TestMissing(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*door, *Options)
		want   Missing
	}{
		{"user", func(*door, *Options) {}, MissingUser},
		{"password", func(_ *door, o *Options) { o.User = "ada" }, MissingPassword},
		{"factor", func(d *door, o *Options) { o.User, o.Given, d.factor = "ada", given("lovelace"), true }, MissingFactor},
		{"group", func(d *door, o *Options) {
			o.User, o.Given, d.groups = "ada", given("lovelace"), []openconnect.Group{{Name: "staff"}, {Name: "ops"}}
		}, MissingGroup},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &door{}
			o := d.serve(t)
			tt.change(d, &o)
			_, err := New(o).SignIn(t.Context())
			var m *MissingError
			if !errors.As(err, &m) || m.What != tt.want {
				t.Fatalf("%v, want a missing %s", err, tt.want)
			}
			if tt.want == MissingGroup && (len(m.Offers) != 2 || m.Offers[1] != "ops") {
				t.Errorf("offers %q", m.Offers)
			}
		})
	}
}

// What was typed is not asked for again when the session has to be made anew, but for a code.
func TestRemembered(t *testing.T) {
	d := &door{groups: []openconnect.Group{{Name: "staff"}, {Name: "ops"}}, factor: true}
	o := d.serve(t)
	a := &asked{answers: map[string][]string{"username": {"ada"}, "password": {"lovelace"}, "group_list": {"ops"}}}
	o.Ask = func(ctx context.Context, q Question) (string, error) {
		if q.Form.ID == formFactor || q.Field.Name == fieldFactor {
			a.log = append(a.log, "code")
			clear(d.used) // for the test alone: two codes within their time
			return totp.GenerateCode(secret, time.Now())
		}
		return a.ask(ctx, q)
	}
	s := New(o)
	for i := range 2 {
		if _, err := s.SignIn(t.Context()); err != nil {
			t.Fatalf("sign-in %d: %v", i, err)
		}
	}
	if got := strings.Join(a.log[3:], " "); got != "code code" {
		t.Errorf("asked for %q", a.log)
	}
	if last := d.answers[len(d.answers)-2]; last.Username != "ada" || last.Group != "ops" {
		t.Errorf("answered %+v", last)
	}
}

// A password that was remembered and is wrong by now is asked for.
func TestRememberedWrong(t *testing.T) {
	d := &door{}
	o := d.serve(t)
	a := &asked{answers: map[string][]string{"password": {"lovelace", "lovelace"}}}
	o.User, o.Ask = "ada", a.ask
	s := New(o)
	if _, err := s.SignIn(t.Context()); err != nil {
		t.Fatal(err)
	}
	for key := range s.known {
		s.known[key] = "yesterday's"
	}
	if _, err := s.SignIn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(a.log) != 2 {
		t.Errorf("asked for %q", a.log)
	}
}

func TestSignInWithTOTP(t *testing.T) {
	d := &door{factor: true}
	o := d.serve(t)
	o.User, o.Given = "ada", given("lovelace")
	var err error
	if o.TOTP, err = ParseTOTP(secret); err != nil {
		t.Fatal(err)
	}
	if _, err := New(o).SignIn(t.Context()); err != nil {
		t.Fatal(err)
	}
	// One that the server does not take is sent once.
	if o.TOTP, err = ParseTOTP("MFRGGZDFMZTWQ2LK"); err != nil {
		t.Fatal(err)
	}
	before := len(d.answers)
	if _, err := New(o).SignIn(t.Context()); !errors.Is(err, ErrDenied) {
		t.Errorf("%v", err)
	}
	if len(d.answers) != before+2 {
		t.Errorf("%d answers", len(d.answers)-before)
	}
}

// The code of RFC 6238 appendix B, and the ways to write a secret.
func TestParseTOTP(t *testing.T) {
	now = func() time.Time { return time.Unix(59, 0) }
	defer func() { now = time.Now }()
	for _, text := range []string{
		"GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ", "gezd gnbv gy3t qojq gezd gnbv gy3t qojq\n", "base32:GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ",
		"0x3132333435363738393031323334353637383930",
		"otpauth://totp/corp:ada?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ&issuer=corp",
	} {
		k, err := ParseTOTP(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if code, err := k.code(t.Context()); code != "287082" {
			t.Errorf("%q: %s, %v", text, code, err)
		}
	}
	k, err := ParseTOTP("otpauth://totp/x?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ&digits=8&period=30&algorithm=SHA1")
	if err != nil {
		t.Fatal(err)
	}
	if code, _ := k.code(t.Context()); code != "94287082" {
		t.Errorf("8 digits: %s", code)
	}
	// The same code is not made twice: it is waited for the next one.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if code, err := k.code(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("again: %q, %v", code, err)
	}
	for _, text := range []string{"", "0xyz", "not base 32!", "otpauth://hotp/x?secret=GEZDGNBV&counter=1", "otpauth://totp/x?secret="} {
		_, err := ParseTOTP(text)
		if err == nil || text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	make := func(end time.Time) string {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: end}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	der, _ := x509.MarshalPKCS8PrivateKey(key)
	private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	good := make(time.Now().Add(time.Hour))
	both := file("both.pem", good+private)
	if c, err := LoadCertificate(both, ""); err != nil || c.Leaf == nil {
		t.Errorf("one file: %v", err)
	}
	if _, err := LoadCertificate(file("cert.pem", good), file("key.pem", private)); err != nil {
		t.Errorf("two files: %v", err)
	}
	if _, err := LoadCertificate(filepath.Join(dir, "cert.pem"), ""); err == nil {
		t.Error("a certificate without a key")
	}
	if _, err := LoadCertificate(file("old.pem", make(time.Now().Add(-time.Hour))+private), ""); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an old one: %v", err)
	}
	if pool, err := LoadCAs(both, false); err != nil || pool == nil {
		t.Errorf("authorities: %v", err)
	}
	if _, err := LoadCAs(filepath.Join(dir, "key.pem"), true); err == nil {
		t.Error("a key is no authority")
	}
}
