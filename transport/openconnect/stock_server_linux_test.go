package openconnect

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Our client against the stock server: ocserv with the configuration that Debian
// installs, in a network namespace of its own.

// ocserv is a running one, at 127.0.0.1:4443 and [::1]:4443 in its namespace.
type ocserv struct {
	t    *testing.T
	ns   netns.NsHandle
	pin  string
	out  output
	dir  string
	cmd  *exec.Cmd
	done chan struct{}

	codes int // given so far
}

const (
	ocservPort    = "4443"
	ocservSecret  = "3132333435363738393031323334353637383930" // of the TOTP, hex
	ocservDefault = "/etc/ocserv/ocserv.conf"
)

// startOcserv runs ocserv with Debian's configuration, but for where things are, and for
// the settings in change: "key = value", "+key = value" for one more, "-key" for none.
func startOcserv(t *testing.T, change ...string) *ocserv {
	t.Helper()
	program := requireTool(t, "ocserv")
	ocpasswd := requireTool(t, "ocpasswd")
	if os.Getuid() != 0 {
		if os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
			t.Fatal("ocserv needs root")
		}
		t.Skip("SKIPPED, NOT TESTED: ocserv needs root")
	}
	o := &ocserv{t: t, dir: shortDir(t), done: make(chan struct{})}
	home := o.enter()
	defer home()

	ca := newAuthority(t)
	certificate, certFile, keyFile := ca.issue("localhost")
	o.pin = Pin(certificate.Leaf)
	passwords := filepath.Join(o.dir, "passwd")
	register := exec.Command(ocpasswd, "-c", passwords, "-g", "staff,ops", testUser)
	register.Stdin = strings.NewReader(testPassword + "\n" + testPassword + "\n")
	if said, err := register.CombinedOutput(); err != nil {
		t.Fatalf("ocpasswd: %v\n%s", err, said)
	}
	codes := filepath.Join(o.dir, "otp")
	if err := os.WriteFile(codes, []byte("HOTP/T30 "+testUser+" - "+ocservSecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(o.dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	settings := append([]string{
		`auth = "plain[passwd=PASSWD]"`,
		"tcp-port = " + ocservPort, "udp-port = " + ocservPort,
		"chroot-dir = " + o.dir, "socket-file = /run/socket", "use-occtl = false", "pid-file = " + o.dir + "/pid",
		"server-cert = " + certFile, "server-key = " + keyFile, "ca-cert = " + ca.file,
		"ipv4-network = 10.77.0.0", "-rate-limit-ms",
	}, change...)
	config := filepath.Join(o.dir, "ocserv.conf")
	files := strings.NewReplacer("PASSWD", passwords, "OTP", codes)
	if err := os.WriteFile(config, configure(t, settings, files), 0o600); err != nil {
		t.Fatal(err)
	}
	o.cmd = exec.Command(program, "--foreground", "--debug", "3", "--config", config)
	o.cmd.Stdout, o.cmd.Stderr = &o.out, &o.out
	o.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := o.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(o.done)
		o.cmd.Wait()
	}()
	t.Cleanup(o.stop)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if conn, err := net.Dial("tcp", "127.0.0.1:"+ocservPort); err == nil {
			conn.Close()
			return o
		}
		if time.Now().After(deadline) {
			t.Fatalf("ocserv does not listen:\n%s", o.out.String())
		}
	}
}

// shortDir is a directory that ocserv's unprivileged processes may enter, with a name
// that leaves room for a socket's (108 bytes).
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "oc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// configure changes settings of Debian's file: the last word on each counts, but for
// those with a leading +, which add to a list.
func configure(t *testing.T, settings []string, files *strings.Replacer) []byte {
	t.Helper()
	file, err := os.ReadFile(ocservDefault)
	if err != nil {
		t.Fatal(err)
	}
	text := string(file)
	for _, s := range settings {
		if s, more := strings.CutPrefix(s, "+"); more {
			text += files.Replace(s) + "\n"
			continue
		}
		s, none := strings.CutPrefix(s, "-")
		key, _, _ := strings.Cut(s, " ")
		text = regexp.MustCompile(`(?m)^`+key+` *=.*$`).ReplaceAllString(text, "")
		if !none {
			text += files.Replace(s) + "\n"
		}
	}
	return []byte(text)
}

