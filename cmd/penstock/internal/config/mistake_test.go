package config

import (
	"errors"
	"strings"
	"testing"
)

const node = "[node]\nprivate_key = \"" + keyA + "\"\naddress = [\"10.66.0.1/24\", \"fd66::1/64\"]\nlisten = \":5182\"\n" // lines 1 to 4
const peerB = "[[peer]]\npublic_key = \"" + pubB + "\"\nallowed_ips = \"10.66.0.2/32\"\n"

// TestMistakes: every mistake of a file, each with its line, its key, what is
// there and what is expected.
func TestMistakes(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []string // in order, each the begin of one message, cut at "..."
	}{
		{"empty", "", []string{
			"node.toml: node.private_key: is missing; expected 44 characters of base64, as penstock genkey prints them, or private_key_file",
			"node.toml: node.address: is missing; expected an address with its prefix",
		}},
		{"syntax", node + "mtu = \n", []string{"node.toml:5: "}},
		{"unclosed", node + "control = \"x\n", []string{"node.toml:5: "}},
		{"key twice", node + "mtu = 1400\nmtu = 1400\n", []string{"node.toml:6: "}},
		{"unknown key", node + "adress = \"10.66.0.9\"\n", []string{
			"node.toml:5: node: unknown key \"adress\"; expected address"}},
		{"key of another table", node + "allowed_ips = \"10.66.0.2\"\n", []string{
			"node.toml:5: node: unknown key \"allowed_ips\"; expected allowed_ips in [[peer]]"}},
		{"upper case", node + "MTU = 1400\n", []string{"node.toml:5: node: unknown key \"MTU\"; expected mtu"}},
		{"unknown anything", node + "xyzzy = 1\n", []string{
			"node.toml:5: node: unknown key \"xyzzy\"; expected one of private_key, private_key_file, address, listen,"}},
		{"unknown table", node + "[peers]\nname = \"b\"\n", []string{"node.toml:5: unknown key \"peers\"; expected peer"}},
		{"key outside tables", "mtu = 1400\n" + node, []string{"node.toml:1: unknown key \"mtu\"; expected mtu in [node]"}},
		{"one bracket", node + "[peer]\npublic_key = \"" + pubB + "\"\n", []string{
			"node.toml:5: peer: is a table; expected [[peer]], in two brackets, since there may be several"}},
		{"two brackets", "[[node]]\nmtu = 1400\n", []string{"node.toml:1: node: is in two brackets; expected [node], since there is only one"}},
		{"no table", "node = 3\n", []string{"node.toml:1: node: is an integer; expected a table, [node]"}},
		{"no tables", node + "[x]\n[[forward]]\n[dns]\n" + "servers.a = 1\n", []string{
			"node.toml:5: unknown key \"x\"",
			"node.toml:6: forward.listen: is missing",
			"node.toml:6: forward.to: is missing",
			"node.toml:8: dns.servers: is a table"}},
		{"list of no tables", "peer = [3]\n", []string{"node.toml:1: peer: is an integer; expected a table, {...}"}},

		{"types", "[node]\nprivate_key = 1\naddress = 10.66\nlisten = [\n  \":1\",\n  true,\n  1979-05-27,\n]\nmtu = \"1400\"\ncontrol = []\nlog = {}\n", []string{
			"node.toml:2: node.private_key: is an integer; expected 44 characters",
			"node.toml:3: node.address: is a number with a fraction; expected an address",
			"node.toml:6: node.listen: is true or false; expected an address and a port",
			"node.toml:7: node.listen: is a date or a time; expected",
			"node.toml:9: node.mtu: is a string; expected a whole number from 576 to 16383",
			"node.toml:10: node.control: is a list; expected the path of a Unix socket",
			"node.toml:11: node.log: is a table; expected debug, info, warn or error"}},

		{"key too short", "[node]\nprivate_key = \"c2VjcmV0\"\naddress = \"10.66.0.1\"\n", []string{
			"node.toml:2: node.private_key: is not a key; expected 44 characters of base64, as penstock genkey prints them"}},
		{"both keys", node + "private_key_file = \"a.key\"\n", []string{
			"node.toml:5: node.private_key_file: is there beside private_key; expected one of the two"}},
		{"no key file", "[node]\nprivate_key_file = \"none.key\"\naddress = \"10.66.0.1\"\n", []string{
			"node.toml:2: node.private_key_file: open none.key: "}},

		{"addresses", "[node]\nprivate_key = \"" + keyA + "\"\naddress = [\n\"10.66.0.300/24\",\n\"10.66.0.1/33\",\n\"224.0.0.1\",\n\"::1\",\n\"fe80::1%eth0\",\n\"::ffff:10.0.0.1\",\n\"10.66.0.1\", \"10.66.0.1/24\", \"0.0.0.0\"]\n", []string{
			"node.toml:4: node.address: \"10.66.0.300/24\" is not an address; expected an address with its prefix, such as \"10.66.0.1/24\"",
			"node.toml:5: node.address: \"10.66.0.1/33\" is not an address",
			"node.toml:6: node.address: \"224.0.0.1\" is a multicast address",
			"node.toml:7: node.address: \"::1\" is a loopback address",
			"node.toml:8: node.address: \"fe80::1%eth0\" has a zone",
			"node.toml:9: node.address: \"::ffff:10.0.0.1\" is an IPv4 address written as IPv6; expected",
			"node.toml:10: node.address: \"10.66.0.1/24\" is there twice",
			"node.toml:10: node.address: \"0.0.0.0\" is the unspecified address"}},
		{"listen", "[node]\nprivate_key = \"" + keyA + "\"\naddress = \"10.66.0.1\"\nlisten = [\"5182\", \"example.net:5182\", \"0.0.0.0:65536\", \"224.0.0.1:1\", \":5\", \"[::]:5\"]\n", []string{
			"node.toml:4: node.listen: \"5182\" is not an address and a port; expected an address and a port of this machine, such as \"0.0.0.0:5182\"",
			"node.toml:4: node.listen: \"example.net:5182\" is not",
			"node.toml:4: node.listen: \"0.0.0.0:65536\" is not",
			"node.toml:4: node.listen: \"224.0.0.1:1\" is no address of a machine",
			"node.toml:4: node.listen: \"[::]:5\" is there twice"}},
		{"mtu for IPv6", node + "mtu = 1279\n", []string{"node.toml:5: node.mtu: is 1279; expected a whole number from 1280 to 16383"}},
		{"mtu too big", node + "mtu = 16384\n", []string{"node.toml:5: node.mtu: is 16384; expected"}},
		{"control too long", node + "control = \"/" + strings.Repeat("x", 103) + "\"\n", []string{"node.toml:5: node.control: is 104 bytes long; expected a path of at most 103 bytes"}},
		{"suites", node + "cipher_suites = [\"aes\", \"aes-128-gcm\", \"aes-128-gcm\"]\nlog = \"loud\"\nlog_format = \"xml\"\n", []string{
			"node.toml:5: node.cipher_suites: \"aes\" is not a cipher suite; expected aes-128-gcm, aes-256-gcm or chacha20-poly1305",
			"node.toml:5: node.cipher_suites: \"aes-128-gcm\" is there twice",
			"node.toml:6: node.log: \"loud\" is not a level; expected debug, info, warn or error",
			"node.toml:7: node.log_format: \"xml\" is not a format; expected text or json"}},

		{"peer", node + "[[peer]]\n[[peer]]\nname = \"a\\nb\"\npublic_key = \"x\"\nendpoint = \"b.example.net\"\nallowed_ips = []\n", []string{
			"node.toml:5: peer.public_key: is missing; expected 44 characters of base64, as penstock pubkey prints them",
			"node.toml:5: peer.allowed_ips: is missing",
			"node.toml:7: peer.name: \"a\\nb\" is not fit to print",
			"node.toml:8: peer.public_key: \"x\" is not a key",
			"node.toml:9: peer.endpoint: \"b.example.net\" has no port; expected a host and a UDP port, such as \"b.example.net:5182\"",
			"node.toml:10: peer.allowed_ips: is missing"}},
		{"endpoints", node +
			strings.ReplaceAll(peerB, "10.66.0.2/32", "10.66.0.2") + "endpoint = \"2001:db8::1\"\n", []string{
			"node.toml:8: peer.endpoint: \"2001:db8::1\" needs brackets around the IPv6 address, and a port"}},
		{"endpoint port", node + peerB + "endpoint = \"b:0\"\n", []string{"node.toml:8: peer.endpoint: \"b:0\" has port 0"}},
		{"endpoint big port", node + peerB + "endpoint = \"b:70000\"\n", []string{"node.toml:8: peer.endpoint: \"b:70000\" has no port from 1 to 65535"}},
		{"endpoint host", node + peerB + "endpoint = \"10.66.0.300:1\"\n", []string{"node.toml:8: peer.endpoint: \"10.66.0.300:1\" has a host that is neither"}},
		{"endpoint no host", node + peerB + "endpoint = \":1\"\n", []string{"node.toml:8: peer.endpoint: \":1\" has no host"}},
		{"own key", node + "[[peer]]\npublic_key = \"" + pubA + "\"\nallowed_ips = \"10.66.0.2\"\n", []string{
			"node.toml:6: peer.public_key: is the key of this node itself; expected the public key of the other side"}},
		{"same peer", node + "[[peer]]\nname = \"b\"\n" + peerB[9:] + "[[peer]]\nname = \"b\"\n" + peerB[9:], []string{
			"node.toml:10: peer.name: \"b\" is also the peer on line 6; expected a name of its own",
			"node.toml:11: peer.public_key: is also the key of the peer on line 7; expected each peer once",
			"node.toml:12: peer.allowed_ips: 10.66.0.2/32 also belongs to the peer on line 8; expected each prefix with one peer"}},
		{"prefixes", node + "[[peer]]\npublic_key = \"" + pubB + "\"\nallowed_ips = [\n\"10.66.0.2/24\",\n\"10.66.0.1\",\n\"10.9.0.0/16\", \"10.9.0.0/16\",\n\"ff02::1/128\",\n\"nonsense\"]\n", []string{
			"node.toml:8: peer.allowed_ips: \"10.66.0.2/24\" has bits set after its prefix; expected 10.66.0.0/24 for the network or 10.66.0.2/32 for the one address",
			"node.toml:9: peer.allowed_ips: 10.66.0.1/32 is this node's own address",
			"node.toml:10: peer.allowed_ips: 10.9.0.0/16 is there twice",
			"node.toml:11: peer.allowed_ips: \"ff02::1/128\" is multicast",
			"node.toml:12: peer.allowed_ips: \"nonsense\" is not an address"}},
		{"known as", node + peerB + "known_as = [\"192.0.2.1\", \"192.0.2.2\", \"::\", \"192.0.2.0/24\"]\n", []string{
			"node.toml:8: peer.known_as: \"192.0.2.2\" is of the same family as 192.0.2.1; expected an address, such as \"192.0.2.7\", at most one of each family",
			"node.toml:8: peer.known_as: \"::\" is the unspecified address",
			"node.toml:8: peer.known_as: \"192.0.2.0/24\" is not an address"}},
		{"nobody can call", minimal + peerB, []string{
			"node.toml:5: peer.endpoint: is missing, and node.listen too, so neither side can call the other; expected one of them"}},

		{"forward", node + peerB + "[[forward]]\nlisten = \"127.0.0.1:8080\"\nto = \"10.66.0.3:80\"\n[[forward]]\nlisten = \"tcp4 [::1]:8080\"\nto = \"10.66.0.2\"\n[[forward]]\nlisten = \"tcp6 :1\"\nto = \"10.66.0.2:1\"\n[[forward]]\nlisten = \"sctp :1\"\nto = \":1\"\n", []string{
			"node.toml:9: forward.listen: \"127.0.0.1:8080\" does not begin with a network; expected a network, an address and a port of this machine, such as \"tcp 127.0.0.1:8080\"",
			"node.toml:10: forward.to: no peer carries 10.66.0.3; expected an address within some peer's allowed_ips",
			"node.toml:12: forward.listen: \"tcp4 [::1]:8080\" has an address of another family",
			"node.toml:13: forward.to: \"10.66.0.2\" has no port; expected a host and a port inside the VPN",
			"node.toml:18: forward.listen: \"sctp :1\" does not begin with a network",
			"node.toml:19: forward.to: \":1\" has no host"}},
		{"forward twice", node + peerB + "[[forward]]\nlisten = \"tcp :80\"\nto = \"10.66.0.2:80\"\n[[forward]]\nlisten = \"udp :80\"\nto = \"10.66.0.2:80\"\n[[forward]]\nlisten = \"tcp :80\"\nto = \"10.66.0.2:80\"\n", []string{
			"node.toml:15: forward.listen: is taken by the one on line 9; expected a port of its own"}},
		{"publish", node + "[[publish]]\nlisten = \"tcp 10.66.0.2:80\"\nto = \"127.0.0.1:8000\"\n[[publish]]\nlisten = \"tcp :0\"\nto = \"0.0.0.0:8000\"\n[[publish]]\nlisten = \"tcp example.net:1\"\nto = \"x y:1\"\n", []string{
			"node.toml:6: publish.listen: 10.66.0.2 is not an address of this node; expected one of node.address",
			"node.toml:9: publish.listen: \"tcp :0\" has port 0; expected a network, an address of this node and a port",
			"node.toml:10: publish.to: \"0.0.0.0:8000\" is no address of a host",
			"node.toml:12: publish.listen: \"tcp example.net:1\" has a name where an address must be",
			"node.toml:13: publish.to: \"x y:1\" has a host that is neither an address nor a name"}},

		{"dns", node + peerB + "[dns]\nservers = [\"dns.example.net\", \"10.66.0.2\", \"10.66.0.3\", \"10.66.0.2:0\"]\n", []string{
			"node.toml:9: dns.servers: \"dns.example.net\" is not an address; expected the address of a server, such as \"10.66.0.2\"",
			"node.toml:9: dns.servers: \"10.66.0.2:0\" cannot be a server",
			"node.toml:9: dns.servers: no peer carries 10.66.0.3"}},
		{"no domains", node + peerB + "[dns]\nsearch = [\"a b\", \"a\\nnameserver 192.0.2.1\", \"_tcp.x-1.example\"]\n[[dns.split]]\ndomains = \"b\u00fccher.example\"\nvia = \"host\"\n", []string{
			"node.toml:9: dns.search: \"a b\" is no domain; expected a domain, such as \"corp.example\"",
			"node.toml:9: dns.search: \"a\\nnameserver 192.0.2.1\" is no domain",
			"node.toml:11: dns.split.domains: \"b\u00fccher.example\" is no domain"}},
		{"split dns", node + peerB + "[dns]\nsearch = \"a..b\"\n[[dns.split]]\nservers = \"10.66.0.3\"\ndomains = [\"x.example\", \"X.example.\"]\nvia = \"tunnel\"\n" +
			"[[dns.split]]\ndomain = \"y.example\"\n[[dns.split]]\ndomains = [\".\", \"-\"]\nvia = \"host\"\nservers = [\"127.0.0.1:5353\"]\n", []string{
			"node.toml:9: dns.search: \"a..b\" is no domain; expected a domain, such as \"corp.example\"",
			"node.toml:11: dns.split.servers: no peer carries 10.66.0.3; expected an address within some peer's allowed_ips",
			"node.toml:12: dns.split.domains: \"X.example.\" is there twice; expected each domain once",
			"node.toml:13: dns.split.via: \"tunnel\" is no way to a server; expected \"vpn\" or \"host\"",
			"node.toml:14: dns.split.domains: is missing; expected a domain",
			"node.toml:14: dns.split.servers: is missing; expected the address of a server, such as \"10.66.0.2\" or \"10.66.0.2:53\", or via = \"host\"",
			"node.toml:15: dns.split: unknown key \"domain\"; expected domains"}},
		{"proxy", node + "[proxy]\nsocks5 = \"1080\"\nhttp = \"proxy.example.net:3128\"\nuser = \"a:b\"\n", []string{
			"node.toml:6: proxy.socks5: \"1080\" ",
			"node.toml:7: proxy.http: \"proxy.example.net:3128\" has a name where an address must be; expected an address and a port of this machine",
			"node.toml:8: proxy.user: has a colon in it",
			"node.toml:8: proxy.password: is missing; expected user and password, or neither"}},
		{"router", node + peerB + "[router]\nallow = [\"192.168.1.1/24\", \"office\", \"10.0.0.0/8\", \"10.0.0.0/8\", \"224.0.0.0/4\"]\ntcp = 0\nudp_idle = \"1ms\"\n" +
			"[[router.rule]]\npeer = \"bb\"\nprotocol = \"gre\"\nports = [0, \"80-22\", 22.5]\nto = []\n[[router.rule]]\naction = \"permit\"\nprotocol = \"icmp\"\nports = 22\nport = 1\n", []string{
			"node.toml:9: router.allow: \"192.168.1.1/24\" has bits set after its prefix; expected 192.168.1.0/24 for the network or 192.168.1.1/32 for the one address",
			"node.toml:9: router.allow: \"office\" is not an address; expected a prefix that this machine reaches",
			"node.toml:9: router.allow: \"10.0.0.0/8\" is there twice; expected each prefix once",
			"node.toml:9: router.allow: \"224.0.0.0/4\" is multicast, which is not routed",
			"node.toml:10: router.tcp: is 0; expected a whole number from 1 to",
			"node.toml:11: router.udp_idle: 1ms is out of range",
			"node.toml:12: router.rule.action: is missing; expected \"allow\" or \"deny\"",
			"node.toml:13: router.rule.peer: \"bb\" is no peer; expected the name or the public key of a [[peer]]",
			"node.toml:14: router.rule.protocol: \"gre\" is no protocol that is routed; expected \"tcp\", \"udp\" or \"icmp\"",
			"node.toml:15: router.rule.ports: is 0; expected ports such as 443",
			"node.toml:15: router.rule.ports: \"80-22\" is no range of ports",
			"node.toml:15: router.rule.ports: is a number with a fraction",
			"node.toml:16: router.rule.to: is an empty list",
			"node.toml:18: router.rule.action: \"permit\" is no action",
			"node.toml:20: router.rule.ports: is there beside icmp, which has none",
			"node.toml:21: router.rule: unknown key \"port\"; expected ports"}},
		{"router that allows nothing", node + peerB + "[router]\n[[router.rule]]\naction = \"deny\"\n", []string{
			"node.toml:8: router: allows nothing; expected allow = "}},
		{"acl", node + peerB + "[[acl]]\ndirection = \"inbound\"\npeer = \"any\"\nprotocol = \"gre\"\nports = []\nfrom = [\"10.66.0.2/24\"]\nto = []\n[[acl]]\naction = \"reject\"\nprotocol = \"icmp\"\nports = 1\nto = \"ff02::1\"\nport = 1\n[filter]\nflows = 0\ntcp_idle = \"1ms\"\n", []string{
			"node.toml:8: acl.action: is missing; expected \"allow\" or \"deny\"",
			"node.toml:9: acl.direction: \"inbound\" is no direction; expected \"in\", from peers, or \"out\", to them; without the key both",
			"node.toml:10: acl.peer: \"any\" is no peer; expected the name or the public key of a [[peer]]; without the key every peer",
			"node.toml:11: acl.protocol: \"gre\" is no protocol that has a name here; expected \"tcp\", \"udp\" or \"icmp\", which is ping; without the key every protocol",
			"node.toml:12: acl.ports: is an empty list; expected ports such as 443",
			"node.toml:13: acl.from: \"10.66.0.2/24\" has bits set after its prefix; expected 10.66.0.0/24 for the network or 10.66.0.2/32 for the one address",
			"node.toml:14: acl.to: is an empty list; expected a prefix inside the VPN, such as \"10.66.0.0/24\" or \"fd66::1/128\"; without the key every target fits",
			"node.toml:16: acl.action: \"reject\" is no action",
			"node.toml:18: acl.ports: is there beside icmp, which has none",
			"node.toml:19: acl.to: \"ff02::1\" is multicast",
			"node.toml:20: acl: unknown key \"port\"; expected ports",
			"node.toml:22: filter.flows: is 0; expected a whole number from 1 to",
			"node.toml:23: filter.tcp_idle: 1ms is out of range"}},
		{"filter without acl", node + peerB + "[filter]\nflows = 5\n", []string{
			"node.toml:8: filter: has nothing to bound; expected an [[acl]]"}},
		{"tun", node + "device = \"tap\"\n[tun]\nname = \"a/b\"\nqueues = 0\nroutes = true\nfwmark = 0\ndns = \"off\"\nmtu = 1400\n", []string{
			"node.toml:5: node.device: \"tap\" is no device; expected \"netstack\" or \"tun\"",
			"node.toml:7: tun.name: \"a/b\" cannot be the name of an interface; expected the name of an interface, such as \"penstock0\", of at most 15 bytes",
			"node.toml:8: tun.queues: is 0; expected a whole number from 1 to 256",
			"node.toml:9: tun.routes: is true; expected \"auto\", \"main\", the number of a routing table, or false",
			"node.toml:10: tun.fwmark: is 0; expected a whole number from 1 to 4294967295",
			"node.toml:11: tun.dns: is a string; expected true or false",
			"node.toml:12: tun: unknown key \"mtu\"; expected mtu in [node]"}},
		{"tun name", node + "device = \"tun\"\n[tun]\nname = \"penstock-berlin1\"\nroutes = \"mian\"\n", []string{
			"node.toml:7: tun.name: \"penstock-berlin1\" is 16 bytes long; expected",
			"node.toml:8: tun.routes: \"mian\" is no routing table; expected"}},
		{"tun name pattern", node + "device = \"tun\"\ntun = {name = \"%s\", routes = 255}\n", []string{
			"node.toml:6: node: unknown key \"tun\"; expected "}},
		{"tun table", "tun = {name = \"%dx\", routes = 255}\n" + node + "device = \"tun\"\n", []string{
			"node.toml:1: tun.name: \"%dx\" cannot be the name of an interface",
			"node.toml:1: tun.routes: is 255, the table of the machine's own addresses; expected"}},
		{"split dns in one bracket", node + "[dns.split]\ndomains = \"x\"\n", []string{
			"node.toml:5: dns.split: is a table; expected [[dns.split]], in two brackets, since there may be several"}},
		{"offload", node + "[offload]\ngso = \"off\"\nsend_buffer = \"lots\"\nreceive_buffer = \"2TiB\"\n[timing]\ndpd = 10\ndpd_timeout = \"never\"\nkeepalive = \"1h30\"\nrekey = \"1ms\"\nrekey_records = 268435457\n", []string{
			"node.toml:6: offload.gso: is a string; expected true or false",
			"node.toml:7: offload.send_buffer: \"lots\" is not a size; expected a size from 4KiB to 1GiB, such as \"4MiB\"",
			"node.toml:8: offload.receive_buffer: \"2TiB\" is not a size",
			"node.toml:10: timing.dpd: is an integer; expected a time from 100ms to 1h0m0s, such as \"200ms\"",
			"node.toml:11: timing.dpd_timeout: \"never\" is not a time",
			"node.toml:12: timing.keepalive: \"1h30\" is not a time; expected a time from 100ms to 24h0m0s, such as \"200ms\", or \"off\"",
			"node.toml:13: timing.rekey: 1ms is out of range",
			"node.toml:14: timing.rekey_records: is 268435457; expected a whole number from 1000 to 268435456"}},
		{"tcp", node + "[tcp]\ncongestion_control = \"bbr\"\nsack = 1\n", []string{
			"node.toml:6: tcp.congestion_control: \"bbr\" is not a congestion control; expected cubic or reno",
			"node.toml:7: tcp.sack: is an integer; expected true or false"}},
		{"clocks", node + "[timing]\ndpd = \"10s\"\ndpd_timeout = \"10s\"\nhandshake_retry = \"2s\"\nhandshake_retry_max = \"1s\"\n", []string{
			"node.toml:7: timing.dpd_timeout: 10s is not longer than dpd, 10s; expected time for a question and its answer",
			"node.toml:9: timing.handshake_retry_max: 1s is shorter than handshake_retry, 2s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("node.toml", []byte(tt.text), testKeyFile)
			var got Mistakes
			if !errors.As(err, &got) {
				t.Fatalf("got %v, want mistakes", err)
			}
			for i, want := range tt.want {
				if i < len(got) && !strings.HasPrefix(got[i].Error(), want) {
					t.Errorf("mistake %d is\n  %s\nwant\n  %s", i, got[i], want)
				}
			}
			if len(got) != len(tt.want) {
				t.Errorf("%d mistakes, want %d:\n%v", len(got), len(tt.want), err)
			}
		})
	}
}

