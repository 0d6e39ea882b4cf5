package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/signin"
)

// No line is read before it is wanted, and no byte beyond it: the rest of the input is somebody else's.
func TestLines(t *testing.T) {
	in := strings.NewReader("first\r\nsecond\nthird")
	l := newLines(in)
	for _, want := range []string{"first", "second", "first"} {
		n := map[string]int{"first": 0, "second": 1}[want]
		if line, ok, err := l.get(t.Context(), n, time.Minute); line != want || !ok || err != nil {
			t.Errorf("line %d: %q, %v, %v", n, line, ok, err)
		}
	}
	if rest, _ := io.ReadAll(in); string(rest) != "third" {
		t.Errorf("left: %q", rest)
	}
	if _, ok, err := l.get(t.Context(), 2, time.Minute); ok || err != nil {
		t.Errorf("beyond the end: %v, %v", ok, err)
	}
}

// An input that stays open and silent is waited for as long as said, or until the program is interrupted.
func TestLinesSilent(t *testing.T) {
	in, out := io.Pipe()
	defer out.Close()
	if _, ok, err := newLines(in).get(t.Context(), 0, 20*time.Millisecond); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
	in2, out2 := io.Pipe()
	defer out2.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(errInterrupted) })
	if _, _, err := newLines(in2).get(ctx, 0, 0); err != errInterrupted {
		t.Errorf("%v", err)
	}
}

func TestLineTooLong(t *testing.T) {
	l := newLines(strings.NewReader(strings.Repeat("x", 2*maxLine)))
	if _, ok, err := l.get(t.Context(), 0, 0); ok || err == nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestCookieOf(t *testing.T) {
	for text, want := range map[string]string{
		"AbC=": "AbC=", " AbC=\n": "AbC=", "webvpn=AbC=": "AbC=", "openconnect_strapkey=x==; webvpn=AbC=": "AbC=",
	} {
		if got := cookieOf(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// The lines are a shell's, whatever is in them.
func TestShellLines(t *testing.T) {
	l := &signin.Login{Host: "[2001:db8::1]:4443", Cookie: `it's $(touch /nowhere) "x`, Pin: "pin-sha256:AAAA="}
	cmd := exec.Command("sh", "-c", `eval "$1"; printf '%s\n' "$COOKIE" "$HOST" "$CONNECT_URL" "$FINGERPRINT"`, "sh", shellLines(l))
	out, err := cmd.Output()
	want := "webvpn=" + l.Cookie + "\n[2001:db8::1]:4443\nhttps://[2001:db8::1]:4443/\npin-sha256:AAAA=\n"
	if err != nil || string(out) != want {
		t.Errorf("%v: %s, want %s", err, out, want)
	}
	if got := shellLines(&signin.Login{Host: "vpn.example:443"}); !strings.Contains(got, "HOST='vpn.example'\n") {
		t.Errorf("the default port: %s", got)
	}
}

// A server's text does not reach the terminal's own language.
func TestPrintable(t *testing.T) {
	if got := printable("\x1b]0;owned\aWelcome,\r\n\x00Ädä\u202e\u009b"); got != "]0;ownedWelcome,\nÄdä" {
		t.Errorf("%q", got)
	}
}

// Mistakes of the command line, all found before anybody is called.
func TestConnectUsage(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	junk := t.TempDir() + "/junk"
	if err := os.WriteFile(junk, []byte("no base 32!"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ args, want string }{
		{"", "accepts one server"},
		{"vpn.example curl http://x/", "a program after --"},
		{"vpn.example --", "no program after --"},
		{"vpn.example --no-dns", "--no-dns needs --tun"},
		{"http://vpn.example", "expected https://"},
		{"vpn.example -C x --cookieonly", "exclude each other"},
		{"vpn.example --passwd-on-stdin --cookie-on-stdin", "exclude each other"},
		{"vpn.example --servercert sha1:00", "--servercert"},
		{"vpn.example -k key.pem", "--sslkey needs --certificate"},
		{"vpn.example -c /nowhere/cert.pem", "/nowhere/cert.pem"},
		{"vpn.example --cafile " + junk, "no certificate in it"},
		{"vpn.example --token-secret " + junk, "no secret of one-time codes"},
		{"vpn.example --token-mode hotp", "expected totp"},
		{"vpn.example --no-system-trust", "nobody would be trusted"},
		{"vpn.example --proxy http://x --no-proxy", "exclude each other"},
		{"vpn.example --proxy ://", "expected an URL"},
		{"vpn.example --base-mtu 100", "expected 576"},
		{"vpn.example --forward 8080=wiki:80", "--forward"},
		{"vpn.example --forward tcp", "has no ="},
		{"vpn.example --log-level loud", "--log-level"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(append([]string{"connect"}, strings.Fields(tt.args)...), strings.NewReader(""), &stdout, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), tt.want) || stdout.Len() > 0 {
			t.Errorf("%s: exit code %d, %s%s; want %q", tt.args, code, &stdout, &stderr, tt.want)
		}
	}
}
