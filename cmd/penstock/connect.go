package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/netstack/signin"
)

// connectFlags are those of penstock connect. Where openconnect(8) has a flag for the same, it has the same
// name here.
type connectFlags struct {
	user, authGroup, userGroup  string
	passwordStdin, nonInter     bool
	tokenMode, tokenSecret      string
	certificate, key            string
	pin, caFile                 string
	noSystemTrust               bool
	cookie                      string
	cookieStdin                 bool
	cookieOnly, authenticate    bool
	printCookie                 bool
	noDTLS, noIPv6              bool
	baseMTU                     int
	proxy                       string
	noProxy                     bool
	userAgent, system, hostname string

	tun          string // name of the interface; empty: none
	noDNS        bool
	socks5, http string
	forwards     []string
	control      string
	level        string
	format       string
}

func newConnect() *cobra.Command {
	var c connectFlags
	cmd := &cobra.Command{
		Use:   "connect [https://]HOST[:PORT][/GROUP] [-u USER] [-- PROGRAM [ARG...]]",
		Short: "connect to an OpenConnect or AnyConnect server",
		Long: `Connect signs in to an OpenConnect server (ocserv, penstock serve) and keeps the tunnel
until it is interrupted. It asks on the terminal for what the server wants to know and
was not given.

No privileges are needed: programs reach the network behind the server through a SOCKS5 and
HTTP proxy (by default one on a port of 127.0.0.1, which is printed) or
forwarded ports. With --tun the whole machine does, through an interface of the kernel. After -- comes a
program that has this network only, as with penstock run.

SIGINT and SIGTERM sign out; SIGHUP leaves the session, so that its cookie can be used
again. Flags that openconnect has too mean the same. docs/connect.md has everything.`,
		Args: func(cmd *cobra.Command, args []string) error {
			dash := cmd.ArgsLenAtDash()
			if len(args) == 0 || dash < 0 && len(args) > 1 || dash >= 0 && dash != 1 {
				return fmt.Errorf("accepts one server, and a program after --; there are %d arguments", len(args))
			}
			if dash == 1 && len(args) == 1 {
				return errors.New("there is no program after --")
			}
			return nil
		},
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return c.runProgram(cmd, args[0], args[1:])
			}
			return c.run(cmd, args[0])
		}),
	}
	c.add(cmd)
	return cmd
}

// add registers the flags.
func (c *connectFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&c.user, "user", "u", "", "the user's `NAME`")
	f.BoolVar(&c.passwordStdin, "passwd-on-stdin", false, "read the password from the standard input, one line; a second factor from the next one")
	f.BoolVar(&c.nonInter, "non-inter", false, "never ask: what was not given is an error")
	f.StringVar(&c.authGroup, "authgroup", "", "the `GROUP` to choose where the server offers several")
	f.StringVarP(&c.userGroup, "usergroup", "g", "", "the `GROUP` at the end of the server's URL")
	f.StringVar(&c.tokenMode, "token-mode", "totp", "how codes are made from --token-secret: `totp`")
	f.StringVar(&c.tokenSecret, "token-secret", "", "the `FILE` with the secret of one-time codes, base32 or an otpauth:// URL")
	f.StringVarP(&c.certificate, "certificate", "c", "", "the client certificate, a PEM `FILE`")
	f.StringVarP(&c.key, "sslkey", "k", "", "its private key, a PEM `FILE` (default: the certificate's)")
	f.StringVar(&c.pin, "servercert", "", "the key that the server must show, `PIN`: pin-sha256:BASE64; authorities are not looked at then")
	f.StringVar(&c.caFile, "cafile", "", "a PEM `FILE` of authorities to trust besides the system's")
	f.BoolVar(&c.noSystemTrust, "no-system-trust", false, "do not trust the system's authorities")
	f.StringVarP(&c.cookie, "cookie", "C", "", "use this `COOKIE` instead of signing in; other users of this machine may see it")
	f.BoolVar(&c.cookieStdin, "cookie-on-stdin", false, "read the cookie from the standard input, one line")
	f.BoolVar(&c.cookieOnly, "cookieonly", false, "sign in, print the cookie and exit")
	f.BoolVar(&c.authenticate, "authenticate", false, "sign in, print what connecting needs as lines for a shell and exit")
	f.BoolVar(&c.printCookie, "printcookie", false, "print the cookie before connecting")
	f.BoolVar(&c.noDTLS, "no-dtls", false, "packets by TLS only")
	f.BoolVar(&c.noIPv6, "disable-ipv6", false, "ask for no IPv6 address")
	f.IntVar(&c.baseMTU, "base-mtu", 0, "what the path to the server carries, in `BYTES` (default 1500)")
	f.StringVarP(&c.proxy, "proxy", "P", "", "reach the server through this proxy, an http:// or socks5:// `URL` (default: $HTTPS_PROXY)")
	f.BoolVar(&c.noProxy, "no-proxy", false, "use no proxy, whatever the environment says")
	f.StringVar(&c.userAgent, "useragent", "", "introduce this program as `STRING`")
	f.StringVar(&c.system, "os", "", "introduce this machine as `SYSTEM`: linux, linux-64, win, mac-intel, android or apple-ios")
	f.StringVar(&c.hostname, "local-hostname", "", "this machine's `NAME` for the server")

	f.StringVar(&c.tun, "tun", "", "give this machine an interface `NAME` to the VPN, with routes and DNS; needs CAP_NET_ADMIN")
	f.Lookup("tun").NoOptDefVal = config.DefaultTUN
	f.BoolVar(&c.noDNS, "no-dns", false, "with --tun: leave this machine's resolver alone")
	f.StringVar(&c.socks5, "socks5", "", "serve a SOCKS5 proxy at `ADDRESS:PORT`")
	f.StringVar(&c.http, "http", "", "serve an HTTP proxy at `ADDRESS:PORT`, which may be that of --socks5")
	f.StringArrayVar(&c.forwards, "forward", nil, "give a port of the VPN one of this machine, `LISTEN=TO`: \"tcp 127.0.0.1:8080=wiki.corp:80\"; repeatable")
	f.StringVar(&c.control, "control", "", "the control socket's `PATH` (default: one named after the server)")
	f.StringVar(&c.level, "log-level", "", "debug, info, warn or error (default info; with a program warn)")
	f.StringVar(&c.format, "log-format", "text", "text or json")
	complete(cmd, "log-level", "debug", "info", "warn", "error")
	complete(cmd, "log-format", "text", "json")
	complete(cmd, "token-mode", "totp")
	complete(cmd, "os", systems...)
}