// TestPublicKeyIsOpenSSLs: the public key of keyA is what openssl pkey -pubout says.
func TestPublicKeyIsOpenSSLs(t *testing.T) {
	c, err := Parse("a.toml", []byte(minimal), testKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Node.PrivateKey.Public().String(); got != pubA {
		t.Errorf("public key %s, want %s", got, pubA)
	}
}

func TestNearest(t *testing.T) {
	for _, tt := range []struct{ key, want string }{
		{"allowedips", "allowed_ips"}, {"adress", "address"}, {"lsiten", "listen"}, {"PrivateKey", "private_key"},
		{"entirely_else", ""}, {"", ""}, {strings.Repeat("listen", 100), ""},
	} {
		if got := nearest(tt.key, []string{"private_key", "private_key_file", "address", "listen", "allowed_ips"}); got != tt.want {
			t.Errorf("nearest to %q is %q, want %q", tt.key, got, tt.want)
		}
	}
}

func TestSize(t *testing.T) {
	for _, tt := range []struct {
		text string
		n    int64
	}{{"0", 0}, {"17", 17}, {"17B", 17}, {"4KiB", 4096}, {"4 MiB", 4 << 20}, {"3GiB", 3 << 30}} {
		if n, ok := ParseSize(tt.text); !ok || n != tt.n {
			t.Errorf("ParseSize(%q) = %d, %v, want %d", tt.text, n, ok, tt.n)
		}
	}
	for _, text := range []string{"", "MiB", "-1", "1MB", "1.5MiB", "9223372036854775807KiB", "1 2"} {
		if n, ok := ParseSize(text); ok {
			t.Errorf("ParseSize(%q) = %d, want a refusal", text, n)
		}
	}
}
