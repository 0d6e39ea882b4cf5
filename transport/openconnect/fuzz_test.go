package openconnect

import (
	"bufio"
	"bytes"
	"net/http"
	"net/textproto"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// The seeds are what openconnect 9.01 and ocserv 1.1.6 send, and what hostile peers might.

const (
	stockReply = `<?xml version="1.0" encoding="UTF-8"?>
<config-auth client="vpn" type="auth-reply" aggregate-auth-version="2"><version who="vpn">v9.01-3</version><device-id platform-version="13" device-type="x" unique-id="1">android</device-id><opaque is-for="sg"><a:b xmlns:a="x" c="&lt;&quot;">d<!-- e --> &amp; f<g/></a:b></opaque><auth><username>alice</username><password> open &lt;sesame&gt; &amp; "more" é</password></auth><group-select>staff</group-select></config-auth>`

	stockForm = `<?xml version="1.0" encoding="UTF-8"?>
<config-auth client="vpn" type="auth-request">
<version who="sg">0.1(1)</version>
<auth id="main">
<banner>Hello</banner><message>Login failed.
Please enter your username.</message>
<form method="post" action="/auth">
<input type="text" name="username" label="Username:" />
<select name="group_list" label="Group:">
<option value="staff">staff</option>
<option selected="true">Operators</option>
</select>
<input type="hidden" name="h" value="1"/><input type="submit" name="Login" value="Login"/>
</form></auth>
</config-auth>`

	stockComplete = `<?xml version="1.0" encoding="UTF-8"?>
<config-auth client="vpn" type="complete">
<version who="sg">0.1(1)</version>
<auth id="success">
<title>SSL VPN Service</title></auth><session-token>abc</session-token></config-auth>`

	bareAuth = `<auth id="main"><error param1="A" param2="B">%s and %s and %s</error><form><input type="password" name="answer" label="Code:"/></form></auth>`
)

// clean text has nothing that a terminal must not see.
func checkShown(t *testing.T, texts ...string) {
	t.Helper()
	for _, s := range texts {
		if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool {
			return r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0
		}) {
			t.Errorf("shown to people: %q", s)
		}
	}
}

// FuzzClientMessage: what parses is written so that it parses to the same, within bounds.
func FuzzClientMessage(f *testing.F) {
	for _, seed := range []string{initDocument, stockReply, "\uFEFF" + initDocument,
		`<config-auth type="logout"/>`, `<!DOCTYPE a []><config-auth type="init"/>`, strings.Repeat("<a>", 100)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		m, err := parseClientMessage(document)
		if err != nil {
			return
		}
		d := m.device
		checkShown(t, m.version, d.Platform, d.PlatformVersion, d.Type, d.UniqueID, m.groupAccess, m.groupSelect)
		if len(m.answers) > maxFields || len(m.opaque) > maxOpaque {
			t.Fatalf("%d answers, %d opaque", len(m.answers), len(m.opaque))
		}
		for _, a := range m.answers {
			if len(a.value) > maxAnswer {
				t.Fatalf("an answer of %d bytes", len(a.value))
			}
		}
		again, err := parseClientMessage(m.document())
		if err != nil && len(m.document()) <= maxClientDocument {
			t.Fatalf("%v in\n%s", err, m.document())
		}
		if err == nil {
			sameClientMessage(t, m, again)
		}
	})
}

// sameClientMessage compares what travels: an init has no answers, and a device without a
// platform is not written.
func sameClientMessage(t *testing.T, m, again *clientMessage) {
	t.Helper()
	if m.kind != typeReply {
		m.answers = nil
	}
	if m.device.Platform == "" {
		m.device = Device{ClientVersion: m.version}
	}
	if !bytes.Equal(dump(m.opaque), dump(again.opaque)) {
		t.Fatalf("opaque %s, then %s", dump(m.opaque), dump(again.opaque))
	}
	m.opaque, again.opaque = nil, nil
	if !reflect.DeepEqual(m, again) {
		t.Fatalf("%+v, then %+v", m, again)
	}
}

func dump(nodes []*node) []byte {
	var b bytes.Buffer
	for _, n := range nodes {
		n.appendXML(&b)
	}
	return b.Bytes()
}

