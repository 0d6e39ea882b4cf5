package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

const (
	// minMTU4 is what every IPv4 host takes (RFC 791 3.1), minMTU6 what every IPv6
	// link carries (RFC 8200 5).
	minMTU4, minMTU6 = 576, 1280
	// maxMTU leaves the type byte of a frame in a record of 2^14 bytes (RFC 5246 6.2.1).
	maxMTU = 1<<14 - 1

	// maxSocketPath is what sun_path holds on the narrowest system (104 bytes with
	// the final zero on macOS and the BSDs; 108 on Linux).
	maxSocketPath = 103
)

const (
	wantAddress = `an address with its prefix, such as "10.66.0.1/24" or "fd66::1/64"`
	wantListen  = `an address and a port of this machine, such as "0.0.0.0:5182" or "[::]:5182"`
	wantKey64   = "44 characters of base64, as penstock genkey prints them"
)

var suites = map[string]netstack.CipherSuite{
	"aes-128-gcm":       netstack.AES128GCM,
	"aes-256-gcm":       netstack.AES256GCM,
	"chacha20-poly1305": netstack.ChaCha20Poly1305,
}

func (r *reader) node(raw *rawNode, keyFile KeyFile) (n Node) {
	n.PrivateKey = r.privateKey(raw, keyFile)
	n.Addresses = r.addressesAt("node.address", raw.Address, wantAddress)
	n.Listen = r.listenAt("node.listen", raw.Listen, wantListen)

	least := int64(minMTU4)
	for _, a := range n.Addresses {
		if a.Addr().Is6() {
			least = minMTU6
		}
	}
	n.MTU = int(r.integer("node.mtu", raw.MTU, least, maxMTU))
	n.Queues = int(r.integer("node.queues", raw.Queues, 1, maxQueues))

	n.SocketGroup, _ = r.text("node.control_group", raw.ControlGroup, "the name of a group")
	n.Socket = r.socket("node.control", raw.Control)

	const wantSuite = "aes-128-gcm, aes-256-gcm or chacha20-poly1305"
	for _, it := range r.texts("node.cipher_suites", raw.CipherSuites, wantSuite) {
		s, ok := suites[it.text]
		if !ok {
			r.wrong(it.path, quoted(it.text)+" is not a cipher suite", wantSuite)
			continue
		}
		for _, before := range n.CipherSuites {
			if s == before {
				r.wrong(it.path, quoted(it.text)+" is there twice", "each suite once")
			}
		}
		n.CipherSuites = append(n.CipherSuites, s)
	}

	n.Speedtest = raw.Speedtest != nil && r.flag("node.speedtest", raw.Speedtest)

	n.LogLevel, n.LogFormat = r.log("node", raw.Log, raw.LogFormat)
	return n
}

// socket reads the path of a control socket.
func (r *reader) socket(path string, v any) string {
	const want = "the path of a Unix socket"
	s, _ := r.text(path, v, want)
	if len(s) > maxSocketPath {
		r.wrong(path, fmt.Sprintf("is %d bytes long", len(s)), fmt.Sprintf("a path of at most %d bytes", maxSocketPath))
	}
	if strings.ContainsRune(s, 0) {
		r.wrong(path, "has a zero byte in it", want)
	}
	return s
}

// log reads how much is logged, and in which format.
func (r *reader) log(table string, levelValue, formatValue any) (level slog.Level, format string) {
	const wantLog = "debug, info, warn or error"
	if s, ok := r.text(table+".log", levelValue, wantLog); ok {
		if level, ok = LogLevel(s); !ok {
			r.wrong(table+".log", quoted(s)+" is not a level", wantLog)
		}
	}
	const wantFormat = "text or json"
	format = "text"
	if s, ok := r.text(table+".log_format", formatValue, wantFormat); ok {
		if format = s; s != "text" && s != "json" {
			r.wrong(table+".log_format", quoted(s)+" is not a format", wantFormat)
		}
	}
	return level, format
}

// privateKey reads the key, or the file it is in. No message shows any part of
// it, not even of a text that only tries to be one.
func (r *reader) privateKey(raw *rawNode, keyFile KeyFile) (k netstack.PrivateKey) {
	text, inline := r.text("node.private_key", raw.PrivateKey, wantKey64)
	name, byFile := r.text("node.private_key_file", raw.PrivateKeyFile, "the path of a file")
	path := "node.private_key"
	switch {
	case inline && byFile:
		r.wrong("node.private_key_file", "is there beside private_key", "one of the two")
		return k
	case raw.PrivateKey == nil && raw.PrivateKeyFile == nil:
		r.wrong(path, "is missing", wantKey64+", or private_key_file")
		return k
	case byFile:
		path = "node.private_key_file"
		data, mode, err := keyFile(name)
		if err != nil {
			r.wrong(path, err.Error(), "a file with the private key")
			return k
		}
		if othersRead(mode) {
			r.warn(path, fmt.Sprintf("%s can be read by every user (mode %04o)", quoted(name), mode.Perm()), "0600")
		}
		text = string(data)
	case !inline:
		return k
	}
	k, err := netstack.ParsePrivateKey(text)
	if err != nil {
		r.wrong(path, "is not a key", wantKey64)
	} else if k.IsZero() {
		r.wrong(path, "is all zero", wantKey64)
	}
	return k
}

