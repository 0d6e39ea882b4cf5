package openconnect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Bounds on a sign-in as a whole: no server has a reason for more.
const (
	maxRounds    = 24
	maxRedirects = 5
	maxCookies   = 32
	defaultTries = 3
	padding      = 64
)

// SignIn signs in to a server and returns what Connect needs. It asks o.Prompt for every
// field of every form, in their order. Errors: what Prompt returned; *DeniedError;
// *CertificateError; *UnavailableError; *StatusError; those of the network.
func SignIn(ctx context.Context, o Options) (*Login, error) {
	if o.Pin != "" {
		if err := CheckPin(o.Pin); err != nil {
			return nil, err
		}
	}
	base, err := parseServer(o.Server)
	if err != nil {
		return nil, err
	}
	if o.Tries <= 0 {
		o.Tries = defaultTries
	}
	if o.exchangeTime == 0 {
		o.exchangeTime = dialTime + responseTime
	}
	s := &signIn{o: &o, url: base, cookies: make(map[string]string), asked: make(map[string]int)}
	transport := &http.Transport{
		DialTLSContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			r, err := o.reach(ctx, address, o.Pin)
			if err != nil {
				return nil, err
			}
			s.pins.Store(address, r.pin)
			return r.conn, nil
		},
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
		ResponseHeaderTimeout:  responseTime,
		// A POST is not repeated on a connection that the server has closed in the
		// meantime: people are slow, so each takes a new one.
		IdleConnTimeout: 5 * time.Second,
	}
	defer transport.CloseIdleConnections()
	s.http = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	login, err := s.run(ctx)
	if err != nil {
		// http.Client wraps errors into a sentence about its request.
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = ctxError(ctx, wrapped.Err)
		}
		return nil, err
	}
	return login, nil
}

// parseServer reads HOST, HOST:PORT, or an URL of scheme https.
func parseServer(server string) (*url.URL, error) {
	if !strings.Contains(server, "://") {
		server = "https://" + server
	}
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
		return nil, malformed("server %.128q: expected https://HOST[:PORT][/GROUP]", server)
	}
	u.RawQuery, u.Fragment = "", ""
	if u.Path == "" {
		u.Path = "/"
	}
	return u, nil
}

