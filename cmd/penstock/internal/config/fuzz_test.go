package config

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/penstock-vpn/penstock/netstack"
)

// FuzzConfig: whatever the file, a mistake says what is expected, on a line that
// the file has, and never shows a key; and what is accepted means the same when
// it is written down again.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte(minimal))
	f.Add([]byte(minimal + "listen=':1'\n[[peer]]\npublic_key='" + pubB + "'\nallowed_ips=['10.0.0.0/8','::/0']\n[[forward]]\nlisten='tcp :0'\nto='10.1.1.1:1'\n"))
	f.Add([]byte("peer = [{public_key = '" + pubB + "', allowed_ips = '10.66.0.2'}]\nnode.mtu = 'x'\n"))
	f.Add([]byte("[[node]]\n[peer.x]\nlisten.a.b = [[], {c = 1}]\n"))
	f.Add([]byte("[node]\nprivate_key = '" + keyA + "x'\nprivate_key_file = '" + keyA + "'\n"))
	f.Add([]byte("\ufeff# only a comment"))
	f.Add([]byte(strings.Replace(minimal, "[node]\n", "[tun]\nroutes='auto'\nname='x%d'\n[node]\ndevice='tun'\n", 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 16<<10 {
			return
		}
		c, err := Parse("fuzz.toml", data, testKeyFile)
		if err != nil {
			checkMistakes(t, data, err)
			return
		}
		again, err := Parse("fuzz.toml", []byte(written(c)), testKeyFile)
		if err != nil {
			t.Fatalf("accepted, but not when written down again: %v\n%s", err, written(c))
		}
		c.Warnings, again.Warnings = nil, nil
		if !reflect.DeepEqual(c, again) {
			t.Fatalf("means something else when written down again:\n%+v\n%+v", c, again)
		}
	})
}

func checkMistakes(t *testing.T, data []byte, err error) {
	var ms Mistakes
	if !errors.As(err, &ms) || len(ms) == 0 {
		t.Fatalf("refused without a mistake: %v", err)
	}
	lines, before := strings.Count(string(data), "\n")+1, 0
	for _, m := range ms {
		switch {
		case m.File != "fuzz.toml", m.Problem == "":
			t.Fatalf("mistake lacks something: %+v", m)
		case m.Line < before, m.Line > lines:
			t.Fatalf("line %d after line %d of %d: %v", m.Line, before, lines, m)
		case m.Key != "" && m.Want == "":
			t.Fatalf("mistake does not say what is expected: %v", m)
		case strings.Contains(m.Error(), "\n"):
			t.Fatalf("mistake takes more than one line: %q", m.Error())
		case strings.Contains(m.Key, "private_key") && !strings.Contains(m.Key, "file") && strings.Contains(m.Error(), keyA[:20]):
			t.Fatalf("mistake shows a private key: %v", m)
		}
		before = m.Line
	}
}

// tomlString is s as a TOML string, whatever is in it.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, c := range s {
		fmt.Fprintf(&b, "\\U%08x", c)
	}
	b.WriteByte('"')
	return b.String()
}

