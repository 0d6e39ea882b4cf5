package openconnect

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// answers is a Prompt that knows what to say to each field.
func answers(pairs ...string) func(context.Context, Question) (string, error) {
	return func(_ context.Context, q Question) (string, error) {
		for i := 0; i+1 < len(pairs); i += 2 {
			if pairs[i] == q.Field.Name {
				return pairs[i+1], nil
			}
		}
		return "", errors.New("asked for " + q.Field.Name)
	}
}

func credentials() func(context.Context, Question) (string, error) {
	return answers("username", testUser, "password", testPassword, "answer", "123456", "secondary_password", "123456")
}

// options are those for a server that is trusted by its pin.
func (s *server) options() Options {
	return Options{Dialer: Dialer{Pin: s.pin, Proxy: noProxy}, Server: s.addr, Prompt: credentials()}
}

func noProxy(*url.URL) (*url.URL, error) { return nil, nil }

// bounded is a context that ends with the test, or soon.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func mustSignIn(t *testing.T, o Options) *Login {
	t.Helper()
	login, err := SignIn(bounded(t), o)
	if err != nil {
		t.Fatal(err)
	}
	return login
}

func TestSignIn(t *testing.T) {
	for _, tt := range []struct {
		name    string
		address string
		gate    func(*gate)
		options func(*Options)
		user    string
	}{
		{"password", "127.0.0.1:0", nil, nil, testUser},
		{"over IPv6", "[::1]:0", nil, nil, testUser},
		{"group", "127.0.0.1:0", withGroups, func(o *Options) { o.Group = "ops" }, testUser + "@ops"},
		{"group by label", "127.0.0.1:0", withGroups, func(o *Options) { o.Group = "Operators & co" }, testUser + "@ops"},
		{"group in the URL", "127.0.0.1:0", withGroups, func(o *Options) {
			o.Server += "/ops"
		}, testUser + "@ops"},
		{"group asked", "127.0.0.1:0", withGroups, func(o *Options) {
			o.Prompt = answers("username", testUser, "password", testPassword, "group_list", "ops")
		}, testUser + "@ops"},
		{"second factor", "127.0.0.1:0", func(g *gate) { g.factor = "123456" }, nil, testUser},
		{"second factor beside the password", "127.0.0.1:0", func(g *gate) { g.factor, g.together = "123456", true }, nil, testUser},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate()
			if tt.gate != nil {
				tt.gate(g)
			}
			s := serve(t, g, tt.address, nil)
			o := s.options()
			if tt.options != nil {
				tt.options(&o)
			}
			login := mustSignIn(t, o)
			if got := g.user(login.Cookie); got != tt.user {
				t.Errorf("the cookie is %q's, want %q's", got, tt.user)
			}
			if login.Host != s.addr || login.Pin != s.pin || login.Banner != "Mind the gap." {
				t.Errorf("%+v", login)
			}
			if c := g.clients[0]; c.UserAgent != DefaultUserAgent || c.Device.Platform == "" || !c.Remote.Addr().IsLoopback() {
				t.Errorf("the server sees %+v", c)
			}
		})
	}
}

func TestSignInWithCertificate(t *testing.T) {
	g := newGate()
	g.certificate = true
	ca := newAuthority(t)
	s := serve(t, g, "127.0.0.1:0", func(_ *Handler, c *tls.Config) {
		c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, ca.pool
	})
	bob, _, _ := ca.issue("bob")
	o := s.options()
	o.Prompt, o.Certificate = nil, &bob
	if login := mustSignIn(t, o); g.user(login.Cookie) != "bob" {
		t.Errorf("the cookie is %q's", g.user(login.Cookie))
	}
	o.Certificate = nil
	_, err := SignIn(bounded(t), o)
	if denied, ok := errors.AsType[*DeniedError](err); !ok || denied.Reason != "A client certificate is needed." {
		t.Errorf("without a certificate: %v", err)
	}
	mallory, _, _ := newAuthority(t).issue("mallory")
	o.Certificate = &mallory
	if _, err := SignIn(bounded(t), o); err == nil {
		t.Error("a stranger's certificate lets in")
	}
}