// FuzzServerMessage: the same for what a client reads.
func FuzzServerMessage(f *testing.F) {
	for _, seed := range []string{stockForm, stockComplete, bareAuth, `<config-auth><client-cert-request/><error>no</error></config-auth>`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		m, err := parseServerMessage(document)
		if err != nil {
			return
		}
		form := &m.form
		checkShown(t, form.Title, form.Banner, form.Message, form.Error)
		if len(form.Fields) > maxFields {
			t.Fatalf("%d fields", len(form.Fields))
		}
		for _, field := range form.Fields {
			if checkShown(t, field.Label); !xmlName(field.Name) || len(field.Options) > maxOptions {
				t.Fatalf("field %q with %d options", field.Name, len(field.Options))
			}
		}
		if m.token != "" && !validCookie(m.token) {
			t.Fatalf("a cookie %q", m.token)
		}
		if m.hasAuth && m.kind == "" {
			m.certRequest, m.token, m.opaque = false, "", nil // only <auth> is written
		}
		again, err := parseServerMessage(m.document())
		if err != nil {
			t.Fatalf("%v in\n%s", err, m.document())
		}
		if got, want := again.document(), m.document(); !bytes.Equal(got, want) {
			t.Fatalf("\n%s, then\n%s", want, got)
		}
	})
}

// FuzzSettings: headers that parse are written so that they parse to the same.
func FuzzSettings(f *testing.F) {
	f.Add(fullSettings().AppendTo(nil))
	f.Add([]byte("X-CSTP-Address: fd00::1\r\nX-CSTP-Netmask: fd00::/64\r\nX-CSTP-MTU: 1472\r\nX-CSTP-Banner: 50%21%\r\n"))
	f.Add([]byte("X-CSTP-Split-Include: 10.1.2.3/255.255.255.0\r\nX-CSTP-Split-Include: ::ffff:1.2.3.4/96\r\n"))
	f.Fuzz(func(t *testing.T, block []byte) {
		h, err := textproto.NewReader(bufio.NewReader(bytes.NewReader(append(block, "\r\n\r\n"...)))).ReadMIMEHeader()
		if err != nil {
			return
		}
		s, err := ParseSettings(http.Header(h))
		if err != nil {
			return
		}
		again, err := ParseSettings(headerOf(t, s.AppendTo(nil)))
		if err != nil {
			t.Fatalf("%v in\n%s", err, s.AppendTo(nil))
		}
		if s.DTLSPort == 0 {
			s.DTLS = Timers{}
		}
		if !reflect.DeepEqual(s, again) {
			t.Fatalf("%+v, then\n%+v in\n%s", s, again, s.AppendTo(nil))
		}
	})
}

// FuzzConnectRequest: the same for a client's CONNECT, as net/http reads it.
func FuzzConnectRequest(f *testing.F) {
	f.Add([]byte("Host: vpn.example:4443\r\nUser-Agent: Open AnyConnect VPN Agent v9.01-3\r\nCookie: webvpn=abc\r\nX-CSTP-Version: 1\r\n" +
		"X-CSTP-Hostname: laptop\r\nX-CSTP-Accept-Encoding: oc-lz4,lzs\r\nX-CSTP-Base-MTU: 1500\r\nX-CSTP-MTU: 1434\r\nX-CSTP-Address-Type: IPv6,IPv4\r\n" +
		"X-CSTP-Address: 10.0.0.1\r\nX-CSTP-Full-IPv6-Capability: true\r\nX-CSTP-Address: fd00::1\r\nX-DTLS-Master-Secret: 00\r\n" +
		"X-DTLS-CipherSuite: PSK-NEGOTIATE:OC-DTLS1_2-AES256-GCM\r\nX-DTLS12-CipherSuite: AES256-GCM-SHA384\r\n"))
	f.Add([]byte("Host: a\r\nCookie: a=b; webvpn=; webvpn=c; webvpn=d e\r\nX-CSTP-Hostname: $(reboot)\r\n"))
	f.Fuzz(func(t *testing.T, head []byte) {
		read := func(head []byte) (*ConnectRequest, error) {
			r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
			if err != nil {
				return nil, err
			}
			return ParseConnectRequest(r)
		}
		c, err := read(append([]byte("CONNECT /CSCOSSLC/tunnel HTTP/1.1\r\n"), append(head, "\r\n\r\n"...)...))
		if err != nil {
			return
		}
		checkShown(t, c.UserAgent, c.Hostname, c.Device.Platform, c.Device.Type)
		if c.Hostname != hostname(c.Hostname) || c.Cookie != "" && !validCookie(c.Cookie) || len(c.CipherSuites) > maxSuites {
			t.Fatalf("%+v", c)
		}
		// Without these there is nothing that could be written.
		if c.Cookie == "" || c.Host == "" || clean(c.Host) != c.Host || !c.IPv4 && !c.IPv6 {
			return
		}
		again, err := read(c.AppendTo(nil))
		if err != nil {
			t.Fatalf("%v in\n%s", err, c.AppendTo(nil))
		}
		c.MasterSecret = false // never sent
		if !reflect.DeepEqual(c, again) {
			t.Fatalf("%+v, then\n%+v", c, again)
		}
	})
}

