package config

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// wholeServer has every key that is not a node's too; TestWholeServerHasEveryKey sees to that.
const wholeServer = `
[server]
listen = ["0.0.0.0:443", "[::]:443"]
public_port = 8443
certificate = "cert.pem"
key = "key.pem"
state = "state"
name = ["vpn.example.net", "192.0.2.1"]
id = "a"
address = ["10.9.0.1/22", "fd09::1/64"]
device = "tun"
mtu = 1400
max_clients = 500
max_per_user = 3
client_to_client = true
control = "a.sock"
log = "debug"
log_format = "json"

[tun]
name = "vpn%d"
queues = 2

[auth]
method = "both"
users = "users"
client_ca = "ca.pem"
certificate_user = "email"

[clients]
pool = ["10.9.0.0/22", "fd09::/64"]
routes = ["192.168.0.0/16", "2001:db8::/32"]
no_routes = "192.168.7.0/24"
only_routes = false
dns = ["10.9.0.1", "fd09::1"]
search = "Corp.example."
split_dns = ["corp.example", "lab.example"]
all_dns = true
banner = "Welcome"
mtu = 1300
dpd = "20s"
keepalive = "15s"
rekey = "1h"
udp = false
idle_timeout = "30m"
session_timeout = "12h"
disconnected_timeout = "10m"

[[group]]
name = "ops"
label = "Operations"
open = true
pool = "10.9.1.10-10.9.1.20"
routes = "0.0.0.0/0"
no_routes = "10.0.0.0/8"
only_routes = true
dns = "10.9.0.2"
search = "ops.example"
split_dns = "ops.example"
all_dns = false
banner = "Ops"
mtu = 1200
dpd = "10s"
keepalive = "5s"
rekey = "off"
udp = true
idle_timeout = "1m"
session_timeout = "1h"
disconnected_timeout = "1m"

[ban]
enabled = true
wrong_password = 20
connection = 0
limit = 100
reset = "1h"
exempt = "192.0.2.0/24"
rate = 5
burst = 50
per_address = 10
unknown = 1000

[store]
engine = "redis"
url = "redis://127.0.0.1:6379/1"
password_file = "redis.password"
name = "corp"
`