func TestSignInDenied(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)

	o := s.options()
	var tries []int
	o.Prompt = func(_ context.Context, q Question) (string, error) {
		if q.First {
			tries = append(tries, q.Try)
			if (q.Try > 0) != (q.Form.Error != "") {
				t.Errorf("try %d with the error %q", q.Try, q.Form.Error)
			}
		}
		return "wrong", nil
	}
	_, err := SignIn(bounded(t), o)
	if denied, ok := errors.AsType[*DeniedError](err); !ok || !errors.Is(err, ErrDenied) || denied.Reason != "Wrong user name or password." {
		t.Errorf("wrong passwords: %v", err)
	}
	if want := []int{0, 1, 2}; !reflect.DeepEqual(tries, want) {
		t.Errorf("tries %v, want %v", tries, want)
	}

	o.Prompt = answers("username", "banned", "password", "x")
	_, err = SignIn(bounded(t), o)
	if denied, ok := errors.AsType[*DeniedError](err); !ok || denied.Reason != "You are banned: <100> & counting." {
		t.Errorf("banned: %v", err)
	}

	o.Prompt = answers("username", "broken", "password", "x")
	if _, err = SignIn(bounded(t), o); err == nil || errors.Is(err, ErrDenied) {
		t.Errorf("no decision: %v", err)
	} else if _, ok := errors.AsType[*UnavailableError](err); !ok {
		t.Errorf("no decision: %v", err)
	}

	gaveUp := errors.New("never mind")
	o.Prompt = func(context.Context, Question) (string, error) { return "", gaveUp }
	if _, err = SignIn(bounded(t), o); !errors.Is(err, gaveUp) {
		t.Errorf("given up: %v", err)
	}
	o.Prompt = nil
	if _, err = SignIn(bounded(t), o); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "Username") {
		t.Errorf("nobody to ask: %v", err)
	}
	if len(g.cookies) != 0 {
		t.Error("somebody is signed in")
	}
}

func TestSignInUnknownGroup(t *testing.T) {
	g := newGate()
	withGroups(g)
	s := serve(t, g, "127.0.0.1:0", nil)
	o := s.options()
	o.Group = "guests"
	if _, err := SignIn(bounded(t), o); err == nil || !strings.Contains(err.Error(), "staff, ops") {
		t.Errorf("%v", err)
	}
}

func TestServerIsChecked(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	o := s.options()

	o.Pin = ""
	_, err := SignIn(bounded(t), o)
	if refused, ok := errors.AsType[*CertificateError](err); !ok || refused.Pin != s.pin || !strings.Contains(err.Error(), s.pin) {
		t.Errorf("unknown CA: %v", err)
	}
	o.RootCAs = s.ca.pool
	login := mustSignIn(t, o)

	o.Server = strings.Replace(s.addr, "127.0.0.1", "127.0.0.2", 1)
	o.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, s.addr)
	}
	if _, err = SignIn(bounded(t), o); err == nil {
		t.Error("a certificate for another host is accepted")
	} else if _, ok := errors.AsType[*CertificateError](err); !ok {
		t.Errorf("another host: %v", err)
	}

	other := serve(t, newGate(), "127.0.0.1:0", nil)
	o.Pin = other.pin
	_, err = SignIn(bounded(t), o)
	if refused, ok := errors.AsType[*CertificateError](err); !ok || refused.Want != other.pin || refused.Pin != s.pin {
		t.Errorf("another pin: %v", err)
	}
	if len(g.clients) != 1 {
		t.Errorf("%d requests reached a server that was not trusted", len(g.clients)-1)
	}
	login.Pin = other.pin
	if _, err = Connect(bounded(t), login, ConnectOptions{Dialer: Dialer{Proxy: noProxy}}); err == nil {
		t.Error("CONNECT to another key")
	}
	o.Pin = "pin-sha256:abcd"
	if _, err = SignIn(bounded(t), o); err == nil || !strings.Contains(err.Error(), "44 characters") {
		t.Errorf("half a pin: %v", err)
	}
}

func TestConnect(t *testing.T) {
	for _, tt := range []struct {
		name    string
		address string
		version uint16
		options ConnectOptions
		psk     bool
		reason  string
		mtu     int // that the client asks for
	}{
		{"TLS 1.3", "127.0.0.1:0", tls.VersionTLS13, ConnectOptions{}, true, "", 1434},
		{"TLS 1.2 between Go programs", "[::1]:0", tls.VersionTLS12, ConnectOptions{}, true, "", 1414},
		{"no DTLS", "127.0.0.1:0", tls.VersionTLS13, ConnectOptions{NoDTLS: true}, false, "not wanted", 1434},
		{"IPv4 inside", "127.0.0.1:0", tls.VersionTLS13, ConnectOptions{NoIPv6: true, BaseMTU: 1400}, true, "", 1334},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate()
			s := serve(t, g, tt.address, func(_ *Handler, c *tls.Config) { c.MaxVersion = tt.version })
			o := tt.options
			o.Proxy, o.Hostname = noProxy, "laptop"
			o.Addresses = []netip.Addr{netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("fd00:9::2")}
			tunnel, err := Connect(bounded(t), mustSignIn(t, s.options()), o)
			if err != nil {
				t.Fatal(err)
			}
			defer tunnel.Conn.Close()
			want := g.settings
			if o.NoIPv6 {
				want.Addresses, want.Include = want.Addresses[:1], want.Include[:1]
			}
			if !tt.psk {
				want.DTLSPort, want.AppID, want.CipherSuite, want.DTLS = 0, nil, "", Timers{}
			}
			if !reflect.DeepEqual(*tunnel.Settings, want) {
				t.Errorf("settings\n%+v, want\n%+v", *tunnel.Settings, want)
			}
			a := g.last(t)
			if (tunnel.PSK != nil) != tt.psk || tunnel.NoPSK != tt.reason {
				t.Errorf("a key of %d bytes, reason %q", len(tunnel.PSK), tunnel.NoPSK)
			}
			if !bytes.Equal(tunnel.PSK, a.PSK) {
				t.Error("the sides have different keys")
			}
			if a.Request.PSK() != tt.psk || (a.NoPSK == "") != tt.psk {
				t.Errorf("the server sees suites %q, reason %q", a.Request.CipherSuites, a.NoPSK)
			}
			r := a.Request
			old := o.Addresses
			if o.NoIPv6 {
				old = old[:1]
			}
			if r.Hostname != "laptop" || r.MTU != tt.mtu || r.IPv6 == o.NoIPv6 || !r.IPv4 ||
				!slices.Equal(r.Addresses, old) || r.UserAgent != DefaultUserAgent || r.Host != s.addr {
				t.Errorf("the request: %+v", r)
			}
			if tunnel.Remote.String() != s.addr || tunnel.Proxied {
				t.Errorf("remote %v, proxied %v", tunnel.Remote, tunnel.Proxied)
			}
			h := <-g.started
			defer h.Conn.Close()
			talk(t, tunnel, h)
		})
	}
}