// systems are the values of X-AnyConnect-Platform that openconnect knows.
var systems = []string{"linux", "linux-64", "win", "mac-intel", "android", "apple-ios"}

// A connection is what the flags and the argument say, checked.
type connection struct {
	*connectFlags
	server   string // URL
	host     string // HOST:PORT
	dialer   signin.Dialer
	totp     *signin.TOTP
	forwards []config.Port
	stdin    *lines
}

// check finds the mistakes of the command line.
func (c *connectFlags) check(server string, stdin io.Reader) (*connection, error) {
	k := &connection{connectFlags: c, server: server, stdin: newLines(stdin)}
	var err error
	if k.host, err = signin.HostPort(server); err != nil {
		return nil, err
	}
	if c.userGroup != "" {
		k.server = strings.TrimRight(server, "/") + "/" + url.PathEscape(c.userGroup)
	}
	given := 0
	for _, one := range []bool{c.cookie != "", c.cookieStdin, c.cookieOnly, c.authenticate} {
		if one {
			given++
		}
	}
	switch {
	case given > 1:
		return nil, errors.New("--cookie, --cookie-on-stdin, --cookieonly and --authenticate exclude each other")
	case c.passwordStdin && c.cookieStdin:
		return nil, errors.New("--passwd-on-stdin and --cookie-on-stdin exclude each other")
	case c.key != "" && c.certificate == "":
		return nil, errors.New("--sslkey needs --certificate")
	case c.tokenMode != "totp":
		return nil, fmt.Errorf("--token-mode %q: expected totp", c.tokenMode)
	case c.noProxy && c.proxy != "":
		return nil, errors.New("--proxy and --no-proxy exclude each other")
	case c.noDNS && c.tun == "":
		return nil, errors.New("--no-dns needs --tun")
	case c.baseMTU != 0 && (c.baseMTU < 576 || c.baseMTU > 65535):
		return nil, fmt.Errorf("--base-mtu %d: expected 576 to 65535", c.baseMTU)
	case c.noSystemTrust && c.caFile == "" && c.pin == "":
		return nil, errors.New("--no-system-trust needs --cafile or --servercert: nobody would be trusted")
	}
	if c.pin != "" {
		if err := signin.CheckPin(c.pin); err != nil {
			return nil, fmt.Errorf("--servercert: %w", err)
		}
	}
	if c.tokenSecret != "" {
		if k.totp, err = readTOTP(c.tokenSecret); err != nil {
			return nil, fmt.Errorf("--token-secret: %w", err)
		}
	}
	for _, text := range c.forwards {
		p, err := config.ParseForward(text)
		if err != nil {
			return nil, fmt.Errorf("--forward %w", err)
		}
		k.forwards = append(k.forwards, p)
	}
	return k, k.setDialer()
}

