package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pquerna/otp/totp"
	"github.com/vishvananda/netlink"

	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

const labConfig = `
[server]
listen = ["0.0.0.0:4443", "[::]:4443"]
address = ["10.97.0.1/24", "fd97::1/64"]
state = "state"

[auth]
method = "either"
users = "users"
client_ca = "ca.pem"

[clients]
pool = ["10.97.0.0/24", "fd97::/64"]
routes = ["10.97.0.0/24", "10.98.0.0/24", "fd97::/64", "fd98::/64"]
dns = ["10.98.0.53", "fd98::53"]
search = "corp.example"
banner = "Welcome: 100% yours"
dpd = "2s"
disconnected_timeout = "8s"

[[group]]
name = "ops"
label = "Operations"
pool = "10.97.0.200-10.97.0.209"
dns = "10.98.0.54"

[[group]]
name = "guests"
open = true

[ban]
exempt = ["10.99.0.0/24", "fd99::/64"]

[router]
allow = ["10.98.0.0/24", "fd98::/64"]
`

// addUser runs penstock user add.
func (l *lab) addUser(name, password string, flags ...string) string {
	l.t.Helper()
	return l.must(password+"\n", append([]string{"user", "add", "-f", "users", "--passwd-on-stdin", name}, flags...)...)
}

func isConnected(s *gateway.SessionStatus) bool { return s.Connected }