// talk sends bytes both ways, past buffers.
func talk(t *testing.T, tunnel *Tunnel, h *Handover) {
	t.Helper()
	client := io.MultiReader(bytes.NewReader(tunnel.Buffered), tunnel.Conn)
	server := io.MultiReader(bytes.NewReader(h.Buffered), h.Conn)
	for _, way := range []struct {
		w io.Writer
		r io.Reader
	}{{tunnel.Conn, server}, {h.Conn, client}} {
		sent := []byte("STF\x01\x00\x00\x07\x00")
		if _, err := way.w.Write(sent); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(way.r, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%x, %v", got, err)
		}
	}
}

// TestConnectKeepsEarlyBytes has the server's first frame arrive with its answer, and
// the client's with its request.
func TestConnectKeepsEarlyBytes(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	cookie := g.admit("alice").Cookie
	conn, err := tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := &ConnectRequest{Host: s.addr, Cookie: cookie, IPv4: true}
	if _, err := conn.Write(append(r.AppendTo(nil), "early"...)); err != nil {
		t.Fatal(err)
	}
	h := <-g.started
	defer h.Conn.Close()
	got := make([]byte, 5)
	if _, err := io.ReadFull(io.MultiReader(bytes.NewReader(h.Buffered), h.Conn), got); err != nil || string(got) != "early" {
		t.Errorf("%q, %v", got, err)
	}

	// One TLS record with head and frame.
	client, far := net.Pipe()
	defer client.Close()
	go func() {
		far.Write([]byte("HTTP/1.1 200 CONNECTED\r\nX-CSTP-MTU: 1400\r\n\r\nearly"))
		far.Close()
	}()
	status, header, early, err := readHead(client)
	if err != nil || status.code != 200 || header.Get("X-CSTP-MTU") != "1400" || string(early) != "early" {
		t.Errorf("%v %v %q %v", status, header, early, err)
	}
}

func TestConnectRefused(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	login := mustSignIn(t, s.options())
	o := ConnectOptions{Dialer: Dialer{Proxy: noProxy}}

	stale := *login
	stale.Cookie = "nosuchcookie"
	if _, err := Connect(bounded(t), &stale, o); !errors.Is(err, ErrCookie) {
		t.Errorf("unknown cookie: %v", err)
	}
	g.refuse = &UnavailableError{Reason: "Two sessions are open already"}
	_, err := Connect(bounded(t), login, o)
	if full, ok := errors.AsType[*UnavailableError](err); !ok || full.Reason != "Two sessions are open already" {
		t.Errorf("full: %v", err)
	}
	g.refuse = errors.New("secret detail")
	_, err = Connect(bounded(t), login, o)
	if full, ok := errors.AsType[*UnavailableError](err); !ok || strings.Contains(full.Reason, "secret") {
		t.Errorf("internal error: %v", err)
	}
	g.refuse = nil
	g.settings.MTU = 0
	if _, err = Connect(bounded(t), login, o); err == nil || !strings.Contains(err.Error(), "MTU") {
		t.Errorf("no MTU: %v", err)
	}
}

// TestConnectTwice: the cookie is not used up.
func TestConnectTwice(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	login := mustSignIn(t, s.options())
	var keys [][]byte
	for range 2 {
		tunnel, err := Connect(bounded(t), login, ConnectOptions{Dialer: Dialer{Proxy: noProxy}})
		if err != nil {
			t.Fatal(err)
		}
		defer tunnel.Conn.Close()
		keys = append(keys, tunnel.PSK)
	}
	if bytes.Equal(keys[0], keys[1]) {
		t.Error("two connections with one key")
	}
}

func TestLogout(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	login := mustSignIn(t, s.options())
	if err := Logout(bounded(t), login, Dialer{Proxy: noProxy}); err != nil {
		t.Fatal(err)
	}
	if g.user(login.Cookie) != "" {
		t.Error("the session is still there")
	}
	if err := Logout(bounded(t), login, Dialer{Proxy: noProxy}); err != nil {
		t.Errorf("again: %v", err)
	}
}
