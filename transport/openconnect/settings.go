package openconnect

import (
	"encoding/hex"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// RekeyMethod tells what happens when the keys of a channel are due.
type RekeyMethod string

// The methods of X-CSTP-Rekey-Method. "ssl" needs TLS renegotiation, which neither
// crypto/tls nor TLS 1.3 has: it is parsed, and to be treated as RekeyNewTunnel.
const (
	RekeyNone      RekeyMethod = "none"
	RekeyNewTunnel RekeyMethod = "new-tunnel"
	RekeySSL       RekeyMethod = "ssl"
)

// PSKNegotiate stands in place of a cipher suite in X-DTLS-CipherSuite: the suite is
// negotiated by DTLS itself, with a key exported from the TLS connection.
const PSKNegotiate = "PSK-NEGOTIATE"

// Timers are those that exist once for each channel: CSTP (over TLS) and DTLS. All
// are whole seconds on the wire; zero means none.
type Timers struct {
	DPD         time.Duration // a peer silent for so long is asked whether it lives
	Keepalive   time.Duration // something is sent after so long, for the sake of NATs
	Rekey       time.Duration
	RekeyMethod RekeyMethod // empty: not said
}

// Settings is what a server pushes to a client in its answer to CONNECT.
type Settings struct {
	ServerName string // X-CSTP-Server-Name: the software, for logs
	Hostname   string // X-CSTP-Hostname: the client's, as the server knows it

	// Addresses are the client's inside, at most one IPv4 and one IPv6. Bits are
	// those of the network that the address is part of.
	Addresses []netip.Prefix

	// Include are the networks behind the server; none means everything. Exclude
	// are parts of them that are not.
	Include, Exclude []netip.Prefix

	DNS           []netip.Addr
	DefaultDomain string   // several search domains are separated by spaces
	SplitDNS      []string // domains that the servers in DNS answer for; none means all
	TunnelAllDNS  bool

	Banner string // shown to the user; may have several lines

	// MTU is that of packets inside, BaseMTU that of the path they travel on. See InnerMTU.
	MTU, BaseMTU int

	CSTP, DTLS Timers

	IdleTimeout         time.Duration // ends a session without traffic
	SessionTimeout      time.Duration // ends any session
	SessionRemaining    time.Duration // of SessionTimeout, for this session
	DisconnectedTimeout time.Duration // how long the session waits for a lost client
	LeaseDuration       time.Duration // of the addresses

	// DTLSPort is the server's UDP port; 0 when there is no DTLS.
	DTLSPort int
	// AppID is what the client puts in the session_id of its ClientHello, 1 to 32
	// bytes: today's way to tell whose a handshake is.
	AppID []byte
	// CipherSuite is PSKNegotiate beside an AppID.
	CipherSuite string
	// SessionID (32 bytes) and CipherSuite12 are the legacy way: DTLS resumes a
	// session that never was, with the master secret of the request.
	SessionID     []byte
	CipherSuite12 string

	// ClientBypass lets packets of an IP version for which there is no address go
	// beside the tunnel. Without, they are dropped.
	ClientBypass bool

	// CSTPEncoding and DTLSEncoding name a compression, "" for none. Connect never
	// asks for one.
	CSTPEncoding, DTLSEncoding string
}

// Bytes that stand between the two MTUs when records are AES-GCM. RFC 6347 4.1 and
// RFC 5288 3: record header 13, explicit nonce 8, tag 16; the frame's type byte.
const recordOverhead = 13 + 8 + 16 + 1

// Outer headers: UDP and IPv4 without options, UDP and IPv6.
const (
	headers4 = 8 + 20
	headers6 = 8 + 40
)

// InnerMTU is the largest packet that one AES-GCM record carries over a path of base
// bytes: 1434 for 1500 over IPv4, 1414 over IPv6. ocserv 1.1.6 and openconnect 9.01
// count alike.
func InnerMTU(base int, outer netip.Addr) int {
	if outer.Is6() && !outer.Is4In6() {
		return base - headers6 - recordOverhead
	}
	return base - headers4 - recordOverhead
}

// Limits on what a header may say. A hostile peer gets an error, not memory.
const (
	maxHeaderBytes = 64 << 10 // openconnect reads lines of up to 64 KiB; ocserv sends a line a route
	maxRoutes      = 1000
	maxDNS         = 16
	maxSplitDNS    = 256
	maxMTU         = 1 << 16
	maxSeconds     = 1 << 31
)

// AppendTo appends the settings as header lines, each ended by CRLF, in the spelling
// that openconnect wants: it compares case. What would break a line is left out.
func (s *Settings) AppendTo(b []byte) []byte {
	w := lines(b)
	w.add("X-CSTP-Version", "1")
	w.text("X-CSTP-Server-Name", s.ServerName)
	w.text("X-CSTP-Hostname", s.Hostname)
	for _, a := range s.Addresses {
		if !a.IsValid() {
			continue
		}
		if a.Addr().Is4() {
			w.add("X-CSTP-Address", a.Addr().String())
			w.add("X-CSTP-Netmask", mask4(a.Bits()))
		} else {
			w.add("X-CSTP-Address-IP6", a.Addr().WithZone("").String()+"/"+strconv.Itoa(a.Bits()))
		}
	}
	for _, a := range s.DNS {
		w.add("X-CSTP-DNS", a.WithZone("").String())
	}
	w.text("X-CSTP-Default-Domain", s.DefaultDomain)
	for _, d := range s.SplitDNS {
		w.text("X-CSTP-Split-DNS", d)
	}
	w.add("X-CSTP-Tunnel-All-DNS", strconv.FormatBool(s.TunnelAllDNS))
	w.routes("X-CSTP-Split-Include", s.Include)
	w.routes("X-CSTP-Split-Exclude", s.Exclude)

	w.seconds("X-CSTP-DPD", s.CSTP.DPD, "")
	w.seconds("X-CSTP-Keepalive", s.CSTP.Keepalive, "")
	w.seconds("X-CSTP-Rekey-Time", s.CSTP.Rekey, "")
	w.text("X-CSTP-Rekey-Method", string(s.CSTP.RekeyMethod))
	w.seconds("X-CSTP-Idle-Timeout", s.IdleTimeout, "none")
	w.seconds("X-CSTP-Session-Timeout", s.SessionTimeout, "none")
	w.seconds("X-CSTP-Session-Timeout-Remaining", s.SessionRemaining, "")
	w.seconds("X-CSTP-Disconnected-Timeout", s.DisconnectedTimeout, "none")
	w.seconds("X-CSTP-Lease-Duration", s.LeaseDuration, "none")
	w.add("X-CSTP-Client-Bypass-Protocol", strconv.FormatBool(s.ClientBypass))
	w.add("X-CSTP-Keep", "true")
	w.add("X-CSTP-TCP-Keepalive", "true")
	w.add("X-CSTP-License", "accept")

	if s.DTLSPort > 0 {
		w.add("X-DTLS-Port", strconv.Itoa(s.DTLSPort))
		w.seconds("X-DTLS-DPD", s.DTLS.DPD, "")
		w.seconds("X-DTLS-Keepalive", s.DTLS.Keepalive, "")
		w.seconds("X-DTLS-Rekey-Time", s.DTLS.Rekey, "")
		w.text("X-DTLS-Rekey-Method", string(s.DTLS.RekeyMethod))
		if len(s.AppID) > 0 {
			w.add("X-DTLS-App-ID", hex.EncodeToString(s.AppID))
		}
		if len(s.SessionID) > 0 {
			w.add("X-DTLS-Session-ID", hex.EncodeToString(s.SessionID))
		}
		w.text("X-DTLS-CipherSuite", s.CipherSuite)
		w.text("X-DTLS12-CipherSuite", s.CipherSuite12)
		w.text("X-DTLS-Content-Encoding", s.DTLSEncoding)
	}
	w.number("X-CSTP-Base-MTU", s.BaseMTU)
	w.number("X-CSTP-MTU", s.MTU)
	if s.Banner != "" {
		w.add("X-CSTP-Banner", escapeBanner(s.Banner))
	}
	w.text("X-CSTP-Content-Encoding", s.CSTPEncoding)
	return w
}

// ParseSettings reads the headers of a server's answer to CONNECT. Unknown headers are
// ignored, as is what has a meaning only to others; a known one that makes no sense
// is an error. The MTU may be absent: callers then refuse, as openconnect does.
func ParseSettings(h http.Header) (*Settings, error) {
	r := reader{h: h}
	s := &Settings{
		ServerName:    r.text("X-CSTP-Server-Name"),
		Hostname:      r.text("X-CSTP-Hostname"),
		DefaultDomain: r.text("X-CSTP-Default-Domain"),
		TunnelAllDNS:  r.boolean("X-CSTP-Tunnel-All-DNS"),
		Banner:        unescapeBanner(r.raw("X-CSTP-Banner")),
		BaseMTU:       r.number("X-CSTP-Base-MTU", maxMTU),
		ClientBypass:  r.boolean("X-CSTP-Client-Bypass-Protocol"),
		CSTPEncoding:  r.text("X-CSTP-Content-Encoding"),

		IdleTimeout:         r.seconds("X-CSTP-Idle-Timeout"),
		SessionTimeout:      r.seconds("X-CSTP-Session-Timeout"),
		SessionRemaining:    r.seconds("X-CSTP-Session-Timeout-Remaining"),
		DisconnectedTimeout: r.seconds("X-CSTP-Disconnected-Timeout"),
		LeaseDuration:       r.seconds("X-CSTP-Lease-Duration"),

		CSTP: r.timers("X-CSTP-"),
	}
	s.Addresses = r.addresses()
	s.DNS = r.servers("X-CSTP-DNS", "X-CSTP-DNS-IP6")
	s.SplitDNS = r.domains("X-CSTP-Split-DNS")
	s.Include = r.routes("X-CSTP-Split-Include")
	s.Exclude = r.routes("X-CSTP-Split-Exclude")
	// openconnect takes the larger of the two; only legacy servers send the second.
	s.MTU = max(r.number("X-CSTP-MTU", maxMTU), r.number("X-DTLS-MTU", maxMTU))

	if s.DTLSPort = r.number("X-DTLS-Port", 65535); s.DTLSPort > 0 {
		s.DTLS = r.timers("X-DTLS-")
		s.AppID = r.hex("X-DTLS-App-ID", 1, 32)
		s.SessionID = r.hex("X-DTLS-Session-ID", 32, 32)
		s.CipherSuite = r.text("X-DTLS-CipherSuite")
		s.CipherSuite12 = r.text("X-DTLS12-CipherSuite")
		s.DTLSEncoding = r.text("X-DTLS-Content-Encoding")
	}
	if r.err != nil {
		return nil, r.err
	}
	return s, nil
}

// PSK tells whether the server offers DTLS with a key exported from TLS.
func (s *Settings) PSK() bool {
	return s.DTLSPort > 0 && len(s.AppID) > 0 && s.CipherSuite == PSKNegotiate
}

// fit returns s without what a client has no use for.
func (s *Settings) fit(c *ConnectRequest, psk bool) *Settings {
	fitted := *s
	v4, v6 := c.IPv4, c.IPv6 && c.FullIPv6
	wanted := func(a netip.Addr) bool { return a.Is4() && v4 || a.Is6() && v6 }
	fitted.Addresses = keep(s.Addresses, netip.Prefix.Addr, wanted)
	fitted.Exclude = keep(s.Exclude, netip.Prefix.Addr, wanted)
	fitted.DNS = keep(s.DNS, func(a netip.Addr) netip.Addr { return a }, wanted)
	// None at all would mean everything.
	if fitted.Include = keep(s.Include, netip.Prefix.Addr, wanted); len(fitted.Include) == 0 {
		fitted.Include = s.Include
	}
	if !psk && s.CipherSuite == PSKNegotiate {
		fitted.DTLSPort = 0
	}
	return &fitted
}

// keep returns those of which the address is wanted.
func keep[T any](all []T, address func(T) netip.Addr, wanted func(netip.Addr) bool) (kept []T) {
	for _, one := range all {
		if wanted(address(one)) {
			kept = append(kept, one)
		}
	}
	return kept
}

// mask4 writes a prefix length as an IPv4 netmask.
func mask4(bits int) string {
	return net.IP(net.CIDRMask(bits, 32)).String()
}

// escapeBanner makes one line of a text: openconnect decodes %XX in banners. Only what
// a header cannot carry is escaped, and the escape itself.
func escapeBanner(s string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	s = strings.ToValidUTF8(s, "\uFFFD")
	for i := 0; i < len(s); i++ {
		edge := s[i] == ' ' && (i == 0 || i == len(s)-1)
		if c := s[i]; c < ' ' || c == 0x7f || c == '%' || edge {
			b.WriteByte('%')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// unescapeBanner decodes %XX and leaves what is no escape as it is: ocserv escapes
// nothing, a percent sign included.
func unescapeBanner(s string) string {
	if !strings.Contains(s, "%") {
		return strings.ToValidUTF8(s, "\uFFFD")
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := hex.DecodeString(s[i+1 : i+3]); err == nil {
				b = append(b, c[0])
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	if !utf8.Valid(b) {
		return strings.ToValidUTF8(string(b), "\uFFFD")
	}
	return string(b)
}
