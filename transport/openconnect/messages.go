package openconnect

import (
	"strings"
)

// Types of config-auth documents.
const (
	typeInit     = "init"         // client: here I am
	typeRequest  = "auth-request" // server: fill this in
	typeReply    = "auth-reply"   // client: filled in
	typeComplete = "complete"     // server: you are in
	typeLogout   = "logout"       // client: the session ends
)

// Sizes of documents, of the texts in them and of forms.
const (
	maxClientDocument = 16 << 10
	maxServerDocument = 256 << 10
	maxAnswer         = 4 << 10
	maxShown          = 16 << 10
	maxFields         = 32
	maxOptions        = 512
	maxOpaque         = 8
)

// answer is a field of a form, filled in.
type answer struct{ name, value string }

// clientMessage is a document that a client sends.
type clientMessage struct {
	kind        string // init, auth-reply, logout
	version     string // the client's
	device      Device
	groupAccess string // the server's URL, in init
	groupSelect string
	certFail    bool // the client has no certificate, or none that was accepted
	answers     []answer
	opaque      []*node // of the server's last document
}

// parseClientMessage reads a document of a client.
func parseClientMessage(document []byte) (*clientMessage, error) {
	root, err := parseXML(document, maxClientDocument)
	if err != nil {
		return nil, err
	}
	if root.name != "config-auth" {
		return nil, malformed("<%.64s>: expected <config-auth>", root.name)
	}
	m := &clientMessage{kind: root.attr("type")}
	switch m.kind {
	case typeInit, typeReply, typeLogout:
	default:
		return nil, malformed("a client's document of type %.64q", m.kind)
	}
	for _, n := range root.children {
		switch n.name {
		case "version":
			m.version = cut(n.content())
		case "device-id":
			m.device = Device{
				Platform:        cut(n.content()),
				PlatformVersion: cut(n.attr("platform-version")),
				Type:            cut(n.attr("device-type")),
				UniqueID:        cut(n.attr("unique-id")),
			}
		case "group-access":
			m.groupAccess = cut(n.content())
		case "group-select":
			m.groupSelect = cut(n.content())
		case "client-cert-fail":
			m.certFail = true
		case "opaque":
			if m.opaque = append(m.opaque, n); len(m.opaque) > maxOpaque {
				return nil, errTooBig
			}
		case "auth":
			for _, f := range n.children {
				if f.name == "" {
					continue
				}
				value := f.content()
				if len(value) > maxAnswer || len(m.answers) == maxFields {
					return nil, errTooBig
				}
				m.answers = append(m.answers, answer{f.name, value})
			}
		}
	}
	m.device.ClientVersion = m.version
	return m, nil
}

// document writes the message.
func (m *clientMessage) document() []byte {
	root := element("config-auth", "client", "vpn", "type", m.kind, "aggregate-auth-version", "2")
	root.addText("version", m.version, "who", "vpn")
	if d := m.device; d.Platform != "" {
		n := root.add("device-id").set(d.Platform)
		for _, a := range [][2]string{{"platform-version", d.PlatformVersion}, {"device-type", d.Type}, {"unique-id", d.UniqueID}} {
			if a[1] != "" {
				n.attrs = append(n.attrs, element("", a[0], a[1]).attrs...)
			}
		}
	}
	root.children = append(root.children, m.opaque...)
	root.addText("group-access", m.groupAccess)
	if m.certFail {
		root.add("client-cert-fail")
	}
	if m.kind == typeReply {
		auth := root.add("auth")
		for _, a := range m.answers {
			auth.add(a.name).set(a.value)
		}
	}
	root.addText("group-select", m.groupSelect)
	return root.document()
}

// value is the answer of a name, the last of several.
func (m *clientMessage) value(name string) string {
	value := ""
	for _, a := range m.answers {
		if a.name == name {
			value = a.value
		}
	}
	return value
}

// serverMessage is a document that a server sends.
type serverMessage struct {
	kind        string // auth-request, complete; "" for the bare <auth> of old servers
	form        Form   // with ID, texts and fields; an ID of "success" ends the sign-in
	hasAuth     bool
	certRequest bool // the server wants a client certificate, in a new connection
	token       string
	opaque      []*node
}

// serverVersion is what <version who="sg"> says; ocserv's value, which clients know.
const serverVersion = "0.1(1)"

