package openconnect

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Names of fields in forms. openconnect answers "answer" as <password> in XML, and
// makes a TOTP code by itself for a form called challenge, or for a field called
// secondary_password.
const (
	fieldUsername = "username"
	fieldPassword = "password"
	fieldGroup    = "group_list"
	fieldFactor   = "answer"
	fieldFactor2  = "secondary_password" // beside a password
)

// formPath is where forms go. The group of a URL is not in it: it is in the state.
const formPath = "/auth"

// dialect is how a client speaks: XML documents, or forms as browsers send them, with
// bare <auth> documents in answer.
type dialect bool

const (
	speaksXML  dialect = true
	speaksForm dialect = false
)

// begin answers the start of a sign-in.
func (h *Handler) begin(w http.ResponseWriter, r *http.Request, c *Client, group, note string, d dialect) {
	if group == "" {
		group = groupOfPath(r.URL.Path)
	}
	decision, err := h.Authenticator.Begin(r.Context(), c, group)
	if err == nil && decision.Ask != nil && note != "" && decision.Ask.Error == "" {
		ask := *decision.Ask
		ask.Error = note
		decision.Ask = &ask
	}
	h.decide(w, r, decision, err, d)
}

// groupOfPath takes https://HOST/GROUP for a choice of group, as stock servers do.
func groupOfPath(path string) string {
	name := strings.Trim(path, "/")
	if strings.Contains(name, "/") || "/"+name == formPath || name == "VPN" || len(name) > maxText {
		return ""
	}
	return printable(name, maxText)
}

// answer reads the answers to a form and has them judged.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, c *Client, m *clientMessage, d dialect) {
	asked, state, err := h.seal.open(time.Now(), cookieOf(r.Header, contextName))
	if err != nil {
		h.begin(w, r, c, m.groupSelect, "The sign-in has taken too long. Please start again.", d)
		return
	}
	a := &Answers{State: state}
	if asked&askedUsername != 0 {
		a.Username = m.value(fieldUsername)
	}
	if asked&askedPassword != 0 {
		a.Password = m.value(fieldPassword)
	}
	if asked&askedGroup != 0 {
		a.Group = m.groupSelect
	}
	if asked&askedFactor != 0 {
		a.Factor = m.value(fieldFactor2)
		if asked&askedPassword == 0 {
			a.Factor = m.value(fieldPassword)
			if a.Factor == "" {
				a.Factor = m.value(fieldFactor)
			}
		}
	}
	decision, err := h.Authenticator.Answer(r.Context(), c, a)
	h.decide(w, r, decision, err, d)
}

// decide tells a client what was decided.
func (h *Handler) decide(w http.ResponseWriter, r *http.Request, decision Decision, err error, d dialect) {
	if err == nil && decision.Cookie != "" && !plainCookie(decision.Cookie) {
		err = errors.New("the session cookie has characters that clients do not carry")
	}
	if err == nil && decision.Cookie == "" && decision.Ask != nil && len(decision.Ask.State) > maxState {
		err = errors.New("the state of the sign-in is too long for a cookie")
	}
	if err != nil {
		h.log().Error("sign-in: no decision", "remote", r.RemoteAddr, "err", err)
		h.unavailable(w, "")
		return
	}
	m := &serverMessage{kind: typeRequest, hasAuth: true}
	switch {
	case decision.Cookie != "":
		m.kind = typeComplete
		m.form = Form{ID: "success", Title: h.title(), Message: "Signed in."}
		setCookie(w, contextName, "", -1)
		setCookie(w, cookieName, decision.Cookie, 0)
	case decision.Ask != nil:
		form, asked := decision.Ask.form(h.title())
		m.form = form
		life := h.signInTime()
		setCookie(w, contextName, h.seal.seal(time.Now().Add(life), asked, decision.Ask.State), int(life/time.Second))
	default:
		reason := decision.Denied
		if reason == "" {
			reason = "Access denied."
		}
		// Not a 401: openconnect would show that as "unexpected result", and try the
		// old dialect. An <auth> without a form ends its sign-in with the error shown.
		m.form = Form{ID: "main", Title: h.title(), Error: reason}
		setCookie(w, contextName, "", -1)
	}
	if d == speaksForm {
		m.kind = ""
	}
	writeBody(w, http.StatusOK, "text/xml; charset=utf-8", m.document())
}

