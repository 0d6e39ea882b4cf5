package openconnect

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// The stock client against our Handler: openconnect --authenticate, which ends when
// it has a cookie.

// requireTool finds a program, also where Debian keeps it from the PATH of ordinary
// users. It skips the test when it is missing, or fails it where PENSTOCK_REQUIRE_TOOLS is 1.
func requireTool(t *testing.T, name string) string {
	t.Helper()
	for _, candidate := range []string{name, "/usr/sbin/" + name} {
		if path, err := exec.LookPath(candidate); err == nil {
			return path
		}
	}
	if os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
		t.Fatalf("%s is required here, and not installed", name)
	}
	t.Skipf("SKIPPED, NOT TESTED: %s is not installed", name)
	return ""
}

// authenticate runs openconnect --authenticate with a line for each answer, and returns
// what it printed as variables and what it said.
func authenticate(t *testing.T, s *server, answers []string, args ...string) (variables map[string]string, said string, err error) {
	t.Helper()
	program := requireTool(t, "openconnect")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	args = append([]string{"--authenticate", "--servercert", s.pin, "--no-system-trust"}, args...)
	cmd := exec.CommandContext(ctx, program, append(args, "https://"+s.addr)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "HOME="+t.TempDir())
	cmd.Stdin = strings.NewReader(strings.Join(answers, "\n") + "\n")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	variables = make(map[string]string)
	for line := range strings.SplitSeq(out.String(), "\n") {
		if name, value, found := strings.Cut(line, "="); found {
			variables[name] = strings.Trim(value, "'")
			// A build with HPKE puts a key of its own before the cookie.
			if _, cookie, found := strings.Cut(value, "; webvpn="); name == "COOKIE" && found {
				variables[name] = strings.TrimSuffix(cookie, "'")
			}
		}
	}
	if t.Failed() || testing.Verbose() {
		t.Logf("openconnect: %v\n%s%s", err, out.String(), errs.String())
	}
	return variables, errs.String() + out.String(), err
}