// enter makes the namespace and puts this thread into it; the function that it returns
// goes back.
func (o *ocserv) enter() (back func()) {
	o.t.Helper()
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		o.t.Fatal(err)
	}
	o.ns, err = netns.New()
	if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
		runtime.UnlockOSThread()
		o.t.Skipf("SKIPPED: no network namespace can be made here: %v", err)
	} else if err != nil {
		o.t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		o.t.Fatal(err)
	}
	return func() {
		if err := netns.Set(home); err != nil {
			o.t.Error(err) // and the thread is not used again
			return
		}
		home.Close()
		runtime.UnlockOSThread()
	}
}

func (o *ocserv) stop() {
	syscall.Kill(-o.cmd.Process.Pid, syscall.SIGTERM)
	select {
	case <-o.done:
	case <-time.After(5 * time.Second):
		syscall.Kill(-o.cmd.Process.Pid, syscall.SIGKILL)
		<-o.done
	}
	o.ns.Close()
	if o.t.Failed() {
		o.t.Logf("ocserv:\n%s", o.out.String())
	}
}

// dial connects to it from here: the socket is made in the namespace and stays in it.
func (o *ocserv) dial(ctx context.Context, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err := netns.Set(o.ns); err != nil {
			done <- result{nil, err}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func (o *ocserv) options() Options {
	return Options{
		Dialer: Dialer{Pin: o.pin, Proxy: noProxy, Dial: o.dial},
		Server: "127.0.0.1:" + ocservPort, Prompt: credentials(),
	}
}

// withTLS13 allows TLS 1.3, which Debian's configuration does not.
const withTLS13 = `tls-priorities = "NORMAL:%SERVER_PRECEDENCE:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1"`

func TestStockServerDefault(t *testing.T) {
	s := startOcserv(t)
	login := mustSignIn(t, s.options())
	if login.Pin != s.pin || login.Host != "127.0.0.1:"+ocservPort {
		t.Errorf("%+v", login)
	}
	o := ConnectOptions{Dialer: s.options().Dialer, Hostname: "laptop"}
	tunnel, err := Connect(bounded(t), login, o)
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Conn.Close()
	// Debian allows TLS 1.2 and %COMPAT, which leaves out the extended master secret.
	if tunnel.PSK != nil || !strings.Contains(tunnel.NoPSK, "extended master secret") {
		t.Errorf("a key of %d bytes, reason %q", len(tunnel.PSK), tunnel.NoPSK)
	}
	c := tunnel.Settings
	if len(c.Addresses) != 1 || !netip.MustParsePrefix("10.77.0.0/24").Contains(c.Addresses[0].Addr()) || c.Addresses[0].Bits() != 24 {
		t.Errorf("addresses %v", c.Addresses)
	}
	routes := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16")}
	if !slices.Equal(c.Include, routes) {
		t.Errorf("routes %v", c.Include)
	}
	if !slices.Equal(c.DNS, []netip.Addr{netip.MustParseAddr("192.168.1.1")}) || c.DefaultDomain != "example.com" || c.Hostname != "laptop" {
		t.Errorf("DNS %v, domain %q, own name %q", c.DNS, c.DefaultDomain, c.Hostname)
	}
	if c.CSTP.DPD != 90*time.Second || c.CSTP.Keepalive != 32400*time.Second || c.CSTP.RekeyMethod != RekeySSL || c.MTU < 1280 {
		t.Errorf("settings %+v", c)
	}
	if !strings.HasPrefix(c.ServerName, "ocserv 1.") {
		t.Errorf("server %q", c.ServerName)
	}

	// What crypto/tls refuses by itself it does when told to.
	tunnel.Conn.Close()
	t.Setenv("GODEBUG", "tlsunsafeekm=1")
	if tunnel, err = Connect(bounded(t), login, o); err != nil {
		t.Fatal(err)
	}
	defer tunnel.Conn.Close()
	if len(tunnel.PSK) != pskSize || !tunnel.Settings.PSK() || tunnel.Settings.MTU != 1434 {
		t.Errorf("told to: a key of %d bytes, reason %q, settings %+v", len(tunnel.PSK), tunnel.NoPSK, tunnel.Settings)
	}
}

func TestStockServerTLS13(t *testing.T) {
	s := startOcserv(t, withTLS13, "ipv6-network = fd77::/64", "route = 10.0.0.0/8", "+route = fd88::/48",
		"no-route = 10.1.0.0/16", "+dns = fd77::53", "banner = Welcome", "split-dns = corp.example", "+split-dns = lab.example",
		"idle-timeout = 1200", "session-timeout = 7200")
	login := mustSignIn(t, s.options())
	if login.Banner != "Welcome" {
		t.Errorf("banner %q", login.Banner)
	}
	o := ConnectOptions{Dialer: s.options().Dialer}
	tunnel, err := Connect(bounded(t), login, o)
	if err != nil {
		t.Fatal(err)
	}
	c := tunnel.Settings
	if len(tunnel.PSK) != pskSize || !c.PSK() || c.DTLSPort != 4443 || len(c.AppID) != 32 {
		t.Errorf("a key of %d bytes, reason %q, settings %+v", len(tunnel.PSK), tunnel.NoPSK, c)
	}
	if c.BaseMTU != 1500 || c.MTU != InnerMTU(1500, tunnel.Remote.Addr()) || len(c.Addresses) != 2 || c.Banner != "Welcome" {
		t.Errorf("settings %+v", c)
	}
	// IPv6 routes and servers only come to agents that ocserv knows: it knows ours.
	prefix := netip.MustParsePrefix
	if !slices.Equal(c.Include, []netip.Prefix{prefix("10.0.0.0/8"), prefix("fd88::/48")}) || !slices.Equal(c.Exclude, []netip.Prefix{prefix("10.1.0.0/16")}) {
		t.Errorf("routes %v but %v", c.Include, c.Exclude)
	}
	if len(c.DNS) != 2 || !slices.Equal(c.SplitDNS, []string{"corp.example", "lab.example"}) {
		t.Errorf("DNS %v for %q", c.DNS, c.SplitDNS)
	}
	if c.IdleTimeout != 1200*time.Second || c.SessionTimeout != 7200*time.Second || c.SessionRemaining == 0 || c.SessionRemaining > c.SessionTimeout {
		t.Errorf("timeouts %v, %v, %v", c.IdleTimeout, c.SessionTimeout, c.SessionRemaining)
	}

	// The same addresses on reconnect.
	tunnel.Conn.Close()
	for _, p := range c.Addresses {
		o.Addresses = append(o.Addresses, p.Addr())
	}
	again, err := Connect(bounded(t), login, o)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(again.Settings.Addresses, c.Addresses) {
		t.Errorf("addresses %v, then %v", c.Addresses, again.Settings.Addresses)
	}
	again.Conn.Close()

	if err := Logout(bounded(t), login, o.Dialer); err != nil {
		t.Fatal(err)
	}
	var gone error
	for range 50 {
		var t *Tunnel
		if t, gone = Connect(context.Background(), login, o); gone != nil {
			break
		}
		t.Conn.Close()
		time.Sleep(50 * time.Millisecond)
	}
	if !errors.Is(gone, ErrCookie) {
		t.Errorf("after the logout: %v", gone)
	}
}

// TestStockServerIPv6 is outside as inside.
func TestStockServerIPv6(t *testing.T) {
	s := startOcserv(t, withTLS13, "ipv6-network = fd77::/64", "-route")
	o := s.options()
	o.Server = "[::1]:" + ocservPort
	tunnel, err := Connect(bounded(t), mustSignIn(t, o), ConnectOptions{Dialer: o.Dialer, NoIPv4: true})
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Conn.Close()
	c := tunnel.Settings
	if c.MTU != 1414 || len(tunnel.PSK) != pskSize || !tunnel.Remote.Addr().Is6() {
		t.Errorf("from %v, settings %+v", tunnel.Remote, c)
	}
	if len(c.Addresses) != 1 || !netip.MustParsePrefix("fd77::/64").Contains(c.Addresses[0].Addr()) || len(c.Include) != 0 {
		t.Errorf("addresses %v, routes %v", c.Addresses, c.Include)
	}
}

func TestStockServerCertificate(t *testing.T) {
	ca := newAuthority(t)
	bob, _, _ := ca.issue("bob")
	s := startOcserv(t, `auth = "certificate"`, "ca-cert = "+ca.file, "cert-user-oid = 2.5.4.3")
	o := s.options()
	o.Prompt, o.Certificate = nil, &bob
	tunnel, err := Connect(bounded(t), mustSignIn(t, o), ConnectOptions{Dialer: o.Dialer})
	if err != nil {
		t.Fatal(err)
	}
	tunnel.Conn.Close()
	o.Certificate = nil
	if _, err := SignIn(bounded(t), o); err == nil {
		t.Error("nobody is let in")
	} else {
		t.Logf("without a certificate: %v", err)
	}
	if !strings.Contains(s.out.String(), "main[bob]") {
		t.Error("ocserv does not know bob")
	}
}

func TestStockServerDenies(t *testing.T) {
	s := startOcserv(t)
	o := s.options()
	asked := 0
	o.Prompt = func(_ context.Context, q Question) (string, error) {
		if q.Field.Kind == FieldText {
			return testUser, nil
		}
		asked++
		if failed := strings.HasPrefix(q.Form.Message, "Login failed."); failed != (q.Try > 0) {
			t.Errorf("try %d: %q", q.Try, q.Form.Message)
		}
		return "wrong", nil
	}
	_, err := SignIn(bounded(t), o)
	if !errors.Is(err, ErrDenied) || asked == 0 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	t.Logf("asked %d times: %v", asked, err)
	if _, err := Connect(bounded(t), &Login{Host: o.Server, Pin: s.pin, Cookie: "bm9zdWNoY29va2llbm9zdWNoY29va2llbm9zdWNoMDE="}, ConnectOptions{Dialer: o.Dialer}); !errors.Is(err, ErrCookie) {
		t.Errorf("unknown cookie: %v", err)
	}
}

func TestStockServerGroupAndCode(t *testing.T) {
	s := startOcserv(t, `auth = "plain[passwd=PASSWD,otp=OTP]"`, "select-group = staff", "+select-group = ops[Operators]")
	for name, group := range map[string]string{"staff": "staff", "Operators": "ops"} {
		t.Run(name, func(t *testing.T) { s.signInWithCode(t, name, group) })
	}
}

// signInWithCode chooses a group by its name or label, and gives password and code.
func (s *ocserv) signInWithCode(t *testing.T, name, group string) {
	o := s.options()
	o.Group = name
	var asked []string
	o.Prompt = func(_ context.Context, q Question) (string, error) {
		asked = append(asked, q.Form.Message)
		if q.Try > 0 {
			return "", errors.New("asked twice")
		}
		switch {
		case q.Field.Kind == FieldText:
			return testUser, nil
		case strings.Contains(q.Form.Message, "OTP"):
			// A code is good once.
			s.codes++
			return totp(t, ocservSecret, time.Now().Add(time.Duration(s.codes-1)*30*time.Second)), nil
		}
		return testPassword, nil
	}
	login, err := SignIn(bounded(t), o)
	if err != nil {
		t.Fatalf("asked %q: %v", asked, err)
	}
	if len(asked) != 3 {
		t.Errorf("asked %q", asked)
	}
	tunnel, err := Connect(bounded(t), login, ConnectOptions{Dialer: o.Dialer})
	if err != nil {
		t.Fatal(err)
	}
	tunnel.Conn.Close()
	if want := "user of group '" + group + "' authenticated"; !strings.Contains(s.out.String(), want) {
		t.Errorf("ocserv does not say %q", want)
	}
}