func TestWholeServer(t *testing.T) {
	c, err := ParseServer("server.toml", []byte(wholeServer))
	if err != nil {
		t.Fatal(err)
	}
	prefixes := func(s ...string) (ps []netip.Prefix) {
		for _, s := range s {
			ps = append(ps, netip.MustParsePrefix(s))
		}
		return ps
	}
	addrs := func(s ...string) (as []netip.Addr) {
		for _, s := range s {
			as = append(as, netip.MustParseAddr(s))
		}
		return as
	}
	pool := func(s ...string) (p gateway.Pool) {
		for _, s := range s {
			r, err := gateway.ParseRange(s)
			if err != nil {
				t.Fatal(err)
			}
			p = append(p, r)
		}
		return p
	}
	want := &Server{
		File:        "server.toml",
		Listen:      []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:443"), netip.MustParseAddrPort("[::]:443")},
		PublicPort:  8443,
		Certificate: "cert.pem", Key: "key.pem", State: "state", Names: []string{"vpn.example.net", "192.0.2.1"}, ID: "a",
		Addresses: prefixes("10.9.0.1/22", "fd09::1/64"), MTU: 1400, MaxClients: 500, MaxPerUser: 3, ClientToClient: true,
		Socket: "a.sock", LogLevel: -4, LogFormat: "json",
		TUN:  &ServerTUN{Name: "vpn%d", Queues: 2},
		Auth: Auth{Method: gateway.Both, Users: "users", ClientCA: "ca.pem", CertificateUser: gateway.CertificateEmail},
		Clients: gateway.Profile{
			Pool: pool("10.9.0.0/22", "fd09::/64"), Routes: prefixes("192.168.0.0/16", "2001:db8::/32"), NoRoutes: prefixes("192.168.7.0/24"),
			DNS: addrs("10.9.0.1", "fd09::1"), Search: []string{"corp.example"}, SplitDNS: []string{"corp.example", "lab.example"}, AllDNS: true,
			Banner: "Welcome", MTU: 1300, DPD: 20 * time.Second, Keepalive: 15 * time.Second, Rekey: time.Hour, NoUDP: true,
			IdleTimeout: 30 * time.Minute, SessionTimeout: 12 * time.Hour, DisconnectedTimeout: 10 * time.Minute,
		},
		Groups: []gateway.Group{{Name: "ops", Label: "Operations", Open: true, Profile: gateway.Profile{
			Pool: pool("10.9.1.10-10.9.1.20"), Routes: prefixes("0.0.0.0/0"), NoRoutes: prefixes("10.0.0.0/8"), OnlyRoutes: true,
			DNS: addrs("10.9.0.2"), Search: []string{"ops.example"}, SplitDNS: []string{"ops.example"},
			Banner: "Ops", MTU: 1200, DPD: 10 * time.Second, Keepalive: 5 * time.Second, Rekey: -1,
			IdleTimeout: time.Minute, SessionTimeout: time.Hour, DisconnectedTimeout: time.Minute,
		}}},
		Ban: gateway.BanConfig{WrongPassword: 20, Connection: -1, Limit: 100, Reset: time.Hour, Exempt: prefixes("192.0.2.0/24"),
			Rate: 5, Burst: 50, PerAddress: 10, Unknown: 1000},
		Store: Store{Engine: "redis", URL: "redis://127.0.0.1:6379/1", Password: "redis.password", Name: "corp"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}

func TestWholeServerHasEveryKey(t *testing.T) {
	x, err := newIndex([]byte(wholeServer))
	if err != nil {
		t.Fatal(err)
	}
	written := map[string]bool{"store.path": true} // of another engine
	for _, k := range x.keys {
		written[subscript.ReplaceAllString(k, "")] = true
	}
	for _, k := range Keys() {
		written[k] = true // a node's, and tested there
	}
	for _, k := range ServerKeys() {
		if !written[k] {
			t.Errorf("the configuration of this test lacks %s", k)
		}
	}
}

// TestServerMistakes: each with its line, its key and what is expected, all at once.
func TestServerMistakes(t *testing.T) {
	const good = "[server]\naddress = \"10.9.0.1/24\"\n[auth]\nusers = \"users\"\n[clients]\npool = \"10.9.0.0/24\"\n"
	for _, tt := range []struct {
		name, text string
		want       []string
	}{
		{"nothing", "", []string{
			"s.toml: server.address: is missing; expected an address inside the VPN",
			"s.toml: auth.users: is missing; expected the path of the users' file",
			"s.toml: clients.pool: is missing; expected a prefix or a range"}},
		{"server", "[server]\nlisten = \"443\"\nadress = \"10.9.0.1\"\naddress = \"10.9.0\"\nkey = \"k\"\nname = \"a b\"\nmax_clients = 0\npublic_port = 65536\ndevice = \"tap\"\n[auth]\nusers = 1\n[clients]\npool = 7\n", []string{
			`s.toml:2: server.listen: "443" is not an address and a port`,
			`s.toml:3: server: unknown key "adress"; expected address`,
			`s.toml:4: server.address: "10.9.0" is not an address`,
			`s.toml:5: server.certificate: is missing; expected certificate and key together`,
			`s.toml:6: server.name: "a b" is neither a name nor an address`,
			`s.toml:7: server.max_clients: is 0; expected a whole number from 1`,
			`s.toml:8: server.public_port: is 65536; expected a whole number from 1 to 65535`,
			`s.toml:9: server.device: "tap" is no device`,
			`s.toml:11: auth.users: is an integer`,
			`s.toml:13: clients.pool: is an integer`}},
		{"auth", good + "[store]\nengine = \"etcd\"\n", []string{`s.toml:8: store.engine: "etcd" is no engine; expected "memory", "bbolt" or "redis"`}},
		{"certificates", strings.Replace(good, "users =", "method = \"certificate\"\ncertificate_user = \"serial\"\nusers =", 1), []string{
			`s.toml:3: auth.client_ca: is missing; expected the path of a PEM file`,
			`s.toml:5: auth.certificate_user: "serial" is no name that certificates have`}},
		{"clients", good + "routes = [\"10.0.0.1/8\", \"x\"]\ndns = \"10.9.0.1:53\"\nmtu = 100\nrekey = \"1s\"\nudp = \"no\"\n", []string{
			`s.toml:7: clients.routes: "10.0.0.1/8" has bits set after its prefix; expected 10.0.0.0/8`,
			`s.toml:7: clients.routes: "x" is not an address`,
			`s.toml:8: clients.dns: "10.9.0.1:53" cannot be a name server's address`,
			`s.toml:9: clients.mtu: is 100; expected a whole number from 576`,
			`s.toml:10: clients.rekey: 1s is out of range`,
			`s.toml:11: clients.udp: is a string; expected true or false`}},
		{"groups", good + "[[group]]\nname = \"a\"\n[[group]]\nname = \"a\"\n[[group]]\nname = \"default\"\n[[group]]\nlabel = \"x\"\n[group]\n", []string{
			`s.toml:13: toml`}},
		{"group names", good + "[[group]]\nname = \"a\"\n[[group]]\nname = \"a\"\n[[group]]\nname = \"default\"\n[[group]]\nlabel = \"x\"\nmetric = 1\n", []string{
			`s.toml:10: group.name: "a" is also the group on line 8; expected a name of its own`,
			`s.toml:12: group.name: "default" cannot be a group's name`,
			`s.toml:13: group.name: is missing`,
			`s.toml:15: group: unknown key "metric"`}},
		{"no pool", "[server]\naddress = \"10.9.0.1/24\"\n[auth]\nusers = \"users\"\n[[group]]\nname = \"a\"\npool = \"10.9.0.0/24\"\n[[group]]\nname = \"b\"\n", []string{
			`s.toml:8: group.pool: is missing, here and in [clients]`}},
		{"ban", good + "[ban]\nlimit = 0\nreset = \"x\"\nexempt = \"10.0.0.1/8\"\nwrong_pasword = 1\n", []string{
			`s.toml:8: ban.limit: is 0`, `s.toml:9: ban.reset: "x" is not a time`, `s.toml:10: ban.exempt: "10.0.0.1/8" has bits set`,
			`s.toml:11: ban: unknown key "wrong_pasword"; expected wrong_password`}},
		{"store", good + "[store]\nengine = \"redis\"\npath = \"x\"\nx = 1\n", []string{
			`s.toml:7: store.url: is missing`, `s.toml:9: store.path: is of no use to redis; expected engine = "bbolt"`,
			`s.toml:10: store: unknown key "x"`}},
		{"tun", strings.Replace(good, "[auth]", "device = \"tun\"\n[auth]", 1) + "[[group]]\nname = \"g\"\npool = \"10.10.0.0/24\"\n[router]\nallow = \"10.0.0.0/8\"\n", []string{
			`s.toml:10: group.pool: 10.10.0.1-10.10.0.254 is not within the network of any address of the server`,
			`s.toml:11: router: is there beside device = "tun"`}},
		{"publish", good + "[[publish]]\nlisten = \"tcp 10.9.0.2:80\"\nto = \"127.0.0.1:80\"\n", []string{
			`s.toml:8: publish.listen: 10.9.0.2 is not an address of this server; expected one of server.address`}},
		{"a node's", "[node]\nmtu = 1\n" + good, []string{`s.toml:1: unknown key "node"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseServer("s.toml", []byte(tt.text))
			var got Mistakes
			if !errors.As(err, &got) {
				t.Fatalf("got %v, want mistakes", err)
			}
			if tt.name == "groups" { // whatever go-toml says of it
				return
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

// TestLoadServer: paths are relative to the file, secrets come from files, and what others can read is told.
func TestLoadServer(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
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
	write("redis.password", "hush\n", 0o644)
	write("key.pem", "", 0o644)
	file := write("server.toml", wholeServer, 0o644)
	c, err := LoadServer(file)
	if err != nil {
		t.Fatal(err)
	}
	for what, got := range map[string]string{"users": c.Auth.Users, "ca.pem": c.Auth.ClientCA, "cert.pem": c.Certificate, "state": c.State, "a.sock": c.Socket} {
		if got != filepath.Join(dir, what) {
			t.Errorf("%s is %s", what, got)
		}
	}
	if c.Store.Password != "hush" {
		t.Errorf("password %q", c.Store.Password)
	}
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings.Error(), "redis.password") || !strings.Contains(c.Warnings.Error(), "key.pem") {
		t.Errorf("warnings: %v", c.Warnings)
	}
	if !IsServer(file) || IsServer(write("node.toml", minimal, 0o600)) || IsServer(filepath.Join(dir, "none")) || !IsServer(write("bad.toml", "[server]\nx = \n", 0o600)) {
		t.Error("a server's file is not told from a node's")
	}
	os.Remove(filepath.Join(dir, "redis.password"))
	if _, err := LoadServer(file); err == nil || !strings.Contains(err.Error(), "store.password_file") {
		t.Errorf("without the password's file: %v", err)
	}
}

// FuzzServer: whatever the file, there are mistakes with their place, or none.
func FuzzServer(f *testing.F) {
	f.Add([]byte(wholeServer))
	f.Add([]byte("[server]\naddress = \"10.9.0.1/24\"\n[auth]\nusers = \"users\"\n[clients]\npool = \"10.9.0.0/24\"\n[router]\nallow='0.0.0.0/0'\n"))
	f.Add([]byte("server = {address = '10.9.0.1'}\ngroup = [{name = 'a'}]\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 16<<10 {
			return
		}
		if _, err := ParseServer("fuzz.toml", data); err != nil {
			checkMistakes(t, data, err)
		}
	})
}