// FuzzForm: a form's body ends within bounds, and its fields are those that net/url reads.
func FuzzForm(f *testing.F) {
	f.Add([]byte("username=alice&password=open%20%3Csesame%3E+more&group_list=staff"))
	f.Add([]byte("group%5flist=a&group_list=b&=c&&d"))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := parseForm(body)
		if err != nil {
			return
		}
		checkShown(t, m.groupSelect)
		if len(m.answers) > maxFields || m.kind != typeReply {
			t.Fatalf("%+v", m)
		}
		for _, a := range m.answers {
			if a.name == "" || a.name == fieldGroup || len(a.value) > maxAnswer || m.value(a.name) != a.value {
				t.Fatalf("%+v", m)
			}
		}
	})
}

// FuzzCookie: whatever a client sends as cookies, no state but ours opens, and ours does.
func FuzzCookie(f *testing.F) {
	var s sealer
	s.init([]byte("0123456789abcdef"))
	now := time.Unix(1_800_000_000, 0)
	f.Add("webvpncontext=AAAA; webvpn=abc", []byte("state"), int64(10))
	f.Add("webvpn=\"abc\"; webvpn", []byte{}, int64(-10))
	f.Fuzz(func(t *testing.T, line string, state []byte, life int64) {
		h := http.Header{"Cookie": {line}}
		for _, name := range []string{cookieName, contextName} {
			value := cookieOf(h, name)
			if value != "" && (!validCookie(value) || !strings.Contains(line, name+"="+value)) {
				t.Fatalf("%q of %q", value, line)
			}
			if _, _, err := s.open(now, value); err == nil {
				t.Fatalf("%q opens", value)
			}
		}
		if len(state) > maxState {
			return
		}
		life %= 1 << 30
		sealed := s.seal(now.Add(time.Duration(life)*time.Second), askedFactor, state)
		if !plainCookie(sealed) {
			t.Fatalf("a cookie %q", sealed)
		}
		h.Set("Cookie", contextName+"="+sealed)
		asked, got, err := s.open(now, cookieOf(h, contextName))
		if fresh := life > 0; (err == nil) != fresh || fresh && (asked != askedFactor || !bytes.Equal(got, state)) {
			t.Fatalf("%d s: %v, %x, want %x", life, err, got, state)
		}
	})
}

// TestSeeds keeps the seeds what they are said to be.
func TestSeeds(t *testing.T) {
	m, err := parseClientMessage([]byte(stockReply))
	if err != nil || m.value("password") != ` open <sesame> & "more" é` || m.groupSelect != "staff" || m.device.Platform != "android" ||
		string(dump(m.opaque)) != `<opaque is-for="sg"><a:b xmlns:a="x" c="&lt;&#34;">d &amp; f<g/></a:b></opaque>` {
		t.Errorf("%v %+v %s", err, m, dump(m.opaque))
	}
	s, err := parseServerMessage([]byte(stockForm))
	want := Form{ID: "main", Banner: "Hello", Message: "Login failed.\nPlease enter your username.", Action: "/auth", Fields: []Field{
		{Kind: FieldText, Name: "username", Label: "Username:"},
		{Kind: FieldSelect, Name: "group_list", Label: "Group:", Value: "Operators", Options: []Option{{"staff", "staff"}, {"Operators", "Operators"}}},
		{Kind: FieldHidden, Name: "h", Value: "1"},
	}}
	if err != nil || !reflect.DeepEqual(s.form, want) || s.kind != typeRequest {
		t.Errorf("%v %+v", err, s)
	}
	if s, err = parseServerMessage([]byte(stockComplete)); err != nil || s.form.ID != "success" || s.token != "abc" || s.kind != typeComplete {
		t.Errorf("%v %+v", err, s)
	}
	if s, err = parseServerMessage([]byte(bareAuth)); err != nil || s.form.Error != "A and B and %s" || len(s.form.Fields) != 1 {
		t.Errorf("%v %+v", err, s)
	}
}