// TestServeStock: a stock openconnect against penstock serve, which runs as nobody.
func TestServeStock(t *testing.T) {
	required(t, "openconnect", "curl", "ping")
	l := newLab(t)
	l.write("server.toml", labConfig)
	ca := newTestCA(t)
	l.write("ca.pem", ca.pem)
	l.addUser("alice", "correct horse")
	l.addUser("oscar", "battery staple", "--groups", "ops")
	l.addUser("steve", "static", "--address", "10.97.0.77,fd97::77")
	l.must("", "user", "add", "-f", "users", "carol", "--no-password")
	p := l.start("serve", "-c", "server.toml")
	alice := stock.ClientOptions{Pin: p.pin(), User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default"}}

	for _, noDTLS := range []bool{false, true} {
		name := map[bool]string{false: "dtls", true: "cstp"}[noDTLS]
		l.sub(t, name, func(t *testing.T) {
			o := alice
			o.NoDTLS = noDTLS
			c := l.connect(o)
			tunnel := c.Connected(20 * time.Second)
			if tunnel.DTLS == noDTLS || tunnel.MTU != 1434 || !strings.Contains(tunnel.TLS, "(TLS1.3)") {
				t.Errorf("DTLS %v, TLS %q, MTU %d", tunnel.DTLS, tunnel.TLS, tunnel.MTU)
			}
			if !noDTLS && !strings.Contains(tunnel.DTLSSuite, "(PSK)-(AES-256-GCM)") {
				t.Errorf("DTLS has %q", tunnel.DTLSSuite)
			}
			if !netip.MustParsePrefix("10.97.0.0/24").Contains(tunnel.Addr4) || !netip.MustParsePrefix("fd97::/64").Contains(tunnel.Addr6) {
				t.Errorf("addresses %v and %v", tunnel.Addr4, tunnel.Addr6)
			}
			for key, want := range map[string]string{
				"INTERNAL_IP4_DNS": "10.98.0.53 fd98::53", "CISCO_DEF_DOMAIN": "corp.example",
				"CISCO_BANNER": "Welcome: 100% yours", "INTERNAL_IP4_NETMASK": "255.255.255.0",
			} {
				if got := tunnel.Env[key]; got != want {
					t.Errorf("%s is %q, want %q", key, got, want)
				}
			}
			l.pings("10.97.0.1", "fd97::1", "10.98.0.2", "fd98::2")
			l.downloads("10.98.0.2", 1)
			l.downloads("[fd98::2]", 200000)
			s := p.session("alice", isConnected)
			if s.Path != name || len(s.Addresses) != 2 || s.Addresses[0] != tunnel.Addr4 || s.Addresses[1] != tunnel.Addr6 || s.OutboundBytes < 200000*uint64(len(hello)) {
				t.Errorf("%+v", s)
			}
			c.Stop(syscall.SIGINT) // says goodbye
			p.nobodyIn("alice")
		})
	}

	l.sub(t, "outer IPv6", func(t *testing.T) {
		o := alice
		o.URL = "https://[fd99::2]:4443"
		c := l.connect(o)
		// We say 1414, of which openconnect's own search takes 12.
		if tunnel := c.Connected(20 * time.Second); tunnel.MTU < 1402 || tunnel.MTU > 1414 || !tunnel.DTLS {
			t.Errorf("%+v", tunnel)
		}
		l.pings("10.98.0.2", "fd98::2")
		c.Stop(syscall.SIGINT)
		p.nobodyIn("alice")
	})

	l.sub(t, "wrong password", func(t *testing.T) {
		before := p.status().Server.WrongSignIns
		for user, password := range map[string]string{"alice": "wrong", "nobody": "correct horse", "carol": "*"} {
			o := alice
			o.User, o.Password = user, password
			if code := l.connect(o).Wait(20 * time.Second); code == 0 {
				t.Errorf("%s came in with %q", user, password)
			}
		}
		if n := p.status().Server.WrongSignIns - before; n < 3 {
			t.Errorf("%d wrong sign-ins were counted, want 3 at least", n)
		}
	})

	l.sub(t, "groups", func(t *testing.T) {
		o := alice
		o.User, o.Password, o.Args = "oscar", "battery staple", []string{"--authgroup", "Operations"}
		c := l.connect(o)
		tunnel := c.Connected(20 * time.Second)
		r, err := gateway.ParseRange("10.97.0.200-10.97.0.209")
		if err != nil || !r.Contains(tunnel.Addr4) || tunnel.Env["INTERNAL_IP4_DNS"] != "10.98.0.54" {
			t.Errorf("%+v", tunnel)
		}
		if s := p.session("oscar", isConnected); s.Group != "ops" {
			t.Errorf("group %q", s.Group)
		}
		c.Stop(syscall.SIGINT)
		o = alice
		o.Args = []string{"--authgroup", "Operations"}
		if code := l.connect(o).Wait(20 * time.Second); code == 0 {
			t.Error("alice came into a group that is not hers")
		}
		o.Args = []string{"--authgroup", "guests"}
		c = l.connect(o)
		c.Connected(20 * time.Second)
		if s := p.session("alice", isConnected); s.Group != "guests" {
			t.Errorf("group %q", s.Group)
		}
		c.Stop(syscall.SIGINT)
		p.nobodyIn("alice")
	})

	l.sub(t, "certificate", func(t *testing.T) {
		cert, key := ca.issue(t, l, "carol")
		o := stock.ClientOptions{Pin: p.pin(), Args: []string{"-c", cert, "-k", key}}
		c := l.connect(o)
		c.Connected(20 * time.Second)
		l.pings("10.98.0.2")
		c.Stop(syscall.SIGINT)
		p.nobodyIn("carol")
		for _, other := range []*testCA{ca, newTestCA(t)} { // a name that is no user's; another CA
			name := map[bool]string{true: "mallory", false: "carol"}[other == ca]
			cert, key := other.issue(t, l, name)
			o.Args = []string{"-c", cert, "-k", key}
			if code := l.connect(o).Wait(20 * time.Second); code == 0 {
				t.Errorf("%s came in", name)
			}
		}
	})

	l.sub(t, "static address", func(t *testing.T) {
		o := alice
		o.User, o.Password = "steve", "static"
		first := l.connect(o)
		first.Connected(20 * time.Second)
		second := l.connect(o) // his older session gives way
		if tunnel := second.Connected(20 * time.Second); tunnel.Addr4.String() != "10.97.0.77" || tunnel.Addr6.String() != "fd97::77" {
			t.Errorf("%+v", tunnel)
		}
		first.Wait(20 * time.Second)
		second.Stop(syscall.SIGINT)
		p.nobodyIn("steve")
	})

	l.sub(t, "code", func(t *testing.T) {
		out := l.must("", "user", "set", "-f", "users", "oscar", "--totp", "--issuer", "The Lab")
		if !strings.Contains(out, "otpauth://totp/The%20Lab:oscar?") {
			t.Errorf("no URI in:\n%s", out)
		}
		secret := regexp.MustCompile(`(?m)^Secret: (\S+)$`).FindStringSubmatch(out)[1]
		code, err := totp.GenerateCode(secret, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		o := alice
		o.User, o.Password = "oscar", "battery staple"
		o.Args = []string{"--authgroup", "Operations", "--token-mode=totp", "--token-secret=base32:" + secret}
		c := l.connect(o)
		c.Connected(20 * time.Second)
		c.Stop(syscall.SIGINT)
		p.nobodyIn("oscar")
		// The code has been used, and is good no more.
		o.Args, o.Input = []string{"--authgroup", "Operations"}, []string{code}
		if code := l.connect(o).Wait(20 * time.Second); code == 0 {
			t.Error("a code was good twice")
		}
	})

	l.sub(t, "reconnect", func(t *testing.T) {
		c := l.connect(alice)
		tunnel := c.Connected(20 * time.Second)
		before := p.session("alice", isConnected)
		var download *exec.Cmd
		var got bytes.Buffer
		l.On(labClient, func() {
			download = exec.Command("curl", "-sS", "--max-time", "30", "--limit-rate", "1M", fmt.Sprintf("http://10.98.0.2/?times=%d", 8<<20/len(hello)))
			download.Stdout = &got
			l.Check(download.Start())
		})
		time.Sleep(time.Second)
		l.Check(c.Signal(syscall.SIGUSR2)) // lets go of the connection and makes a new one
		defer func() {
			if err := download.Wait(); err != nil || got.String() != strings.Repeat(hello, 8<<20/len(hello)) {
				t.Errorf("a download of before: %v, %d bytes", err, got.Len())
			}
			c.Stop(syscall.SIGINT)
			p.nobodyIn("alice")
		}()
		c.Await(20*time.Second, `(?s)User requested reconnect.*Got CONNECT response: HTTP/1.1 200`)
		l.pings("10.98.0.2", "fd98::2")
		after := p.session("alice", isConnected)
		if after.ID != before.ID || after.Addresses[0] != tunnel.Addr4 || after.Addresses[1] != tunnel.Addr6 {
			t.Errorf("before %+v, after %+v", before, after)
		}
	})

	l.sub(t, "kick", func(t *testing.T) {
		c := l.connect(alice)
		c.Connected(20 * time.Second)
		if out := l.must("", "kick", "alice"); out != "1 ended\n" {
			t.Errorf("kick: %q", out)
		}
		c.Wait(20 * time.Second) // it is told, and does not come back
		p.nobodyIn("alice")
		if _, err := l.run("", "kick", "alice"); err == nil {
			t.Error("nobody was kicked, without an error")
		}
	})

	l.sub(t, "died", func(t *testing.T) {
		c := l.connect(alice)
		tunnel := c.Connected(20 * time.Second)
		c.Stop(syscall.SIGKILL)
		p.session("alice", func(s *gateway.SessionStatus) bool { return !s.Connected && s.Addresses[0] == tunnel.Addr4 })
		p.nobodyIn("alice") // after disconnected_timeout
		c = l.connect(alice)
		if again := c.Connected(20 * time.Second); again.Addr4 != tunnel.Addr4 {
			t.Errorf("the address was %v, and is %v", tunnel.Addr4, again.Addr4)
		}
		// A user who is removed is out, and so is his session.
		l.must("", "user", "rm", "-f", "users", "alice")
		l.must("", "kick", "alice")
		c.Wait(20 * time.Second)
		if code := l.connect(alice).Wait(20 * time.Second); code == 0 {
			t.Error("a removed user came in")
		}
	})

	drops := p.status().Node.Tunnel.Drops
	for why, n := range drops {
		t.Logf("dropped: %d %s", n, why)
	}
}

// sub is t.Run without another goroutine: the thread is the lab's.
func (l *lab) sub(t *testing.T, name string, do func(t *testing.T)) {
	t.Helper()
	began := time.Now()
	failed := t.Failed()
	do(t)
	if t.Failed() && !failed {
		t.Errorf("%s FAILED", name)
	}
	t.Logf("%s: %v", name, time.Since(began).Round(10*time.Millisecond))
}

// TestServeRestart: with bbolt a client comes back by itself after the server was killed, with the same addresses.
func TestServeRestart(t *testing.T) {
	required(t, "openconnect", "curl", "ping")
	l := newLab(t)
	l.write("server.toml", onlyPasswords()+"\n[store]\nengine = \"bbolt\"\n")
	l.write("users", "")
	l.addUser("alice", "correct horse")
	p := l.start("serve", "-c", "server.toml")
	c := l.connect(stock.ClientOptions{Pin: p.pin(), User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default", "--reconnect-timeout", "60"}})
	tunnel := c.Connected(20 * time.Second)
	before := p.session("alice", isConnected)
	for _, how := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		p.stop(how)
		p = l.start("serve", "-c", "server.toml")
		after := p.session("alice", isConnected)
		if after.ID != before.ID || after.Addresses[0] != tunnel.Addr4 || after.Addresses[1] != tunnel.Addr6 {
			t.Errorf("after %v: before %+v, after %+v", how, before, after)
		}
		l.pings("10.98.0.2", "fd98::2")
		l.downloads("10.98.0.2", 1000)
	}
	c.Stop(syscall.SIGINT)
	p.nobodyIn("alice")
}

// onlyPasswords is labConfig without certificates.
func onlyPasswords() string {
	return strings.Replace(strings.Replace(labConfig, `method = "either"`, "", 1), `client_ca = "ca.pem"`, "", 1)
}

// twoClients starts a server and connects alice, and bob from the lan.
func (l *lab) twoClients(config string) (p *labProgram, alice, bob stock.Tunnel) {
	l.t.Helper()
	l.write("server.toml", config)
	l.addUser("alice", "correct horse")
	l.addUser("bob", "battery staple")
	p = l.start("serve", "-c", "server.toml")
	o := stock.ClientOptions{Pin: p.pin(), User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default"}}
	alice = l.connect(o).Connected(20 * time.Second)
	o.User, o.Password = "bob", "battery staple"
	bob = l.connectFromLAN(o).Connected(20 * time.Second)
	return p, alice, bob
}

// apart wants that alice does not reach bob.
func (l *lab) apart(bob stock.Tunnel) {
	l.t.Helper()
	for _, a := range []netip.Addr{bob.Addr4, bob.Addr6} {
		if out, err := l.client("ping", "-c", "2", "-i", "0.2", "-W", "1", a.String()); err == nil {
			l.t.Errorf("a client reaches another:\n%s", out)
		}
	}
}

// TestServeClientToClient: clients reach each other if they may, and else do not.
func TestServeClientToClient(t *testing.T) {
	required(t, "openconnect", "curl", "ping")
	l := newLab(t)
	p, _, bob := l.twoClients(strings.Replace(onlyPasswords(), "[auth]", "client_to_client = true\n[auth]", 1))
	l.pings(bob.Addr4.String(), bob.Addr6.String())
	l.downloads(bob.Addr4.String(), 200000)
	l.downloads("["+bob.Addr6.String()+"]", 200000)
	if st := p.status().Node.Router; st == nil || st.Switched == 0 {
		t.Errorf("%+v", st)
	}
	p.stop(syscall.SIGTERM)

	l = newLab(t)
	p, _, bob = l.twoClients(onlyPasswords())
	l.apart(bob)
	if st := p.status().Node.Router; st.Switched != 0 || st.Refused["not allowed"] < 4 {
		t.Errorf("%+v", st)
	}
}

// TestServeTUN: the server drives an interface of the kernel, which routes.
func TestServeTUN(t *testing.T) {
	required(t, "openconnect", "curl", "ping")
	l := newLab(t)
	l.root = true
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("SKIPPED: ", err)
	}
	l.On(labServer, func() {
		for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			l.Check(os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0))
		}
	})
	l.On(labLAN, func() { // the way back, so that nothing needs to be masqueraded
		for _, args := range [][]string{{"route", "add", "10.97.0.0/24", "via", "10.98.0.1", "metric", "1000"}, {"-6", "route", "add", "fd97::/64", "via", "fd98::1", "metric", "4000"}} {
			if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
				t.Fatalf("ip %v: %v\n%s", args, err, out)
			}
		}
	})
	config := strings.Replace(onlyPasswords(), "[auth]", "device = \"tun\"\n[tun]\nname = \"vpn%d\"\n[auth]", 1)
	p, alice, bob := l.twoClients(config[:strings.Index(config, "[router]")])
	l.pings("10.97.0.1", "fd97::1", "10.98.0.1", "fd98::1")
	l.apart(bob)
	st := p.status().Node
	if st.TUN == nil || st.TUN.Name != "vpn0" || st.TUN.ToKernel == 0 || st.ACL == nil || st.ACL.Rules[1].Inbound.Packets < 4 {
		t.Errorf("%+v, %+v", st.TUN, st.ACL)
	}
	l.On(labServer, func() {
		link, err := netlink.LinkByName("vpn0")
		if err != nil || link.Attrs().MTU != 1434 {
			t.Errorf("%+v, %v", link, err)
		}
	})
	if out := l.must("", "kick", "bob"); out != "1 ended\n" {
		t.Errorf("kick: %q", out)
	}
	l.On(labLAN, func() { // bob's interface goes with his client
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
			if _, err := netlink.LinkByName(bob.Interface); err != nil || time.Now().After(end) {
				break
			}
		}
	})
	l.pings("10.98.0.2", "fd98::2")
	l.downloads("10.98.0.2", 200000)
	l.downloads("[fd98::2]", 200000)
	if alice.MTU != 1434 {
		t.Errorf("MTU %d", alice.MTU)
	}
	p.stop(syscall.SIGTERM)
	l.On(labServer, func() {
		if _, err := netlink.LinkByName("vpn0"); err == nil {
			t.Error("the interface is left behind")
		}
	})
}