func TestStockClientSignsIn(t *testing.T) {
	for _, tt := range []struct {
		name    string
		address string
		gate    func(*gate)
		answers []string
		args    []string
		user    string
	}{
		{"password", "127.0.0.1:0", nil, []string{testPassword}, []string{"-u", testUser, "--passwd-on-stdin"}, testUser},
		{"over IPv6", "[::1]:0", nil, []string{testPassword}, []string{"-u", testUser, "--passwd-on-stdin"}, testUser},
		{"old forms", "127.0.0.1:0", nil, []string{testPassword}, []string{"-u", testUser, "--passwd-on-stdin", "--no-xmlpost"}, testUser},
		{"without keep-alive", "127.0.0.1:0", nil, []string{testPassword}, []string{"-u", testUser, "--passwd-on-stdin", "--no-http-keepalive"}, testUser},
		{"group", "127.0.0.1:0", withGroups, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--authgroup", "staff"}, testUser + "@staff"},
		{"group by label", "127.0.0.1:0", withGroups, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--authgroup", "Operators & co"}, testUser + "@ops"},
		{"group, old forms", "127.0.0.1:0", withGroups, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--authgroup", "staff", "--no-xmlpost"}, testUser + "@staff"},
		{"second factor", "127.0.0.1:0", func(g *gate) { g.factor = "123456" }, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--form-entry", "challenge:answer=123456"}, testUser},
		{"second factor, old forms", "127.0.0.1:0", func(g *gate) { g.factor = "123456" }, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--no-xmlpost", "--form-entry", "challenge:answer=123456"}, testUser},
		{"second factor beside the password", "127.0.0.1:0", func(g *gate) { g.factor, g.together = "123456", true }, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--form-entry", "main:secondary_password=123456"}, testUser},
		{"everything, without keep-alive", "127.0.0.1:0", func(g *gate) { withGroups(g); g.factor = "7" }, []string{testPassword},
			[]string{"-u", testUser, "--passwd-on-stdin", "--authgroup", "Operators & co", "--no-http-keepalive", "--form-entry", "challenge:answer=7"}, testUser + "@ops"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate()
			if tt.gate != nil {
				tt.gate(g)
			}
			s := serve(t, g, tt.address, nil)
			v, said, err := authenticate(t, s, tt.answers, tt.args...)
			if err != nil {
				t.Fatalf("openconnect: %v\n%s", err, said)
			}
			if got := g.user(v["COOKIE"]); got != tt.user {
				t.Errorf("the cookie %q is %q's, want %q's", v["COOKIE"], got, tt.user)
			}
			if old := slices.Contains(tt.args, "--no-xmlpost"); (g.clients[0].URL == "") != old {
				t.Errorf("old forms %v, but the server was called %q", old, g.clients[0].URL)
			}
			if v["FINGERPRINT"] != s.pin {
				t.Errorf("openconnect prints the pin %q, we %q", v["FINGERPRINT"], s.pin)
			}
		})
	}
}

func withGroups(g *gate) {
	g.groups = []Group{{Name: "staff"}, {Name: "ops", Label: "Operators & co"}}
}

func TestStockClientIsRefused(t *testing.T) {
	for _, tt := range []struct {
		name, user string
		answers    []string
		args       []string
		says       string
	}{
		{"wrong password", testUser, []string{"sesame"}, nil, "Wrong user name or password."},
		{"wrong password, old forms", testUser, []string{"sesame"}, []string{"--no-xmlpost"}, "Wrong user name or password."},
		{"for good", "banned", []string{"x"}, nil, "You are banned: <100> & counting."},
		{"no decision", "broken", []string{"x"}, nil, "Unexpected 503 result from server"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGate()
			s := serve(t, g, "127.0.0.1:0", nil)
			_, said, err := authenticate(t, s, tt.answers, append(tt.args, "-u", tt.user, "--passwd-on-stdin", "--non-inter")...)
			if err == nil || !strings.Contains(said, tt.says) {
				t.Errorf("openconnect: %v, said:\n%s\nwant %q", err, said, tt.says)
			}
			if len(g.cookies) != 0 {
				t.Error("somebody is signed in")
			}
		})
	}
}

func TestStockClientTypesTwice(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	// The first password comes from stdin as an option, the second because it is asked.
	v, said, err := authenticate(t, s, []string{"sesame", testPassword}, "-u", testUser, "--passwd-on-stdin")
	if err != nil || g.user(v["COOKIE"]) != testUser {
		t.Errorf("openconnect: %v, cookie %q\n%s", err, v["COOKIE"], said)
	}
	if !strings.Contains(said, "Wrong user name or password.") || !strings.Contains(said, "Mind the gap.") {
		t.Errorf("the user was not told:\n%s", said)
	}
}

func TestStockClientWithCertificate(t *testing.T) {
	g := newGate()
	g.certificate = true
	var ca *authority
	s := serve(t, g, "127.0.0.1:0", func(_ *Handler, c *tls.Config) {
		ca = newAuthority(t)
		c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, ca.pool
	})
	_, cert, key := ca.issue("bob")
	v, said, err := authenticate(t, s, nil, "-c", cert, "-k", key, "--non-inter")
	if err != nil || g.user(v["COOKIE"]) != "bob" {
		t.Errorf("openconnect: %v, the cookie is %q's\n%s", err, g.user(v["COOKIE"]), said)
	}

	_, said, err = authenticate(t, s, nil, "--non-inter")
	if err == nil || !strings.Contains(said, "A client certificate is needed.") {
		t.Errorf("without a certificate: %v\n%s", err, said)
	}

	_, cert, key = newAuthority(t).issue("mallory")
	if _, said, err = authenticate(t, s, nil, "-c", cert, "-k", key, "--non-inter"); err == nil {
		t.Errorf("a stranger's certificate lets in:\n%s", said)
	}
}

// TestStockClientMakesCodes: openconnect knows our second factor for one, and makes the
// code by itself.
func TestStockClientMakesCodes(t *testing.T) {
	const secret = "3132333435363738393031323334353637383930"
	for _, together := range []bool{false, true} {
		var v map[string]string
		var said string
		g := newGate()
		g.together = together
		for range 2 { // a code may end between here and there
			g.factor = totp(t, secret, time.Now())
			s := serve(t, g, "127.0.0.1:0", nil)
			v, said, _ = authenticate(t, s, []string{testPassword}, "-u", testUser, "--passwd-on-stdin", "--non-inter",
				"--token-mode", "totp", "--token-secret", "0x"+secret)
			if v["COOKIE"] != "" {
				break
			}
		}
		if g.user(v["COOKIE"]) != testUser {
			t.Errorf("beside the password %v:\n%s", together, said)
		}
	}
}

// TestStockClientSeesSettings lets openconnect go on to CONNECT and read the answer.
func TestStockClientSeesSettings(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			program := requireTool(t, "openconnect")
			g := newGate()
			g.settings.Banner = "Two\nlines: 100%"
			s := serve(t, g, "127.0.0.1:0", func(_ *Handler, c *tls.Config) { c.MaxVersion = version })
			cookie := g.admit("alice").Cookie
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			// --script-tun gives the packets to a program instead of a device: the program
			// shows the environment that a script gets, and ends, which ends openconnect.
			script := `set | grep -E '^(INTERNAL|CISCO)'; echo "banner=$CISCO_BANNER"; echo ready; exec cat >/dev/null`
			cmd := exec.CommandContext(ctx, program, "--servercert", s.pin, "--cookie-on-stdin", "-v",
				"--script-tun", "--script", script, "https://"+s.addr)
			cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "HOME="+t.TempDir())
			cmd.Stdin = strings.NewReader(cookie + "\n")
			var out output
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var h *Handover
			select {
			case h = <-g.started:
			case <-ctx.Done():
				t.Fatal("no tunnel")
			}
			// That it answers a DPD-REQ proves that it took the whole answer for one.
			h.Conn.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := h.Conn.Write([]byte("STF\x01\x00\x00\x03\x00")); err != nil {
				t.Fatal(err)
			}
			if kind := readFrame(t, h); kind != 4 {
				t.Errorf("a frame of type %d answers a DPD-REQ", kind)
			}
			for ctx.Err() == nil && !strings.Contains(out.String(), "ready") {
				time.Sleep(10 * time.Millisecond)
			}
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
			h.Conn.Close()
			for _, want := range []string{
				"Got CONNECT response: HTTP/1.1 200 CONNECTED",
				"CSTP connected. DPD 30, Keepalive 20",
				"INTERNAL_IP4_ADDRESS='10.9.0.2'", "INTERNAL_IP4_NETMASK='255.255.255.0'", "INTERNAL_IP4_MTU='1434'",
				"INTERNAL_IP6_NETMASK='fd00:9::2/64'", "INTERNAL_IP4_DNS='10.9.0.1'",
				"CISCO_SPLIT_INC_0_ADDR='10.0.0.0'", "CISCO_SPLIT_INC_0_MASKLEN='8'", "CISCO_IPV6_SPLIT_INC_0_ADDR='fd00::'",
				"banner=Two\nlines: 100%\n",
			} {
				if !strings.Contains(out.String(), want) {
					t.Errorf("openconnect does not say %q", want)
				}
			}
			a := g.last(t)
			if !a.Request.PSK() || !a.Request.IPv4 || !a.Request.IPv6 || !a.Request.FullIPv6 || a.Request.BaseMTU == 0 {
				t.Errorf("its request: %+v", a.Request)
			}
			// openconnect's GnuTLS offers no extended master secret (%COMPAT), so in TLS 1.2
			// there is no key to be had.
			if want := version == tls.VersionTLS13; (len(a.PSK) == pskSize) != want || (a.NoPSK == "") != want {
				t.Errorf("a key of %d bytes, reason %q", len(a.PSK), a.NoPSK)
			}
			if t.Failed() {
				t.Log(out.String())
			}
		})
	}
}

// output collects what a program says while it runs.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// readFrame reads a CSTP frame without a body and returns its type.
func readFrame(t *testing.T, h *Handover) byte {
	t.Helper()
	head := h.Buffered
	for len(head) < 8 {
		buffer := make([]byte, 2048)
		n, err := h.Conn.Read(buffer)
		if err != nil {
			t.Fatalf("no frame: %v", err)
		}
		head = append(head, buffer[:n]...)
	}
	if !bytes.HasPrefix(head, []byte("STF\x01")) {
		t.Fatalf("not a frame: %x", head)
	}
	return head[6]
}

// totp is the code of a time: RFC 6238, 30 seconds, 6 digits.
func totp(t *testing.T, secret string, now time.Time) string {
	t.Helper()
	key, err := hex.DecodeString(secret)
	if err != nil {
		t.Fatal(err)
	}
	h := hmac.New(sha1.New, key)
	binary.Write(h, binary.BigEndian, uint64(now.Unix()/30))
	sum := h.Sum(nil)
	offset := sum[len(sum)-1] & 15
	return fmt.Sprintf("%06d", binary.BigEndian.Uint32(sum[offset:])&0x7fffffff%1000000)
}
