package openconnect

import (
	"encoding/hex"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// lines is a block of header lines under construction.
type lines []byte

// add appends a header whose value is known to be clean.
func (w *lines) add(name, value string) {
	*w = append(*w, name...)
	*w = append(*w, ": "...)
	*w = append(*w, value...)
	*w = append(*w, "\r\n"...)
}

// text appends a header unless its value is empty, without control characters.
func (w *lines) text(name, value string) {
	if value = clean(value); value != "" {
		w.add(name, value)
	}
}

// number appends a header unless n is 0 or less.
func (w *lines) number(name string, n int) {
	if n > 0 {
		w.add(name, strconv.Itoa(n))
	}
}

// seconds appends a duration in whole seconds, rounded up; none stands for 0, and
// leaves the header out when it is empty.
func (w *lines) seconds(name string, d time.Duration, none string) {
	if d <= 0 {
		w.text(name, none)
		return
	}
	n := int64(d / time.Second)
	if d%time.Second != 0 {
		n++
	}
	w.add(name, strconv.FormatInt(min(n, maxSeconds), 10))
}

// routes appends a header for each prefix: IPv4 with a netmask, IPv6 under a name of
// its own.
func (w *lines) routes(name string, prefixes []netip.Prefix) {
	for _, p := range prefixes {
		switch p = p.Masked(); {
		case !p.IsValid():
		case p.Addr().Is4():
			w.add(name, p.Addr().String()+"/"+mask4(p.Bits()))
		default:
			w.add(name+"-IP6", p.String())
		}
	}
}

// clean drops what a header value cannot carry, and space around the rest.
func clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	return strings.TrimSpace(s)
}

// reader takes values out of a header; the first error sticks.
type reader struct {
	h   http.Header
	err error
}

// fail notes what is wrong with a header.
func (r *reader) fail(name, value, want string) {
	if r.err == nil {
		if len(value) > 64 {
			value = value[:64] + "..."
		}
		r.err = malformed("%s: %q: expected %s", name, value, want)
	}
}

// raw is the first value of a header.
func (r *reader) raw(name string) string { return r.h.Get(name) }

// text is the first value, without what a terminal or a log should not see.
func (r *reader) text(name string) string { return clean(r.raw(name)) }

// all are the values of a header, at most limit.
func (r *reader) all(name string, limit int) []string {
	values := r.h.Values(name)
	if len(values) > limit {
		r.fail(name, strconv.Itoa(len(values))+" lines", "at most "+strconv.Itoa(limit))
		return nil
	}
	return values
}

func (r *reader) boolean(name string) bool {
	return strings.EqualFold(r.text(name), "true")
}

// number is 0 when the header is absent.
func (r *reader) number(name string, limit int) int {
	value := r.text(name)
	if value == "" {
		return 0
	}
	n, err := strconv.ParseUint(value, 10, 32)
	if err != nil || n > uint64(limit) {
		r.fail(name, value, "a number up to "+strconv.Itoa(limit))
		return 0
	}
	return int(n)
}

// seconds is 0 when the header is absent or says none.
func (r *reader) seconds(name string) time.Duration {
	value := r.text(name)
	if value == "" || strings.EqualFold(value, "none") {
		return 0
	}
	n, err := strconv.ParseUint(value, 10, 64)
	if err != nil || n > maxSeconds {
		r.fail(name, value, "seconds, or none")
		return 0
	}
	return time.Duration(n) * time.Second
}

// timers reads the headers that both channels have.
func (r *reader) timers(prefix string) Timers {
	t := Timers{
		DPD:       r.seconds(prefix + "DPD"),
		Keepalive: r.seconds(prefix + "Keepalive"),
		Rekey:     r.seconds(prefix + "Rekey-Time"),
	}
	switch value := r.text(prefix + "Rekey-Method"); value {
	case "":
	case string(RekeySSL), string(RekeyNewTunnel):
		t.RekeyMethod = RekeyMethod(value)
	default:
		t.RekeyMethod = RekeyNone // as openconnect reads it
	}
	return t
}

