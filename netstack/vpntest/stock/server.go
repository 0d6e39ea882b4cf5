//go:build linux

package stock

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ServerOptions describe an ocserv. It configures itself as Debian's package does, but for what is
// said here.
type ServerOptions struct {
	Listen netip.AddrPort    // TCP and UDP; must be an address of the namespace
	Users  map[string]string // passwords by name
	// Groups are the groups of users by name, comma-separated; offered in the sign-in form.
	Groups map[string]string
	// ClientCA is a PEM file: certificates that it signed are asked for too, and where Users is
	// empty they suffice. The user's name is the certificate's UID.
	ClientCA string
	// NoTLS13 is Debian's own default: TLS 1.2 alone.
	NoTLS13 bool
	// Networks are the pools, of which the server takes the first address. One of each family
	// at most; none: 10.97.0.0/24 and fd97::/64.
	Networks []netip.Prefix
	Config   string // further lines for ocserv.conf
}

// Server is a running ocserv.
type Server struct {
	*process
	URL  string
	Pin  string // of its key, as openconnect's --servercert takes it
	Cert string // a PEM file
	Dir  string // where its configuration is
}

// StartServer starts ocserv and returns when it listens.
func StartServer(t testing.TB, o ServerOptions) *Server {
	t.Helper()
	path := find(t, "ocserv")
	// Its workers run as nobody, and look for a socket in there.
	dir, err := os.MkdirTemp("", "ocserv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	s := &Server{URL: "https://" + o.Listen.String(), Dir: dir, Cert: filepath.Join(dir, "server.pem")}
	key := filepath.Join(dir, "server.key")
	s.Pin = certificate(t, o.Listen.Addr(), s.Cert, key)
	var conf strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&conf, format+"\n", args...) }
	auth := "auth"
	if len(o.Users) > 0 {
		passwords(t, &o, filepath.Join(dir, "passwd"))
		line(`auth = "plain[passwd=%s]"`, filepath.Join(dir, "passwd"))
		auth = "enable-auth"
	}
	if o.ClientCA != "" {
		line("%s = certificate", auth)
		line("ca-cert = %s\ncert-user-oid = 0.9.2342.19200300.100.1.1", o.ClientCA)
	}
	tls13 := ""
	if o.NoTLS13 {
		tls13 = ":-VERS-TLS1.3"
	}
	line(`tls-priorities = "NORMAL:%%SERVER_PRECEDENCE:%%COMPAT:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1%s"`, tls13)
	line("listen-host = %s\ntcp-port = %d\nudp-port = %d", o.Listen.Addr(), o.Listen.Port(), o.Listen.Port())
	line("server-cert = %s\nserver-key = %s", s.Cert, key)
	line("run-as-user = nobody\nrun-as-group = nogroup\nisolate-workers = false\nuse-occtl = false")
	line("socket-file = %s\npid-file = %s", filepath.Join(dir, "sock"), filepath.Join(dir, "pid"))
	line("max-clients = 64\nmax-same-clients = 64\nrate-limit-ms = 0\nkeepalive = 32400\nauth-timeout = 40\nping-leases = false")
	line("cookie-timeout = 300\ndeny-roaming = false\nrekey-time = 172800\nrekey-method = ssl\ndevice = vpns\npredictable-ips = true")
	line("cisco-client-compat = true\ndtls-legacy = true\nclient-bypass-protocol = false")
	for _, option := range []string{"dpd = 90", "mobile-dpd = 1800", "switch-to-tcp-timeout = 25", "try-mtu-discovery = false", "max-ban-score = 80"} {
		if !strings.Contains("\n"+o.Config, "\n"+option[:strings.IndexByte(option, '=')]) {
			line("%s", option)
		}
	}
	networks := o.Networks
	if networks == nil {
		networks = []netip.Prefix{netip.MustParsePrefix("10.97.0.0/24"), netip.MustParsePrefix("fd97::/64")}
	}
	for _, n := range networks {
		line("ipv%d-network = %s", map[bool]int{true: 4, false: 6}[n.Addr().Is4()], n)
	}
	line("%s", o.Config)
	file := filepath.Join(dir, "ocserv.conf")
	if err := os.WriteFile(file, []byte(conf.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.process = launch(t, "", path, "-f", "-d", "2", "-c", file)
	s.Await(10*time.Second, `sec-mod initialized`) // it may listen before: then who comes is turned away
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.DialTimeout("tcp", o.Listen.String(), time.Second)
		if err == nil {
			c.Close()
			return s
		}
		if time.Now().After(end) {
			t.Fatalf("ocserv does not listen: %v\n%s\n%s", err, s.Log(), conf.String())
		}
	}
}

// passwords writes the users with ocserv's own tool.
func passwords(t testing.TB, o *ServerOptions, file string) {
	t.Helper()
	for name, password := range o.Users {
		args := []string{"-c", file}
		if g := o.Groups[name]; g != "" {
			args = append(args, "-g", g)
		}
		cmd := exec.Command(find(t, "ocpasswd"), append(args, name)...)
		cmd.Stdin = strings.NewReader(password + "\n" + password + "\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ocpasswd: %v\n%s", err, out)
		}
	}
}

// certificate makes a self-signed certificate and returns the pin of its key.
func certificate(t testing.TB, addr netip.Addr, certFile, keyFile string) (pin string) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "vpn.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{addr.AsSlice()}, DNSNames: []string{"vpn.example"},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	check(err)
	check(os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
	check(os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	check(err)
	sum := sha256.Sum256(public)
	return "pin-sha256:" + base64.StdEncoding.EncodeToString(sum[:])
}