// written is c as a file, in the plainest words.
func written(c *Config) string {
	var b strings.Builder
	list := func(key string, n int, item func(i int) string) {
		if n == 0 {
			return
		}
		fmt.Fprintf(&b, "%s = [", key)
		for i := range n {
			fmt.Fprintf(&b, "%q, ", item(i))
		}
		b.WriteString("]\n")
	}
	line := func(key, format string, set bool, v any) {
		if set {
			fmt.Fprintf(&b, "%s = "+format+"\n", key, v)
		}
	}
	text := func(key, s string) { // JSON's escapes are TOML's, Go's are not all
		if s == "" {
			return
		}
		fmt.Fprintf(&b, "%s = \"", key)
		for _, r := range s {
			fmt.Fprintf(&b, "\\U%08X", r)
		}
		b.WriteString("\"\n")
	}
	n := c.Node
	key, _ := n.PrivateKey.MarshalText()
	b.WriteString("[node]\n")
	text("private_key", string(key))
	list("address", len(n.Addresses), func(i int) string { return n.Addresses[i].String() })
	list("listen", len(n.Listen), func(i int) string { return n.Listen[i].String() })
	line("mtu", "%d", n.MTU != 0, n.MTU)
	line("queues", "%d", n.Queues != 0, n.Queues)
	text("control", n.Socket)
	text("control_group", n.SocketGroup)
	line("speedtest", "%v", n.Speedtest, true)
	if c.TUN != nil {
		text("device", "tun")
	}
	list("cipher_suites", len(n.CipherSuites), func(i int) string {
		for name, s := range suites {
			if s == n.CipherSuites[i] {
				return name
			}
		}
		return "?"
	})
	text("log", strings.ToLower(n.LogLevel.String()))
	text("log_format", n.LogFormat)
	if t := c.TUN; t != nil {
		b.WriteString("[tun]\n")
		text("name", t.Name)
		line("queues", "%d", t.Queues != 0, t.Queues)
		line("routes", "%d", t.Routes > 0, t.Routes)
		line("routes", "%v", t.Routes == RoutesNone, false)
		line("fwmark", "%d", t.FwMark != 0, t.FwMark)
		line("dns", "%v", true, !t.NoDNS)
	}
	for _, p := range c.Peers {
		b.WriteString("[[peer]]\n")
		text("name", p.Name)
		text("public_key", p.PublicKey.String())
		text("endpoint", p.Endpoint)
		list("allowed_ips", len(p.AllowedIPs), func(i int) string { return p.AllowedIPs[i].String() })
		list("known_as", len(p.KnownAs), func(i int) string { return p.KnownAs[i].String() })
	}
	for i, p := range append(c.Forwards[:len(c.Forwards):len(c.Forwards)], c.Publishes...) {
		if i < len(c.Forwards) {
			b.WriteString("[[forward]]\n")
		} else {
			b.WriteString("[[publish]]\n")
		}
		text("listen", p.Network+" "+p.Listen)
		text("to", p.To)
	}
	b.WriteString("[proxy]\n")
	line("socks5", "%q", c.Proxy.SOCKS5 != "", c.Proxy.SOCKS5)
	line("http", "%q", c.Proxy.HTTP != "", c.Proxy.HTTP)
	line("user", "%s", c.Proxy.User != "", tomlString(c.Proxy.User))
	line("password", "%s", c.Proxy.Password != "", tomlString(c.Proxy.Password))
	b.WriteString("[dns]\n")
	list("servers", len(c.DNS.Servers), func(i int) string { return c.DNS.Servers[i].String() })
	list("search", len(c.DNS.Search), func(i int) string { return c.DNS.Search[i] })
	for _, s := range c.DNS.Split {
		b.WriteString("[[dns.split]]\n")
		list("domains", len(s.Domains), func(i int) string { return s.Domains[i] })
		list("servers", len(s.Servers), func(i int) string { return s.Servers[i].String() })
		line("via", "%q", s.ViaHost, "host")
	}
	if r := c.Router; r != nil {
		b.WriteString("[router]\n")
		list("allow", len(r.Allow), func(i int) string { return r.Allow[i].String() })
		l, d := r.Limits, r.Timeouts
		for _, v := range []struct {
			key string
			n   int
		}{
			{"tcp", l.TCP}, {"tcp_per_peer", l.TCPPerPeer}, {"half_open", l.HalfOpen}, {"half_open_per_peer", l.HalfOpenPerPeer},
			{"half_open_per_target", l.HalfOpenPerTarget}, {"udp", l.UDP}, {"udp_per_peer", l.UDPPerPeer},
			{"icmp", l.ICMP}, {"icmp_per_peer", l.ICMPPerPeer},
		} {
			line(v.key, "%d", v.n != 0, v.n)
		}
		line("dial_timeout", "'%v'", d.Dial != 0, d.Dial)
		line("udp_idle", "'%v'", d.UDPIdle != 0, d.UDPIdle)
		line("dns_idle", "'%v'", d.DNSIdle != 0, d.DNSIdle)
		line("icmp_idle", "'%v'", d.ICMPIdle != 0, d.ICMPIdle)
		for _, rule := range r.Rules {
			b.WriteString("[[router.rule]]\n")
			action := "allow"
			if rule.Deny {
				action = "deny"
			}
			text("action", action)
			if !rule.Peer.IsZero() {
				text("peer", rule.Peer.String())
			}
			text("protocol", rule.Protocol)
			list("ports", len(rule.Ports), func(i int) string { return fmt.Sprintf("%d-%d", rule.Ports[i].First, rule.Ports[i].Last) })
			list("to", len(rule.To), func(i int) string { return rule.To[i].String() })
		}
	}
	for _, rule := range c.ACL {
		b.WriteString("[[acl]]\n")
		action := "allow"
		if rule.Deny {
			action = "deny"
		}
		text("action", action)
		text("direction", rule.Direction)
		if !rule.Peer.IsZero() {
			text("peer", rule.Peer.String())
		}
		text("protocol", rule.Protocol)
		list("ports", len(rule.Ports), func(i int) string { return fmt.Sprintf("%d-%d", rule.Ports[i].First, rule.Ports[i].Last) })
		list("from", len(rule.From), func(i int) string { return rule.From[i].String() })
		list("to", len(rule.To), func(i int) string { return rule.To[i].String() })
	}
	if l := c.ACLLimits; l != (netstack.ACLLimits{}) {
		b.WriteString("[filter]\n")
		line("flows", "%d", l.Flows != 0, l.Flows)
		line("flows_per_peer", "%d", l.FlowsPerPeer != 0, l.FlowsPerPeer)
		line("tcp_idle", "'%v'", l.TCPIdle != 0, l.TCPIdle)
		line("udp_idle", "'%v'", l.UDPIdle != 0, l.UDPIdle)
	}
	b.WriteString("[offload]\n")
	o, t := c.Offload, c.Timing
	line("superpackets", "%v", true, !o.NoSuperpackets)
	line("gso", "%v", true, !o.NoGSO)
	line("gro", "%v", true, !o.NoGRO)
	line("send_buffer", "%d", o.SendBuffer != 0, o.SendBuffer)
	line("receive_buffer", "%d", o.ReceiveBuffer != 0, o.ReceiveBuffer)
	line("max_segments", "%d", o.MaxSegments != 0, o.MaxSegments)
	line("pacing_rate", "%d", o.PacingRate != 0, o.PacingRate)
	b.WriteString("[tcp]\n")
	text("congestion_control", c.TCP.CongestionControl)
	line("sack", "%v", true, !c.TCP.NoSACK)
	line("rack", "%v", true, c.TCP.RACK)
	b.WriteString("[timing]\n")
	line("handshake_retry", "'%v'", t.HandshakeRetry != 0, t.HandshakeRetry)
	line("handshake_retry_max", "'%v'", t.HandshakeRetryMax != 0, t.HandshakeRetryMax)
	line("handshake_timeout", "'%v'", t.HandshakeTimeout != 0, t.HandshakeTimeout)
	line("flight_interval", "'%v'", t.FlightInterval != 0, t.FlightInterval)
	line("dpd", "'%v'", t.DPD != 0, t.DPD)
	line("dpd_timeout", "'%v'", t.DPDTimeout != 0, t.DPDTimeout)
	line("keepalive", "'%v'", t.Keepalive > 0, t.Keepalive)
	line("keepalive", "'%v'", t.Keepalive < 0, "off")
	line("rekey", "'%v'", t.RekeyAfter != 0, t.RekeyAfter)
	line("rekey_records", "%d", t.RekeyAfterRecords != 0, t.RekeyAfterRecords)
	line("overlap", "'%v'", t.Overlap != 0, t.Overlap)
	return b.String()
}

// TestSeedsAreWhatTheyClaim: the fuzzer starts from files that are accepted and
// from files that are not.
func TestSeedsAreWhatTheyClaim(t *testing.T) {
	for text, good := range map[string]bool{whole: true, minimal: true, "[[node]]\n": false} {
		if _, err := Parse("fuzz.toml", []byte(text), testKeyFile); (err == nil) != good {
			t.Errorf("accepted %v, want %v: %v", err == nil, good, err)
		}
	}
}