// addresses reads the client's own. IPv4 is address and netmask; IPv6 is
// X-CSTP-Address-IP6 with its prefix length, or, from servers that were not told of
// full IPv6, an X-CSTP-Address whose X-CSTP-Netmask is ADDRESS/BITS.
func (r *reader) addresses() (addresses []netip.Prefix) {
	bits4, bits6 := 32, 128
	for _, value := range r.all("X-CSTP-Netmask", 4) {
		value = clean(value)
		if p, err := netip.ParsePrefix(value); err == nil && p.Addr().Is6() {
			bits6 = p.Bits()
		} else if bits, ok := maskBits(value); ok {
			bits4 = bits
		} else {
			r.fail("X-CSTP-Netmask", value, "a netmask")
		}
	}
	var have4, have6 bool
	add := func(name, value string, a netip.Addr, bits int) {
		if a.Is4() && !have4 || a.Is6() && !have6 {
			have4, have6 = have4 || a.Is4(), have6 || a.Is6()
			addresses = append(addresses, netip.PrefixFrom(a, bits))
			return
		}
		r.fail(name, value, "one address for each version of IP")
	}
	for _, value := range r.all("X-CSTP-Address", 4) {
		a, ok := parseAddr(value)
		switch {
		case !ok:
			r.fail("X-CSTP-Address", value, "an IP address")
		case a.Is4():
			add("X-CSTP-Address", value, a, bits4)
		default:
			add("X-CSTP-Address", value, a, bits6)
		}
	}
	for _, value := range r.all("X-CSTP-Address-IP6", 2) {
		p, err := netip.ParsePrefix(clean(value))
		if err != nil || !p.Addr().Is6() || p.Addr().Is4In6() {
			r.fail("X-CSTP-Address-IP6", value, "an IPv6 address and prefix length")
			continue
		}
		add("X-CSTP-Address-IP6", value, p.Addr(), p.Bits())
	}
	return addresses
}

// servers reads addresses from headers of several names.
func (r *reader) servers(names ...string) (addresses []netip.Addr) {
	for _, name := range names {
		for _, value := range r.all(name, maxDNS) {
			a, ok := parseAddr(value)
			if !ok {
				r.fail(name, value, "an IP address")
				continue
			}
			addresses = append(addresses, a)
		}
	}
	return addresses
}

// domains reads a header whose lines each name one domain, or several with commas.
func (r *reader) domains(name string) (domains []string) {
	for _, value := range r.all(name, maxSplitDNS) {
		for domain := range strings.SplitSeq(value, ",") {
			if domain = clean(domain); domain != "" {
				domains = append(domains, domain)
			}
		}
	}
	if len(domains) > maxSplitDNS {
		r.fail(name, strconv.Itoa(len(domains)), "fewer domains")
		return nil
	}
	return domains
}

// routes reads prefixes from a header and its IPv6 twin. ocserv sends either kind
// under either name.
func (r *reader) routes(name string) (prefixes []netip.Prefix) {
	for _, name := range []string{name, name + "-IP6"} {
		for _, value := range r.all(name, maxRoutes) {
			p, ok := parseRoute(value)
			if !ok {
				r.fail(name, value, "a network")
				continue
			}
			prefixes = append(prefixes, p)
		}
	}
	return prefixes
}

// hex reads bytes, none when the header is absent.
func (r *reader) hex(name string, least, most int) []byte {
	value := r.text(name)
	if value == "" {
		return nil
	}
	b, err := hex.DecodeString(value)
	if err != nil || len(b) < least || len(b) > most {
		r.fail(name, value, strconv.Itoa(least)+" to "+strconv.Itoa(most)+" bytes in hex")
		return nil
	}
	return b
}

// parseAddr reads an address without a zone, an IPv4 one as such.
func parseAddr(s string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(clean(s))
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, false
	}
	return a.Unmap(), true
}

// parseRoute reads a.b.c.d/mask, a.b.c.d/bits, an IPv6 prefix, or a bare address. Host
// bits are cleared, as the servers' configuration does not insist on it.
func parseRoute(s string) (netip.Prefix, bool) {
	address, length, found := strings.Cut(clean(s), "/")
	a, ok := parseAddr(address)
	if !ok {
		return netip.Prefix{}, false
	}
	bits := a.BitLen()
	if found {
		if n, err := strconv.ParseUint(length, 10, 8); err == nil {
			bits = int(n)
		} else if bits, ok = maskBits(length); !ok || !a.Is4() {
			return netip.Prefix{}, false
		}
	}
	p, err := a.Prefix(bits)
	return p, err == nil
}

// maskBits counts the bits of an IPv4 netmask; one with holes is none.
func maskBits(s string) (int, bool) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() {
		return 0, false
	}
	m := a.As4()
	v := uint32(m[0])<<24 | uint32(m[1])<<16 | uint32(m[2])<<8 | uint32(m[3])
	for bits := range 33 {
		if v == ^uint32(0)<<(32-bits) {
			return bits, true
		}
	}
	return 0, false
}

// printable cuts a text of the far side to a size and drops what a terminal must not
// see. Newlines stay.
func printable(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == utf8.RuneError {
			return -1
		}
		return r
	}, s)
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return strings.TrimSpace(s)
}