// setDialer says how the server is reached, and how it is known.
func (k *connection) setDialer() error {
	d := &k.dialer
	d.Pin, d.UserAgent, d.Device.Platform = k.pin, k.userAgent, k.system
	if k.caFile != "" || k.noSystemTrust {
		var pool *x509.CertPool
		var err error
		if pool, err = signin.LoadCAs(k.caFile, !k.noSystemTrust); err != nil {
			return fmt.Errorf("--cafile: %w", err)
		}
		d.RootCAs = pool
	}
	if k.certificate != "" {
		var err error
		if d.Certificate, err = signin.LoadCertificate(k.certificate, k.key); err != nil {
			return err
		}
	}
	switch {
	case k.noProxy:
		d.Proxy = func(*url.URL) (*url.URL, error) { return nil, nil }
	case k.proxy != "":
		text := k.proxy
		if !strings.Contains(text, "://") {
			text = "http://" + text
		}
		u, err := url.Parse(text)
		if err != nil || u.Host == "" {
			return fmt.Errorf("--proxy %q: expected an URL such as http://proxy.example:3128 or socks5://127.0.0.1:1080", k.proxy)
		}
		d.Proxy = func(*url.URL) (*url.URL, error) { return u, nil }
	}
	return nil
}

// readTOTP reads the secret of one-time codes. openconnect wants an @ before a file, and takes the secret itself.
func readTOTP(text string) (*signin.TOTP, error) {
	if strings.HasPrefix(text, "base32:") || strings.HasPrefix(text, "0x") || strings.HasPrefix(text, "otpauth://") {
		return signin.ParseTOTP(text)
	}
	name := strings.TrimPrefix(text, "@")
	secret, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	t, err := signin.ParseTOTP(string(secret))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return t, nil
}

// errInterrupted: a signal has come before the tunnel was up.
var errInterrupted = errors.New("interrupted")

// run is the verb.
func (c *connectFlags) run(cmd *cobra.Command, server string) error {
	k, err := c.check(server, cmd.InOrStdin())
	if err != nil {
		return exitWith(exitUsage, err)
	}
	log, err := newLoggerOf(cmd.ErrOrStderr(), 0, "", c.level, c.format)
	if err != nil {
		return err
	}
	k.dialer.Logger = log
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, endings(c.tun != "")...)
	defer signal.Stop(signals)
	ctx, cancel := interruptible(signals)
	defer cancel()

	if !c.cookieOnly && !c.authenticate {
		return k.tunnel(ctx, cancel, signals, cmd, log)
	}
	session, err := k.session(ctx, cmd.InOrStdin(), cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	login, err := session.SignIn(ctx)
	if err != nil {
		return k.explained(err)
	}
	if c.cookieOnly {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), cookieName+login.Cookie)
	} else {
		_, err = io.WriteString(cmd.OutOrStdout(), shellLines(login))
	}
	return err
}

// interruptible is a context that ends at the first signal, which is put back for whoever comes next. cancel
// ends its watch, and the context only if it was not ended already.
func interruptible(signals chan os.Signal) (ctx context.Context, cancel context.CancelFunc) {
	ctx, end := context.WithCancelCause(context.Background())
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case s := <-signals:
			end(fmt.Errorf("%w (%v)", errInterrupted, s))
			signals <- s
		case <-stop:
		}
	}()
	done := false
	return ctx, func() {
		if !done {
			done = true
			close(stop)
			<-stopped
		}
	}
}

// cookieName is before a cookie's value where openconnect prints and takes one, since its version 9.
const cookieName = "webvpn="

// cookieOf finds the session's cookie in what openconnect prints, or in the bare value.
func cookieOf(text string) string {
	for part := range strings.SplitSeq(text, ";") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(part), cookieName); ok {
			return value
		}
	}
	return strings.TrimSpace(text)
}

// shellLines are what connecting needs, as openconnect --authenticate prints it.
func shellLines(l *signin.Login) string {
	var b strings.Builder
	host := strings.TrimSuffix(l.Host, ":443")
	for _, line := range [][2]string{{"COOKIE", cookieName + l.Cookie}, {"HOST", host}, {"CONNECT_URL", "https://" + host + "/"}, {"FINGERPRINT", l.Pin}} {
		fmt.Fprintf(&b, "%s='%s'\n", line[0], strings.ReplaceAll(line[1], "'", `'\''`))
	}
	return b.String()
}