// TestServeQuick: what penstock serve --quick prints connects.
func TestServeQuick(t *testing.T) {
	required(t, "openconnect", "ping")
	l := newLab(t)
	p := l.start("serve", "--quick", "--host", "10.99.0.2", "--state", filepath.Join(l.dir, "quick"))
	p.await("Ctrl-C")
	m := regexp.MustCompile(`(?m)^  echo (\S+) \| sudo openconnect (.*)$`).FindStringSubmatch(p.String())
	if m == nil {
		t.Fatalf("no command in:\n%s", p.String())
	}
	args := strings.Fields(m[2])
	o := stock.ClientOptions{URL: args[0], Input: []string{m[1]}, Args: args[1:]}
	c := l.connect(o)
	tunnel := c.Connected(20 * time.Second)
	if !tunnel.DTLS || tunnel.Env["CISCO_SPLIT_INC"] != "" {
		t.Errorf("%+v", tunnel)
	}
	// The script makes no default route; the server lets through what is sent to it.
	if out, err := l.client("ip", "route", "add", "10.98.0.0/24", "dev", tunnel.Interface); err != nil {
		t.Fatal(out)
	}
	l.pings("10.98.0.2")
	l.downloads("10.98.0.2", 10)
	if s := p.session("me", isConnected); s.Path != "dtls" {
		t.Errorf("%+v", s)
	}
	c.Stop(syscall.SIGINT)
	p.nobodyIn("me")
}

// testCA signs clients' certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newTestCA(t *testing.T) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert, key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
}

// issue makes a certificate for name and returns its files.
func (ca *testCA) issue(t *testing.T, l *lab, name string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, k.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}
