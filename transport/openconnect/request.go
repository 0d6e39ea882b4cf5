package openconnect

import (
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// Names of cookies. The first is the session's; the second carries the state of a
// sign-in from one step to the next.
const (
	cookieName  = "webvpn"
	contextName = "webvpncontext"
)

// tunnelPath is what CONNECT names, in every implementation.
const tunnelPath = "/CSCOSSLC/tunnel"

// Device is what a client says of the machine it runs on. All of it is hearsay.
type Device struct {
	Platform        string // linux-64, win, mac-intel, android, apple-ios ...
	PlatformVersion string
	Type            string // model
	UniqueID        string
	ClientVersion   string
}

// ConnectRequest is a client's CONNECT: what it wants of a tunnel.
type ConnectRequest struct {
	Host      string // of the server, as the client calls it; with the port unless 443
	UserAgent string
	Cookie    string // the session's
	Hostname  string // the client's own name
	Device    Device

	// BaseMTU is what the client believes of the path to the server; MTU what it
	// would like inside. 0: not said.
	BaseMTU, MTU int

	IPv4, IPv6 bool // address types wanted
	FullIPv6   bool // understands X-CSTP-Address-IP6 and IPv6 routes
	// Addresses are those that the client had before it lost the connection.
	Addresses []netip.Addr

	// CipherSuites are the names in X-DTLS-CipherSuite, in the client's order;
	// PSKNegotiate among them offers an exported key. None: no DTLS.
	CipherSuites []string
	// CipherSuites12 and MasterSecret (present or not; its value is never looked
	// at) offer the legacy way.
	CipherSuites12 []string
	MasterSecret   bool

	CSTPEncodings, DTLSEncodings []string // compression offered
}

// Bounds on lists and texts in a request.
const (
	maxSuites = 32
	maxText   = 256
)

// PSK tells whether the client offers DTLS with a key exported from TLS.
func (c *ConnectRequest) PSK() bool {
	for _, suite := range append(c.CipherSuites[:len(c.CipherSuites):len(c.CipherSuites)], c.CipherSuites12...) {
		if suite == PSKNegotiate {
			return true
		}
	}
	return false
}

// ParseConnectRequest reads a CONNECT for the tunnel. What makes no sense is
// ignored where the tunnel does not depend on it, as every server does.
func ParseConnectRequest(r *http.Request) (*ConnectRequest, error) {
	if r.Method != http.MethodConnect || r.URL.Path != tunnelPath {
		return nil, malformed("%s %.64q: expected CONNECT %s", r.Method, r.URL.Path, tunnelPath)
	}
	h := reader{h: r.Header}
	c := &ConnectRequest{
		Host:      cut(r.Host),
		UserAgent: cut(h.text("User-Agent")),
		Cookie:    cookieOf(r.Header, cookieName),
		Hostname:  hostname(h.text("X-CSTP-Hostname")),
		Device:    deviceOf(r.Header),

		BaseMTU:      h.number("X-CSTP-Base-MTU", maxMTU),
		MTU:          h.number("X-CSTP-MTU", maxMTU),
		FullIPv6:     h.boolean("X-CSTP-Full-IPv6-Capability"),
		MasterSecret: h.raw("X-DTLS-Master-Secret") != "",

		CipherSuites:   list(h.text("X-DTLS-CipherSuite"), ":"),
		CipherSuites12: list(h.text("X-DTLS12-CipherSuite"), ":"),
		CSTPEncodings:  list(h.text("X-CSTP-Accept-Encoding"), ","),
		DTLSEncodings:  list(h.text("X-DTLS-Accept-Encoding"), ","),
	}
	types := h.text("X-CSTP-Address-Type")
	c.IPv4 = types == "" || strings.Contains(types, "IPv4")
	c.IPv6 = strings.Contains(types, "IPv6")
	for _, value := range h.all("X-CSTP-Address", 4) {
		if a, ok := parseAddr(value); ok {
			c.Addresses = append(c.Addresses, a)
		}
	}
	if h.err != nil {
		return nil, h.err
	}
	return c, nil
}

// AppendTo appends the request as it goes over the wire, with the empty line that
// ends it.
func (c *ConnectRequest) AppendTo(b []byte) []byte {
	w := lines(append(b, "CONNECT "+tunnelPath+" HTTP/1.1\r\n"...))
	w.add("Host", clean(c.Host))
	w.text("User-Agent", c.UserAgent)
	w.add("Cookie", cookieName+"="+clean(c.Cookie))
	w.add("X-CSTP-Version", "1")
	w.text("X-CSTP-Hostname", c.Hostname)
	c.Device.append(&w)
	w.text("X-CSTP-Accept-Encoding", strings.Join(c.CSTPEncodings, ","))
	w.number("X-CSTP-Base-MTU", c.BaseMTU)
	w.number("X-CSTP-MTU", c.MTU)
	var types []string
	if c.IPv6 {
		types = append(types, "IPv6")
	}
	if c.IPv4 {
		types = append(types, "IPv4")
	}
	w.text("X-CSTP-Address-Type", strings.Join(types, ","))
	if c.FullIPv6 {
		w.add("X-CSTP-Full-IPv6-Capability", "true")
	}
	for _, a := range c.Addresses {
		if a.IsValid() {
			w.add("X-CSTP-Address", a.WithZone("").Unmap().String())
		}
	}
	w.text("X-DTLS-CipherSuite", strings.Join(c.CipherSuites, ":"))
	w.text("X-DTLS12-CipherSuite", strings.Join(c.CipherSuites12, ":"))
	w.text("X-DTLS-Accept-Encoding", strings.Join(c.DTLSEncodings, ","))
	return append(w, "\r\n"...)
}

// append writes the headers by which mobile clients describe themselves.
func (d *Device) append(w *lines) {
	w.text("X-AnyConnect-Identifier-ClientVersion", d.ClientVersion)
	w.text("X-AnyConnect-Identifier-Platform", d.Platform)
	w.text("X-AnyConnect-Identifier-PlatformVersion", d.PlatformVersion)
	w.text("X-AnyConnect-Identifier-DeviceType", d.Type)
	w.text("X-AnyConnect-Identifier-Device-UniqueID", d.UniqueID)
}

// deviceOf reads what Device.append writes.
func deviceOf(h http.Header) Device {
	r := reader{h: h}
	return Device{
		ClientVersion:   cut(r.text("X-AnyConnect-Identifier-ClientVersion")),
		Platform:        cut(r.text("X-AnyConnect-Identifier-Platform")),
		PlatformVersion: cut(r.text("X-AnyConnect-Identifier-PlatformVersion")),
		Type:            cut(r.text("X-AnyConnect-Identifier-DeviceType")),
		UniqueID:        cut(r.text("X-AnyConnect-Identifier-Device-UniqueID")),
	}
}

// cookieOf finds a cookie's value, "" when there is none or when what is there could
// not be one. The last of several wins, as the client's latest.
func cookieOf(h http.Header, name string) (value string) {
	for _, line := range h.Values("Cookie") {
		if len(line) > 2*maxCookie {
			return ""
		}
		for pair := range strings.SplitSeq(line, ";") {
			key, v, found := strings.Cut(strings.TrimSpace(pair), "=")
			if found && key == name && validCookie(v) {
				value = v
			}
		}
	}
	return value
}

// maxCookie is the longest cookie value that travels: what browsers allow a cookie.
const maxCookie = 4096

// validCookie tells whether a value may travel in a Cookie header: RFC 6265 4.1.1.
func validCookie(s string) bool {
	if s == "" || len(s) > maxCookie {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '"' || c == ',' || c == ';' || c == '\\' {
			return false
		}
	}
	return true
}

// plainCookie tells whether openconnect takes a value whole on its command line: an
// equals sign would make NAME=VALUE of it.
func plainCookie(s string) bool { return validCookie(s) && !strings.Contains(s, "=") }

// list splits a header value, without empty parts and within bounds.
func list(s, separator string) (parts []string) {
	for part := range strings.SplitSeq(s, separator) {
		if part = strings.TrimSpace(part); part != "" && len(part) <= maxText && len(parts) < maxSuites {
			parts = append(parts, part)
		}
	}
	return parts
}

// cut bounds a text of the far side.
func cut(s string) string { return printable(s, maxText) }

// hostname lets through what can be a name of a machine (RFC 1123 2.1, and the
// underscores that people use), else nothing: it ends up in logs and in scripts.
func hostname(s string) string {
	if len(s) > 253 || strings.HasPrefix(s, "-") {
		return ""
	}
	for i := range len(s) {
		c := s[i]
		if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return ""
		}
	}
	return s
}

// hostPort writes an authority as stock clients do: without the port 443.
func hostPort(host string, port int) string {
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if port == 443 {
		return host
	}
	return host + ":" + strconv.Itoa(port)
}