// hostPortOf is the host of an URL with its port.
func hostPortOf(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// HostPort is where a server is, HOST:PORT, as a [Login] says it: of https://HOST[:PORT][/GROUP], or just the host.
func HostPort(server string) (string, error) {
	u, err := parseServer(server)
	if err != nil {
		return "", err
	}
	return hostPortOf(u), nil
}

// signIn is one under way.
type signIn struct {
	o       *Options
	http    *http.Client
	url     *url.URL // where the next document goes
	at      string   // HOST:PORT that the last one went to, as it was dialled: international names in ASCII
	cookies map[string]string
	pins    pinMap
	group   string         // announced in init
	ofURL   string         // the group that the server's URL names, if it is one
	opaque  []*node        // of the last document
	asked   map[string]int // how often each form was
	noCert  bool           // we have said that there is no certificate
	banner  string
}

// run exchanges documents until there is a cookie or a reason why not.
func (s *signIn) run(ctx context.Context) (*Login, error) {
	s.group, s.ofURL = s.o.Group, groupOfPath(s.url.Path)
	next := s.initial()
	for range maxRounds {
		m, err := s.exchange(ctx, next)
		if err != nil {
			return nil, err
		}
		s.opaque = m.opaque
		if m.form.Banner != "" {
			s.banner = m.form.Banner
		}
		if m.form.ID == "success" || m.kind == typeComplete {
			return s.complete(m)
		}
		if m.certRequest && len(m.form.Fields) == 0 {
			if s.noCert {
				return nil, &DeniedError{Reason: firstOf(m.form.Error, "the server wants a client certificate")}
			}
			s.noCert = true
			next = s.initial()
			continue
		}
		if len(m.form.Fields) == 0 {
			return nil, &DeniedError{Reason: firstOf(m.form.Error, m.form.Message)}
		}
		if next, err = s.fill(ctx, &m.form); err != nil {
			return nil, err
		}
	}
	return nil, malformed("the server does not stop asking")
}

// complete takes the cookie.
func (s *signIn) complete(m *serverMessage) (*Login, error) {
	cookie := firstOf(s.cookies[cookieName], m.token)
	if cookie == "" {
		return nil, malformed("the server says success, without a cookie")
	}
	return &Login{Host: s.at, Cookie: cookie, Pin: s.pins.load(s.at), Banner: s.banner}, nil
}

// message starts a document.
func (s *signIn) message(kind string) *clientMessage {
	device := s.o.device()
	return &clientMessage{kind: kind, version: device.ClientVersion, device: device}
}

// initial makes the document that starts a sign-in.
func (s *signIn) initial() *clientMessage {
	m := s.message(typeInit)
	m.groupAccess, m.groupSelect, m.certFail = s.url.String(), s.group, s.noCert
	return m
}

// exchange sends a document and returns the server's. Redirects of a start are
// followed; its cookies stay with a host.
func (s *signIn) exchange(ctx context.Context, m *clientMessage) (*serverMessage, error) {
	for range maxRedirects + 1 {
		response, body, err := s.post(ctx, m)
		if err != nil {
			return nil, err
		}
		location := response.Header.Get("Location")
		switch {
		case response.StatusCode == http.StatusOK:
			return parseServerMessage(body)
		case response.StatusCode == http.StatusUnauthorized || response.StatusCode == http.StatusForbidden:
			_, phrase, _ := strings.Cut(response.Status, " ")
			return nil, &DeniedError{Reason: printable(phrase, maxText)}
		case response.StatusCode == http.StatusServiceUnavailable:
			return nil, &UnavailableError{Reason: printable(response.Header.Get("X-Reason"), maxText)}
		case response.StatusCode/100 != 3 || location == "" || m.kind != typeInit:
			return nil, &StatusError{During: "sign-in", Status: printable(response.Status, maxText)}
		}
		to, err := s.url.Parse(location)
		if err != nil || to.Scheme != "https" || to.Hostname() == "" {
			return nil, malformed("a redirect to %.128q", location)
		}
		if hostPortOf(to) != hostPortOf(s.url) {
			clear(s.cookies)
			s.o.log().Info("sign-in: redirected", "from", s.url.Host, "to", to.Host)
		}
		to.User, to.Fragment = nil, ""
		s.url = to
		m = s.initial()
	}
	return nil, malformed("the server does not stop redirecting")
}

// post sends one document and reads the answer whole.
func (s *signIn) post(ctx context.Context, m *clientMessage) (*http.Response, []byte, error) {
	// Headers and body: a server that goes on without end is none.
	ctx, cancel := context.WithTimeout(ctx, s.o.exchangeTime)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GetConn: func(hostPort string) { s.at = hostPort }})
	document := m.document()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url.String(), bytes.NewReader(document))
	if err != nil {
		return nil, nil, err
	}
	h := request.Header
	h.Set("User-Agent", s.o.userAgent())
	h.Set("Accept", "*/*")
	h.Set("Accept-Encoding", "identity")
	h.Set("Content-Type", "application/xml; charset=utf-8")
	h.Set("X-Transcend-Version", "1")
	h.Set("X-Aggregate-Auth", "1")
	// The length of a password is nobody's business: requests grow in steps, as openconnect's.
	h.Set("X-Pad", strings.Repeat("0", padding-len(document)%padding))
	var pairs []string
	for name, value := range s.cookies {
		pairs = append(pairs, name+"="+value)
	}
	if slices.Sort(pairs); len(pairs) > 0 {
		h.Set("Cookie", strings.Join(pairs, "; "))
	}
	response, err := s.http.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxServerDocument+1))
	if err != nil {
		return nil, nil, fmt.Errorf("the answer of %s: %w", s.url.Host, err)
	}
	if len(body) > maxServerDocument {
		return nil, nil, errTooBig
	}
	for _, line := range response.Header.Values("Set-Cookie") {
		pair, _, _ := strings.Cut(line, ";")
		name, value, found := strings.Cut(strings.TrimSpace(pair), "=")
		switch {
		case !found || name == "" || strings.ContainsAny(name, " \t\r\n"):
		case !validCookie(value):
			delete(s.cookies, name) // empty: that is how a server removes one
		case len(s.cookies) < maxCookies || s.cookies[name] != "":
			s.cookies[name] = value
		}
	}
	return response, body, nil
}