// parseServerMessage reads a document of a server.
func parseServerMessage(document []byte) (*serverMessage, error) {
	root, err := parseXML(document, maxServerDocument)
	if err != nil {
		return nil, err
	}
	m := &serverMessage{}
	switch root.name {
	case "config-auth":
		m.kind = root.attr("type")
	case "auth":
		root = &node{name: "config-auth", children: []*node{root}}
	default:
		return nil, malformed("<%.64s>: expected <config-auth>", root.name)
	}
	for _, n := range root.children {
		switch n.name {
		case "auth":
			m.hasAuth = true
			if err := parseAuth(n, &m.form); err != nil {
				return nil, err
			}
		case "error":
			m.form.Error = message(n)
		case "client-cert-request":
			m.certRequest = true
		case "session-token":
			if token := strings.TrimSpace(n.content()); validCookie(token) {
				m.token = token
			}
		case "opaque":
			if m.opaque = append(m.opaque, n); len(m.opaque) > maxOpaque {
				return nil, errTooBig
			}
		}
	}
	return m, nil
}

// parseAuth reads an <auth> element.
func parseAuth(auth *node, f *Form) error {
	f.ID = auth.attr("id")
	for _, n := range auth.children {
		switch n.name {
		case "title":
			f.Title = message(n)
		case "banner":
			f.Banner = message(n)
		case "message":
			f.Message = message(n)
		case "error":
			f.Error = message(n)
		case "form":
			if method := n.attr("method"); method != "" && !strings.EqualFold(method, "post") {
				return malformed("a form with method %.64q", method)
			}
			f.Action = n.attr("action")
			for _, field := range n.children {
				if err := parseField(field, f); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// parseField reads an <input> or a <select> of a form. Buttons, and what nobody
// knows, are skipped.
func parseField(n *node, f *Form) error {
	field := Field{Name: n.attr("name"), Label: printable(n.attr("label"), maxText), Value: n.attr("value")}
	switch {
	case n.name == "select":
		field.Kind, field.Value = FieldSelect, ""
		for _, o := range n.children {
			if o.name != "option" {
				continue
			}
			option := Option{Value: o.attr("value"), Label: printable(o.content(), maxText)}
			if option.Value == "" {
				option.Value = o.content()
			}
			if len(option.Value) > maxAnswer || len(field.Options) == maxOptions {
				return errTooBig
			}
			if strings.EqualFold(o.attr("selected"), "true") {
				field.Value = option.Value
			}
			field.Options = append(field.Options, option)
		}
		if len(field.Options) == 0 {
			return nil // as openconnect does
		}
	case n.name != "input":
		return nil
	case n.attr("type") == "text":
		field.Kind = FieldText
	case n.attr("type") == "password":
		field.Kind = FieldPassword
	case n.attr("type") == "hidden":
		field.Kind = FieldHidden
	default:
		return nil
	}
	if !xmlName(field.Name) {
		return malformed("a form's field called %.64q", field.Name)
	}
	if len(field.Value) > maxAnswer || len(f.Fields) == maxFields {
		return errTooBig
	}
	f.Fields = append(f.Fields, field)
	return nil
}

// message is a text for people. Its %s stand for param1 and param2.
func message(n *node) string {
	text := n.content()
	for _, name := range []string{"param1", "param2"} {
		if param := n.attr(name); param != "" {
			text = strings.Replace(text, "%s", param, 1)
		}
	}
	return printable(text, maxShown)
}

// document writes the message, as a bare <auth> when it has no kind.
func (m *serverMessage) document() []byte {
	root := element("config-auth", "client", "vpn", "type", m.kind, "aggregate-auth-version", "2")
	root.add("version", "who", "sg").set(serverVersion)
	root.children = append(root.children, m.opaque...)
	if m.certRequest {
		root.add("client-cert-request")
	}
	root.addText("session-token", m.token)
	if !m.hasAuth {
		root.addText("error", m.form.Error)
		return root.document()
	}
	f := &m.form
	auth := root.add("auth", "id", f.ID)
	auth.addText("title", f.Title)
	auth.addText("banner", f.Banner)
	auth.addText("message", f.Message)
	auth.addText("error", f.Error)
	if f.Action != "" || len(f.Fields) > 0 {
		form := auth.add("form", "method", "post", "action", f.Action)
		for i := range f.Fields {
			f.Fields[i].appendTo(form)
		}
	}
	if m.kind == "" {
		return auth.document()
	}
	return root.document()
}

// appendTo adds the field to a <form>.
func (f *Field) appendTo(form *node) {
	switch f.Kind {
	case FieldSelect:
		list := form.add("select", "name", f.Name, "label", f.Label)
		for _, o := range f.Options {
			option := list.add("option", "value", o.Value)
			if o.Value == f.Value {
				option.attrs = append(option.attrs, element("", "selected", "true").attrs...)
			}
			option.set(o.Label)
		}
	case FieldHidden:
		form.add("input", "type", "hidden", "name", f.Name, "value", f.Value)
	case FieldPassword:
		form.add("input", "type", "password", "name", f.Name, "label", f.Label)
	default:
		form.add("input", "type", "text", "name", f.Name, "label", f.Label)
	}
}