// addressesAt reads addresses inside the VPN, at least one.
func (r *reader) addressesAt(path string, v any, want string) (addresses []netip.Prefix) {
	items := r.texts(path, v, want)
	if len(items) == 0 && r.empty(v) {
		r.wrong(path, "is missing", want)
	}
	seen := map[netip.Addr]string{}
	for _, it := range items {
		p, problem := parsePrefix(it.text)
		switch {
		case problem != "":
			r.wrong(it.path, quoted(it.text)+" "+problem, want)
		case unusable(p.Addr()) != "":
			r.wrong(it.path, quoted(it.text)+" is "+unusable(p.Addr()), want)
		case seen[p.Addr()] != "":
			r.wrong(it.path, quoted(it.text)+" is there twice", "each address once")
		default:
			seen[p.Addr()] = it.path
			addresses = append(addresses, p)
		}
	}
	return addresses
}

// listenAt reads addresses with ports of this machine.
func (r *reader) listenAt(path string, v any, want string) (listen []netip.AddrPort) {
	seen := map[netip.AddrPort]bool{}
	for _, it := range r.texts(path, v, want) {
		text := it.text
		if strings.HasPrefix(text, ":") {
			text = "[::]" + text
		}
		ap, err := netip.ParseAddrPort(text)
		switch {
		case err != nil:
			r.wrong(it.path, quoted(it.text)+" is not an address and a port", want)
		case ap.Addr().IsMulticast(), ap.Addr().Is4In6():
			r.wrong(it.path, quoted(it.text)+" is no address of a machine", want)
		case ap.Port() != 0 && seen[ap]:
			r.wrong(it.path, quoted(it.text)+" is there twice", "each socket once")
		default:
			seen[ap] = true
			listen = append(listen, ap)
		}
	}
	return listen
}

// empty tells whether v is absent or an empty list: not there, rather than
// wrong.
func (r *reader) empty(v any) bool {
	list, isList := v.([]any)
	return v == nil || isList && len(list) == 0
}

// tcp reads the [tcp] table.
func (r *reader) tcp(raw *rawTCP) (t netstack.TCPOptions) {
	const want = "cubic or reno"
	if s, ok := r.text("tcp.congestion_control", raw.CongestionControl, want); ok {
		if t.CongestionControl = s; s != "cubic" && s != "reno" {
			r.wrong("tcp.congestion_control", quoted(s)+" is not a congestion control", want)
		}
	}
	t.NoSACK = !r.flag("tcp.sack", raw.SACK)
	t.RACK = raw.RACK != nil && r.flag("tcp.rack", raw.RACK) // off by default
	return t
}

func (r *reader) timing(raw *rawTiming) (t netstack.Timing) {
	const ms, s, m, h = time.Millisecond, time.Second, time.Minute, time.Hour
	t.HandshakeRetry = r.duration("timing.handshake_retry", raw.HandshakeRetry, 10*ms, h, false)
	t.HandshakeRetryMax = r.duration("timing.handshake_retry_max", raw.HandshakeRetryMax, 10*ms, 24*h, false)
	t.HandshakeTimeout = r.duration("timing.handshake_timeout", raw.HandshakeTimeout, 100*ms, 10*m, false)
	t.FlightInterval = r.duration("timing.flight_interval", raw.FlightInterval, 10*ms, m, false)
	t.DPD = r.duration("timing.dpd", raw.DPD, 100*ms, h, false)
	t.DPDTimeout = r.duration("timing.dpd_timeout", raw.DPDTimeout, 200*ms, 24*h, false)
	t.Keepalive = r.duration("timing.keepalive", raw.Keepalive, 100*ms, 24*h, true)
	t.RekeyAfter = r.duration("timing.rekey", raw.Rekey, s, 7*24*h, false)
	// 2^28 is the most that RFC 8446 5.5 allows AES-GCM with records of our size.
	t.RekeyAfterRecords = uint64(r.integer("timing.rekey_records", raw.RekeyRecords, 1000, 1<<28))
	t.Overlap = r.duration("timing.overlap", raw.Overlap, 100*ms, 10*m, false)

	if t.DPD != 0 && t.DPDTimeout != 0 && t.DPDTimeout <= t.DPD {
		r.wrong("timing.dpd_timeout", fmt.Sprintf("%v is not longer than dpd, %v", t.DPDTimeout, t.DPD), "time for a question and its answer")
	}
	if t.HandshakeRetry != 0 && t.HandshakeRetryMax != 0 && t.HandshakeRetryMax < t.HandshakeRetry {
		r.wrong("timing.handshake_retry_max", fmt.Sprintf("%v is shorter than handshake_retry, %v", t.HandshakeRetryMax, t.HandshakeRetry), "the longest of the pauses")
	}
	return t
}

// parsePrefix reads an address with or without a prefix length; problem says why
// it is none.
func parsePrefix(s string) (p netip.Prefix, problem string) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return p, "is not an address"
		}
		if a.Zone() != "" {
			return p, "has a zone, which means nothing inside the VPN"
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if p.Addr().Is4In6() {
		return p, "is an IPv4 address written as IPv6"
	}
	return p, ""
}

// unusable says why a cannot be the address of one host inside the VPN; "" when
// it can.
func unusable(a netip.Addr) string {
	switch {
	case a.IsUnspecified():
		return "the unspecified address"
	case a.IsMulticast():
		return "a multicast address"
	case a.IsLoopback():
		return "a loopback address"
	case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "the broadcast address"
	case a.Zone() != "":
		return "an address with a zone"
	case a.Is4In6():
		return "an IPv4 address written as IPv6"
	}
	return ""
}