// form is what an Ask looks like on the wire.
func (a *Ask) form(title string) (f Form, asked byte) {
	f = Form{ID: "main", Title: title, Banner: a.Banner, Message: a.Message, Error: a.Error, Action: formPath}
	if f.Message == "" {
		f.Message = "Please sign in."
	}
	if len(a.Groups) > 1 {
		asked |= askedGroup
		field := Field{Kind: FieldSelect, Name: fieldGroup, Label: "Group:", Value: a.Group}
		for _, g := range a.Groups {
			label := g.Label
			if label == "" {
				label = g.Name
			}
			option := Option{Value: g.Name, Label: label}
			if g.Name == a.Group {
				// Several clients take the first for the one that is offered.
				field.Options = append([]Option{option}, field.Options...)
			} else {
				field.Options = append(field.Options, option)
			}
		}
		f.Fields = append(f.Fields, field)
	}
	if a.Username {
		asked |= askedUsername
		f.Fields = append(f.Fields, Field{Kind: FieldText, Name: fieldUsername, Label: "Username:"})
	}
	if a.Password {
		asked |= askedPassword
		f.Fields = append(f.Fields, Field{Kind: FieldPassword, Name: fieldPassword, Label: "Password:"})
	}
	if a.Factor != "" {
		asked |= askedFactor
		name := fieldFactor2
		if !a.Password {
			f.ID, name = "challenge", fieldFactor
		}
		f.Fields = append(f.Fields, Field{Kind: FieldPassword, Name: name, Label: a.Factor})
	}
	return f, asked
}

// errBadBody is a body that is neither a document nor a form.
var errBadBody = errors.New("malformed: neither a config-auth document nor a form")

// readMessage reads the body of a POST in whatever dialect it is.
func readMessage(w http.ResponseWriter, r *http.Request) (*clientMessage, dialect, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxClientDocument))
	if err != nil {
		if _, big := errors.AsType[*http.MaxBytesError](err); big {
			err = errTooBig
		}
		return nil, speaksXML, err
	}
	// Some clients label their XML as a form.
	if bytes.HasPrefix(bytes.TrimLeft(body, "\uFEFF \t\r\n"), []byte("<")) {
		m, err := parseClientMessage(body)
		return m, speaksXML, err
	}
	m, err := parseForm(body)
	return m, speaksForm, err
}

// parseForm reads an url-encoded body.
func parseForm(body []byte) (*clientMessage, error) {
	if bytes.Count(body, []byte("&")) >= maxFields {
		return nil, errTooBig
	}
	values, err := url.ParseQuery(string(bytes.TrimSpace(body)))
	if err != nil {
		return nil, errBadBody
	}
	m := &clientMessage{kind: typeReply}
	for name, value := range values {
		last := value[len(value)-1]
		switch {
		case len(name) > maxText || len(last) > maxAnswer:
			return nil, errTooBig
		case name == fieldGroup:
			m.groupSelect = cut(last)
		case name != "":
			m.answers = append(m.answers, answer{name, last})
		}
	}
	return m, nil
}

// setCookie sets a cookie as stock clients read it; a negative age removes it.
func setCookie(w http.ResponseWriter, name, value string, age int) {
	line := name + "=" + value + "; path=/; Secure; HttpOnly"
	switch {
	case age < 0:
		line = name + "=; expires=Thu, 01 Jan 1970 00:00:00 GMT; path=/; Secure; HttpOnly"
	case age > 0:
		line += "; Max-Age=" + strconv.Itoa(age)
	}
	w.Header().Add("Set-Cookie", line)
}

// writeBody answers with a body of known length: old clients cannot read chunks.
func writeBody(w http.ResponseWriter, status int, kind string, body []byte) {
	header := w.Header()
	header.Set("Content-Type", kind)
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body) // a client that has gone is the server's to notice
}
