package openconnect

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// ask sends one request to a Handler without a network.
func ask(h http.Handler, method, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func newHandler(g *gate) *Handler {
	return &Handler{Authenticator: g, Sessions: g, Secret: []byte("0123456789abcdef")}
}

const initDocument = `<?xml version="1.0" encoding="UTF-8"?>
<config-auth client="vpn" type="init" aggregate-auth-version="2"><version who="vpn">v9.01-3</version><device-id>linux-64</device-id><capabilities><auth-method>single-sign-on-v2</auth-method></capabilities><group-access>https://127.0.0.1/</group-access></config-auth>`

func replyDocument(user, password string) string {
	m := &clientMessage{kind: typeReply, answers: []answer{{"username", user}, {"password", password}}}
	return string(m.document())
}

// contextCookie is what a response makes the client send next.
func contextCookie(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	for _, c := range w.Result().Cookies() {
		if c.Name == contextName {
			if !c.Secure || !c.HttpOnly {
				t.Errorf("cookie %+v", c)
			}
			return contextName + "=" + c.Value
		}
	}
	t.Fatalf("no state in %v", w.Result().Header)
	return ""
}

// TestStateIsTheClients: the next step may reach another server, or this one after a
// restart, as long as they share the secret.
func TestStateIsTheClients(t *testing.T) {
	g := newGate()
	g.factor = "7"
	w := ask(newHandler(g), "POST", "/", initDocument)
	w = ask(newHandler(g), "POST", "/auth", replyDocument(testUser, testPassword), "Cookie", contextCookie(t, w))
	w = ask(newHandler(g), "POST", "/auth", string((&clientMessage{kind: typeReply, answers: []answer{{"password", "7"}}}).document()), "Cookie", contextCookie(t, w))
	m, err := parseServerMessage(w.Body.Bytes())
	if err != nil || m.form.ID != "success" || len(g.cookies) != 1 {
		t.Errorf("%v, %s", err, w.Body)
	}
}

// TestStateForged: nothing but an unspoilt state of this server, in time, goes on.
func TestStateForged(t *testing.T) {
	g := newGate()
	g.factor = "7"
	h := newHandler(g)
	code := string((&clientMessage{kind: typeReply, answers: []answer{{"password", "7"}}}).document())
	w := ask(h, "POST", "/", initDocument)
	first := contextCookie(t, w)
	w = ask(h, "POST", "/auth", replyDocument(testUser, testPassword), "Cookie", first)
	good := contextCookie(t, w)

	other := newHandler(g)
	other.Secret = []byte("fedcba9876543210")
	other.seal.init(other.Secret)
	late := newHandler(g)
	late.seal.init(late.Secret)
	flipped := []byte(good)
	flipped[len(flipped)-3] ^= 1
	for name, cookie := range map[string]string{
		"none":           "",
		"empty":          contextName + "=",
		"garbage":        contextName + "=AAAA",
		"flipped":        string(flipped),
		"cut":            good[:len(good)-4],
		"another secret": contextName + "=" + other.seal.seal(time.Now().Add(time.Hour), askedFactor, []byte("passed alice")),
		"too late":       contextName + "=" + late.seal.seal(time.Now(), askedFactor, []byte("passed alice")),
		"a step before":  first,
	} {
		w := ask(h, "POST", "/auth", code, "Cookie", cookie)
		m, err := parseServerMessage(w.Body.Bytes())
		if err != nil || m.form.ID != "main" || m.form.Error == "" || len(g.cookies) != 0 {
			t.Errorf("%s: %v %s", name, err, w.Body)
		}
	}
	// The counter-check.
	ask(h, "POST", "/auth", code, "Cookie", good)
	if len(g.cookies) != 1 {
		t.Error("the good one does not pass")
	}
}

// TestOnlyWhatWasAsked: an answer to a question that was not put is not passed on.
func TestOnlyWhatWasAsked(t *testing.T) {
	g := newGate()
	var got Answers
	h := newHandler(g)
	h.Authenticator = judge{g, func(a *Answers) { got = *a }}
	w := ask(h, "POST", "/", initDocument)
	m := &clientMessage{kind: typeReply, groupSelect: "ops", answers: []answer{{"username", "u"}, {"password", "p"}, {"secondary_password", "x"}, {"answer", "y"}}}
	ask(h, "POST", "/auth", string(m.document()), "Cookie", contextCookie(t, w))
	if got.Username != "u" || got.Password != "p" || got.Group != "" || got.Factor != "" {
		t.Errorf("%+v", got)
	}
}

// judge shows answers to a test.
type judge struct {
	*gate
	see func(*Answers)
}

func (j judge) Answer(ctx context.Context, c *Client, a *Answers) (Decision, error) {
	j.see(a)
	return j.gate.Answer(ctx, c, a)
}

func TestBodies(t *testing.T) {
	h := newHandler(newGate())
	long := strings.Repeat("x", maxClientDocument)
	for _, tt := range []struct {
		name, body string
		status     int
	}{
		{"a document", initDocument, 200},
		{"after a BOM", "\uFEFF" + initDocument, 200},
		{"too long", initDocument + long, 413},
		{"too long a form", "username=" + long, 413},
		{"too long an answer", "username=" + long[:maxAnswer+1], 413},
		{"too many fields", strings.Repeat("a=b&", 100), 413},
		{"too deep", strings.Repeat("<a>", 1000), 413},
		{"cut off", initDocument[:len(initDocument)-3], 400},
		{"a DTD", `<!DOCTYPE x [<!ENTITY a "b">]><config-auth type="init">&a;</config-auth>`, 400},
		{"an entity", `<config-auth type="init">&a;</config-auth>`, 400},
		{"another charset", `<?xml version="1.0" encoding="ISO-8859-1"?><config-auth type="init"/>`, 400},
		{"another root", `<html/>`, 400},
		{"a server's document", `<config-auth type="complete"/>`, 400},
		{"no form", "username=%zz", 400},
		{"nothing", "", 200},
	} {
		if w := ask(h, "POST", "/", tt.body); w.Code != tt.status {
			t.Errorf("%s: %d, want %d: %s", tt.name, w.Code, tt.status, w.Body)
		}
	}
}

func TestPaths(t *testing.T) {
	g := newGate()
	h := newHandler(g)
	h.Title = "Our <VPN>"
	agent := []string{"User-Agent", "Open AnyConnect VPN Agent v3.20"}
	for _, tt := range []struct {
		method, path string
		header       []string
		status       int
		holds        string
	}{
		{"GET", "/", nil, 200, "<h1>Our &lt;VPN&gt;</h1>"},
		{"GET", "/", agent, 200, "\n<auth id=\"main\">"},
		{"GET", "/", []string{"X-Transcend-Version", "1"}, 200, "\n<auth id=\"main\">"},
		{"GET", "/staff", agent, 200, "\n<auth id=\"main\">"},
		{"GET", "/elsewhere", nil, 404, ""},
		{"GET", "/a/b", agent, 404, ""},
		{"GET", "/favicon.ico", nil, 404, ""},
		{"GET", "/1/Linux_64", agent, 200, ""},
		{"GET", "/+CSCOT+/translation-table", agent, 200, ""},
		{"GET", "/1/VPNManifest.xml", agent, 200, "<vpn rev=\"1.0\">"},
		{"HEAD", "/", nil, 200, ""},
		{"PUT", "/", nil, 405, ""},
		{"CONNECT", "/CSCOSSLC/tunnel", agent, 401, ""},
		{"CONNECT", "/elsewhere", agent, 404, ""},
		{"POST", "/logout", agent, 200, "Signed out."},
		{"GET", "/logout", agent, 200, "Signed out."},
	} {
		w := ask(h, tt.method, tt.path, "", tt.header...)
		if w.Code != tt.status || !strings.Contains(w.Body.String(), tt.holds) {
			t.Errorf("%s %s: %d, want %d and %q:\n%s", tt.method, tt.path, w.Code, tt.status, tt.holds, w.Body)
		}
		if w.Header().Get("Cache-Control") != "no-store" {
			t.Errorf("%s %s may be cached", tt.method, tt.path)
		}
	}
	// A proxy is asked so. It is none.
	w := httptest.NewRecorder()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader("CONNECT mail.example:25 HTTP/1.1\r\nHost: mail.example:25\r\n\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	if h.ServeHTTP(w, r); w.Code != 404 {
		t.Errorf("as a proxy: %d", w.Code)
	}
}

func TestLogoutPaths(t *testing.T) {
	for _, tt := range []struct{ method, path, body string }{
		{"GET", "/logout", ""},
		{"GET", "/+webvpn+/webvpn_logout.html", ""},
		{"POST", "/", `<config-auth client="vpn" type="logout"><session-token/></config-auth>`},
	} {
		g := newGate()
		cookie := g.admit("alice").Cookie
		w := ask(newHandler(g), tt.method, tt.path, tt.body, "Cookie", "webvpncontext=x; webvpn="+cookie)
		if w.Code != 200 || g.user(cookie) != "" {
			t.Errorf("%s %s: %d, the session is %q's", tt.method, tt.path, w.Code, g.user(cookie))
		}
	}
}

func TestBadDecisions(t *testing.T) {
	for name, d := range map[string]Decision{
		"a cookie that clients cut":  {Cookie: "abc="},
		"a cookie that breaks lines": {Cookie: "abc\r\nX: y"},
		"too much state":             {Ask: &Ask{Username: true, State: make([]byte, maxState+1)}},
	} {
		h := newHandler(newGate())
		h.Authenticator = fixed{d, nil}
		if w := ask(h, "POST", "/", initDocument); w.Code != 503 || w.Header().Get("X-Reason") == "" || len(w.Result().Cookies()) != 0 {
			t.Errorf("%s: %d %v", name, w.Code, w.Header())
		}
	}
	h := newHandler(newGate())
	h.Authenticator = fixed{Decision{}, nil}
	if w := ask(h, "POST", "/", initDocument); !strings.Contains(w.Body.String(), "Access denied.") {
		t.Errorf("no decision is no denial: %s", w.Body)
	}
	h.Authenticator = fixed{Decision{Cookie: "abc"}, errors.New("secret detail")}
	if w := ask(h, "POST", "/", initDocument); w.Code != 503 || strings.Contains(w.Body.String(), "secret") || len(w.Result().Cookies()) != 0 {
		t.Errorf("an error: %d %s", w.Code, w.Body)
	}
}

// fixed is an Authenticator of one opinion.
type fixed struct {
	d   Decision
	err error
}

func (f fixed) Begin(context.Context, *Client, string) (Decision, error) { return f.d, f.err }
func (f fixed) Answer(context.Context, *Client, *Answers) (Decision, error) {
	return f.d, f.err
}

// TestSlowHeaders: who does not finish his headers is hung up on.
func TestSlowHeaders(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	if s.http.ReadHeaderTimeout == 0 || s.http.ReadTimeout == 0 || s.http.WriteTimeout == 0 || s.http.IdleTimeout == 0 || s.http.MaxHeaderBytes == 0 {
		t.Errorf("a server without bounds: %+v", s.http)
	}
	quick := NewServer(newHandler(g), s.http.TLSConfig)
	quick.ReadHeaderTimeout = 100 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		quick.ServeTLS(l, "", "")
	}()
	defer func() {
		quick.Close()
		<-done
	}()
	conn, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("speaks %q", got)
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, io.EOF) {
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Error("the server waits for ever")
		}
	}

	// And who sends too many of them.
	conn, err = tls.Dial("tcp", s.addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	go conn.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\nHost: x\r\nX-Long: "+strings.Repeat("x", 8<<10)), 8))
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || answer.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("long headers: %v, %v", answer, err)
	}
}

// slow is an Authenticator that takes its time.
type slow struct {
	fixed
	ended chan error
}

func (s slow) Begin(ctx context.Context, c *Client, group string) (Decision, error) {
	select {
	case <-ctx.Done():
	case <-time.After(400 * time.Millisecond):
	}
	s.ended <- ctx.Err()
	return s.fixed.Begin(ctx, c, group)
}

// TestAuthenticatorHasTime: the limit on reading a request is none on judging it.
func TestAuthenticatorHasTime(t *testing.T) {
	ended := make(chan error, 1)
	s := serve(t, newGate(), "127.0.0.1:0", func(h *Handler, _ *tls.Config) {
		h.Authenticator = slow{fixed{Decision{Cookie: "abc"}, nil}, ended}
	}, func(s *http.Server) { s.ReadTimeout = 150 * time.Millisecond })
	login, err := SignIn(bounded(t), s.options())
	if err != nil || login.Cookie != "abc" {
		t.Errorf("%+v, %v", login, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("its context: %v", err)
	}
}