// fill has a form filled in and makes the document with the answers.
func (s *signIn) fill(ctx context.Context, f *Form) (*clientMessage, error) {
	m := s.message(typeReply)
	m.opaque = s.opaque
	// ocserv puts "Login failed." on a line before what it asks, and asks for password and
	// code in forms that differ in nothing but that.
	signature := f.ID + "\x00" + f.Message[strings.LastIndexByte(f.Message, '\n')+1:]
	for _, field := range f.Fields {
		if field.Kind != FieldHidden {
			signature += "\x00" + field.Name + "\x00" + field.Label
		}
	}
	try := s.asked[signature]
	if try >= s.o.Tries {
		return nil, &DeniedError{Reason: firstOf(f.Error, f.Message)}
	}
	first := true
	for i := range f.Fields {
		field := &f.Fields[i]
		value, settled, err := s.settle(field)
		if err != nil {
			return nil, err
		}
		if !settled {
			if s.o.Prompt == nil {
				return nil, &DeniedError{Reason: "the server asks for " + firstOf(strings.TrimRight(field.Label, ": "), field.Name) + ", and nobody can be asked"}
			}
			value, err = s.o.Prompt(ctx, Question{Form: f, Field: field, First: first, Try: try})
			if err != nil {
				return nil, err
			}
			if len(value) > maxAnswer {
				return nil, fmt.Errorf("the answer to %q: %w", field.Label, errTooBig)
			}
			first = false
		}
		if field.Name == fieldGroup && field.Kind == FieldSelect {
			// Which fields there are may depend on the group: if it is not the one that the
			// form was made for, the server is told and asked again.
			if offered := firstOf(field.Value, field.Options[0].Value); value != offered && s.group != value {
				s.group = value
				return s.initial(), nil
			}
			m.groupSelect = value
			continue
		}
		m.answer(field.Name, value)
	}
	s.asked[signature]++
	to, err := s.url.Parse(firstOf(f.Action, "/"))
	if err != nil || to.Scheme != "https" || hostPortOf(to) != hostPortOf(s.url) {
		return nil, malformed("a form that goes to %.128q", f.Action)
	}
	s.url = to
	return m, nil
}

// answer adds a field, under the name that the protocol has for it in a reply.
func (m *clientMessage) answer(name, value string) {
	switch name {
	case "answer", "whichpin", "new_password":
		name = fieldPassword
	case "verify_pin", "verify_password":
		return
	}
	m.answers = append(m.answers, answer{name, value})
}

// settle answers the fields that need nobody's word.
func (s *signIn) settle(f *Field) (value string, settled bool, err error) {
	switch {
	case f.Kind == FieldHidden:
		return f.Value, true, nil
	case f.Kind != FieldSelect:
		return "", false, nil
	}
	group := s.o.Group
	if f.Name != fieldGroup {
		group = ""
	} else if group == "" {
		group = s.group // chosen before
	}
	var names []string
	for _, o := range f.Options {
		if group != "" && (o.Value == group || o.Label == group) {
			return o.Value, true, nil
		}
		if group == "" && f.Name == fieldGroup && s.ofURL != "" && o.Value == s.ofURL {
			return o.Value, true, nil
		}
		names = append(names, o.Value)
	}
	if group != "" {
		return "", false, fmt.Errorf("the server has no group %q; it offers %s", group, strings.Join(names, ", "))
	}
	return f.Options[0].Value, len(f.Options) == 1, nil
}

// firstOf is the first text that says something.
func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}
