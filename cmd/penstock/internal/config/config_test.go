package config

import (
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// Keys for tests, made by openssl genpkey -algorithm ed25519; nobody uses them.
const (
	keyA = "1H8JN55jI1BuO3AC/bkOhZJQ4Nu0ZJpqEhRFSD7cCiM="
	pubA = "KYTCZ/1yUsxHH7mR6+KHQPVCCF5X/tkZ3lL5lc1VvoI="
	pubB = "9X6xpawhNVFNlk2Z2t2O9JuOqVprb1T+FQbMzMJwIeo="
	pubC = "9vUGHMkfbRRsQffXjFWv97VXQZgKDOXNLkbrCn2GeNM="
)

// whole has every key there is; TestWholeHasEveryKey sees to that.
const whole = `
[node]
private_key_file = "a.key"
address = ["10.66.0.1/24", "fd66::1/64"]
listen = ["0.0.0.0:5182", "[::]:5182"]
mtu = 1400
queues = 2
device = "tun"
speedtest = true
control = "a.sock"
control_group = "wheel"
cipher_suites = ["aes-256-gcm", "chacha20-poly1305"]
log = "debug"
log_format = "json"

[tun]
name = "ps%d"
queues = 2
routes = 300
fwmark = 0x80000001
dns = false

[[peer]]
name = "b"
public_key = "` + pubB + `"
endpoint = "b.example.net:5182"
allowed_ips = ["10.66.0.2/32", "fd66::2/128", "192.0.2.0/24"]
known_as = ["198.51.100.9", "2001:db8::9"]

[[peer]]
public_key = "` + pubC + `"
allowed_ips = "0.0.0.0/0"

[[forward]]
listen = "tcp 127.0.0.1:8080"
to = "10.66.0.2:80"

[[forward]]
listen = "udp [::1]:53"
to = "name.example.net:53"

[[publish]]
listen = "tcp 10.66.0.1:80"
to = "127.0.0.1:8000"

[[publish]]
listen = "udp6 :53"
to = "localhost:53"

[dns]
servers = ["10.66.0.2", "[fd66::2]:5353"]
search = "Corp.example."

[[dns.split]]
domains = ["lab.example", "10.in-addr.arpa"]
servers = "192.0.2.7"
via = "vpn"

[[dns.split]]
domains = "."
via = "host"

[proxy]
socks5 = "127.0.0.1:1080"
http = "localhost:3128"
user = "u"
password = "p"

[router]
allow = ["192.168.1.0/24", "2001:db8:1::/48"]
tcp = 1000
tcp_per_peer = 100
half_open = 50
half_open_per_peer = 20
half_open_per_target = 5
udp = 900
udp_per_peer = 90
icmp = 80
icmp_per_peer = 8
dial_timeout = "3s"
udp_idle = "1m"
dns_idle = "5s"
icmp_idle = "7s"

[[router.rule]]
action = "deny"
peer = "b"
protocol = "tcp"
ports = [22, "8000-8080"]
to = "192.168.1.9"

[[router.rule]]
action = "allow"
peer = "` + pubC + `"
ports = 53

[[acl]]
action = "deny"
direction = "in"
peer = "b"
protocol = "tcp"
ports = [25, "6000-6063"]
from = "10.66.0.2"
to = ["10.66.0.1", "fd66::/64"]

[[acl]]
action = "allow"

[filter]
flows = 1000
flows_per_peer = 100
tcp_idle = "4h"
udp_idle = "3m"

[offload]
superpackets = false
gso = false
gro = true
send_buffer = "4MiB"
receive_buffer = 8388608
max_segments = 32
pacing_rate = "100MiB"

[tcp]
congestion_control = "reno"
sack = true
rack = true

[timing]
handshake_retry = "500ms"
handshake_retry_max = "10s"
handshake_timeout = "5s"
flight_interval = "100ms"
dpd = "5s"
dpd_timeout = "20s"
keepalive = "off"
rekey = "10m"
rekey_records = 1000000
overlap = "20s"
`

// minimal is the least a file must say.
const minimal = `
[node]
private_key = "` + keyA + `"
address = "10.66.0.1"
`

func testKeyFile(name string) ([]byte, fs.FileMode, error) {
	if name == "a.key" {
		return []byte(keyA + "\n"), 0o600, nil
	}
	return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

func TestWhole(t *testing.T) {
	c, err := Parse("node.toml", []byte(whole), testKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	key := func(s string) (k netstack.PublicKey) {
		k, err := netstack.ParsePublicKey(s)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	private, err := netstack.ParsePrivateKey(keyA)
	if err != nil {
		t.Fatal(err)
	}
	prefixes := func(s ...string) (ps []netip.Prefix) {
		for _, s := range s {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		return ps
	}
	want := &Config{
		File: "node.toml",
		Node: Node{
			PrivateKey:   private,
			Addresses:    prefixes("10.66.0.1/24", "fd66::1/64"),
			Listen:       []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:5182"), netip.MustParseAddrPort("[::]:5182")},
			MTU:          1400,
			Queues:       2,
			Socket:       "a.sock",
			SocketGroup:  "wheel",
			CipherSuites: []netstack.CipherSuite{netstack.AES256GCM, netstack.ChaCha20Poly1305},
			Speedtest:    true,
			LogLevel:     -4,
			LogFormat:    "json",
		},
		Peers: []Peer{
			{Name: "b", PublicKey: key(pubB), Endpoint: "b.example.net:5182",
				AllowedIPs: prefixes("10.66.0.2/32", "fd66::2/128", "192.0.2.0/24"),
				KnownAs:    []netip.Addr{netip.MustParseAddr("198.51.100.9"), netip.MustParseAddr("2001:db8::9")}},
			{PublicKey: key(pubC), AllowedIPs: prefixes("0.0.0.0/0")},
		},
		Forwards:  []Port{{"tcp", "127.0.0.1:8080", "10.66.0.2:80"}, {"udp", "[::1]:53", "name.example.net:53"}},
		Publishes: []Port{{"tcp", "10.66.0.1:80", "127.0.0.1:8000"}, {"udp6", ":53", "localhost:53"}},
		DNS: netstack.DNS{
			Servers: []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53"), netip.MustParseAddrPort("[fd66::2]:5353")},
			Search:  []string{"corp.example"},
			Split: []netstack.SplitDNS{
				{Domains: []string{"lab.example", "10.in-addr.arpa"}, Servers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:53")}},
				{Domains: []string{"."}, ViaHost: true},
			},
		},
		TUN:   &TUN{Name: "ps%d", Queues: 2, Routes: 300, FwMark: 0x80000001, NoDNS: true},
		Proxy: Proxy{SOCKS5: "127.0.0.1:1080", HTTP: "localhost:3128", User: "u", Password: "p"},
		Router: &netstack.RouterConfig{
			Allow: prefixes("192.168.1.0/24", "2001:db8:1::/48"),
			Rules: []netstack.RouterRule{
				{Deny: true, Peer: key(pubB), Protocol: "tcp", Ports: []netstack.PortRange{{First: 22, Last: 22}, {First: 8000, Last: 8080}}, To: prefixes("192.168.1.9/32")},
				{Peer: key(pubC), Ports: []netstack.PortRange{{First: 53, Last: 53}}},
			},
			Limits: netstack.RouterLimits{
				TCP: 1000, TCPPerPeer: 100, HalfOpen: 50, HalfOpenPerPeer: 20, HalfOpenPerTarget: 5,
				UDP: 900, UDPPerPeer: 90, ICMP: 80, ICMPPerPeer: 8,
			},
			Timeouts: netstack.RouterTimeouts{Dial: 3 * time.Second, UDPIdle: time.Minute, DNSIdle: 5 * time.Second, ICMPIdle: 7 * time.Second},
		},
		ACL: []netstack.ACLRule{
			{Deny: true, Direction: "in", Peer: key(pubB), Protocol: "tcp", Ports: []netstack.PortRange{{First: 25, Last: 25}, {First: 6000, Last: 6063}},
				From: prefixes("10.66.0.2/32"), To: prefixes("10.66.0.1/32", "fd66::/64")},
			{},
		},
		ACLLimits: netstack.ACLLimits{Flows: 1000, FlowsPerPeer: 100, TCPIdle: 4 * time.Hour, UDPIdle: 3 * time.Minute},
		Offload:   Offload{NoSuperpackets: true, NoGSO: true, SendBuffer: 4 << 20, ReceiveBuffer: 8 << 20, MaxSegments: 32, PacingRate: 100 << 20},
		TCP:       netstack.TCPOptions{CongestionControl: "reno", RACK: true},
		Timing: netstack.Timing{
			HandshakeRetry: 500 * time.Millisecond, HandshakeRetryMax: 10 * time.Second, HandshakeTimeout: 5 * time.Second,
			FlightInterval: 100 * time.Millisecond, DPD: 5 * time.Second, DPDTimeout: 20 * time.Second,
			Keepalive: -1, RekeyAfter: 10 * time.Minute, RekeyAfterRecords: 1000000, Overlap: 20 * time.Second,
		},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestWholeHasEveryKey(t *testing.T) {
	x, err := newIndex([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	written := map[string]bool{}
	for _, k := range x.keys {
		written[subscript.ReplaceAllString(k, "")] = true
	}
	// Two ways to say the same; whole takes the other one.
	written["node.private_key"] = true
	for _, k := range Keys() {
		if !written[k] {
			t.Errorf("the configuration of this test lacks %s", k)
		}
	}
}

// TestTablesWrittenInAnyWay: TOML has several spellings for the same.
func TestTablesWrittenInAnyWay(t *testing.T) {
	want, err := Parse("node.toml", []byte(minimal+"listen = \":5182\"\n[[peer]]\npublic_key = \""+pubB+"\"\nallowed_ips = [\"10.66.0.2/32\"]\n"), testKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		"peer = [{public_key = '" + pubB + "', allowed_ips = '10.66.0.2'}]\nnode = {private_key = '" + keyA + "', address = '10.66.0.1', listen = ':5182'}\n",
		"node.private_key = '" + keyA + "'\nnode.address = ['10.66.0.1/32']\nnode.listen = '[::]:5182'\n[[peer]] # one\npublic_key = '''" + pubB + "'''\nallowed_ips = [\n# two\n'10.66.0.2'\n]\n",
	} {
		c, err := Parse("node.toml", []byte(text), testKeyFile)
		if err != nil {
			t.Errorf("%s\n%v", text, err)
		} else if !reflect.DeepEqual(c, want) {
			t.Errorf("%s\ngot  %+v\nwant %+v", text, c, want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode fs.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("a.key", keyA+"\n", 0o600)
	c, err := Load(write("good.toml", whole, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.Node.Socket, filepath.Join(dir, "a.sock"); got != want {
		t.Errorf("control socket %q, want it beside the file: %q", got, want)
	}
	if len(c.Warnings) != 0 {
		t.Errorf("warnings for a key of mode 0600 and a file without a key: %v", c.Warnings)
	}
	if runtime.GOOS != "windows" {
		write("a.key", keyA, 0o644)
		if c, err = Load(filepath.Join(dir, "good.toml")); err != nil {
			t.Fatal(err)
		}
		if len(c.Warnings) != 1 || c.Warnings[0].Line != 3 || !strings.Contains(c.Warnings[0].Error(), "can be read by every user (mode 0644); expected 0600") {
			t.Errorf("warnings for a key file of mode 0644: %v", c.Warnings)
		}
		if c, err = Load(write("inline.toml", minimal, 0o644)); err != nil {
			t.Fatal(err)
		}
		if len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0].Error(), "holds the private key and can be read by every user") {
			t.Errorf("warnings for a world-readable file with the key in it: %v", c.Warnings)
		}
	}
	if _, err = Load(filepath.Join(dir, "none.toml")); !os.IsNotExist(err) {
		t.Errorf("a file that is not there: %v", err)
	}
	if _, err = Load(dir); err == nil {
		t.Error("a folder was read as a file")
	}
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]string{
		"[node]\ncontrol = \"a.sock\"\nmtu = 1\n": filepath.Join(dir, "a.sock"),
		"[server]\ncontrol = \"/run/a.sock\"":     "/run/a.sock",
		"[node]\ncontrol = 1":                     "",
		"node = 1":                                "",
		"":                                        "",
	} {
		file := filepath.Join(dir, "a.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := Socket(file); got != want || err != nil {
			t.Errorf("%q: %q, %v; want %q", text, got, err, want)
		}
	}
}

func TestParseForward(t *testing.T) {
	for text, want := range map[string]Port{
		"tcp 127.0.0.1:8080=10.66.0.2:80":    {"tcp", "127.0.0.1:8080", "10.66.0.2:80"},
		"127.0.0.1:8080=wiki.corp:80":        {"tcp", "127.0.0.1:8080", "wiki.corp:80"},
		"udp6 [::1]:53 = [fd66::2]:53":       {"udp6", "[::1]:53", "[fd66::2]:53"},
		" udp 127.0.0.1:0 = ns.example:53  ": {"udp", "127.0.0.1:0", "ns.example:53"},
	} {
		if got, err := ParseForward(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "tcp", "8080=x:80", "icmp 127.0.0.1:1=x:2", "tcp 127.0.0.1:8080=", "tcp 127.0.0.1:8080=x", "tcp4 [::1]:1=x:2"} {
		if p, err := ParseForward(text); err == nil {
			t.Errorf("%q is %v", text, p)
		}
	}
}

func TestTUN(t *testing.T) {
	for text, want := range map[string]*TUN{
		"": nil,
		"device = \"netstack\"\n[tun]\nname = \"a\"\n":                                   nil,
		"device = \"tun\"\n":                                                             {Name: DefaultTUN},
		"device = \"tun\"\n[tun]\nroutes = \"auto\"\nname = \"a\"\ndns = true\n":         {Name: "a"},
		"device = \"tun\"\n[tun]\nroutes = \"main\"\n":                                   {Name: DefaultTUN, Routes: 254},
		"device = \"tun\"\n[tun]\nroutes = false\nname = \"b%d\"\nfwmark = 4294967295\n": {Name: "b%d", Routes: RoutesNone, FwMark: 1<<32 - 1},
	} {
		c, err := Parse("node.toml", []byte(minimal+text), testKeyFile)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if !reflect.DeepEqual(c.TUN, want) {
			t.Errorf("%q: %+v, want %+v", text, c.TUN, want)
		}
		if warned := len(c.Warnings) > 0; warned != (want == nil && text != "") {
			t.Errorf("%q: warnings %v", text, c.Warnings)
		}
	}
}

// Without rules nothing keeps the tunnel's own packets out of it.
func TestEndpointInTunnel(t *testing.T) {
	for routes, warned := range map[string]bool{`"auto"`: false, `false`: false, `"main"`: true, `7`: true} {
		text := "[node]\nprivate_key = '" + keyA + "'\naddress = '10.66.0.1'\ndevice = 'tun'\n[tun]\nroutes = " + routes +
			"\n[[peer]]\npublic_key = '" + pubB + "'\nendpoint = '203.0.113.5:5182'\nallowed_ips = ['203.0.113.0/24']\n"
		c, err := Parse("node.toml", []byte(text), testKeyFile)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(c.Warnings.Error(), "node.toml:9: peer.endpoint: 203.0.113.5 is within allowed_ips"); got != warned {
			t.Errorf("routes = %s: %v", routes, c.Warnings)
		}
	}
}
