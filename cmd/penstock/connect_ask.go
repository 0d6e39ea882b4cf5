package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/term"

	"github.com/penstock-vpn/penstock/netstack/signin"
)

// session makes what signs in. With --passwd-on-stdin it reads the password first, before anybody is called.
func (k *connection) session(ctx context.Context, stdin io.Reader, stderr io.Writer) (*signin.Session, error) {
	o := signin.Options{Dialer: k.dialer, Server: k.server, Group: k.authGroup, User: k.user, TOTP: k.totp}
	if k.passwordStdin {
		if _, ok, err := k.stdin.get(ctx, 0, 0); err != nil {
			return nil, fmt.Errorf("--passwd-on-stdin: %w", err)
		} else if !ok {
			return nil, exitWith(exitUsage, errors.New("--passwd-on-stdin: the standard input has no line"))
		}
		o.Given = func(ctx context.Context, n int) (string, bool, error) { return k.stdin.get(ctx, n, stdinPatience) }
	}
	if in, ok := stdin.(*os.File); ok && !k.nonInter && !k.passwordStdin && term.IsTerminal(int(in.Fd())) {
		o.Ask = (&asker{in: in, out: stderr}).ask
	}
	return signin.New(o), nil
}

// explained adds to an error of a sign-in what the user can do about it.
func (k *connection) explained(err error) error {
	var unknown *signin.CertificateError
	var missing *signin.MissingError
	switch {
	case errors.Is(err, context.Canceled):
		return errInterrupted
	case errors.As(err, &missing):
		flag := map[signin.Missing]string{
			signin.MissingUser:     "give it with --user",
			signin.MissingPassword: "give it with --passwd-on-stdin",
			signin.MissingFactor:   "give the secret of its codes with --token-secret, or the code itself as the second line of --passwd-on-stdin",
			signin.MissingGroup:    "choose one with --authgroup",
			signin.MissingOther:    "run this on a terminal",
		}[missing.What]
		return exitWith(exitUsage, fmt.Errorf("%w; %s", err, flag))
	case errors.As(err, &unknown) && unknown.Want != "":
		return fmt.Errorf("%s shows the key %s, not the one of --servercert.\nIf it has a new key, and you know that from its owner, pass that one", unknown.Host, unknown.Pin)
	case errors.As(err, &unknown):
		return fmt.Errorf("the certificate of %s is not to be trusted: %w.\nIf this is the key of your server, and you know that from its owner, pass\n\t--servercert %s", unknown.Host, unknown.Err, unknown.Pin)
	}
	return err
}

// An asker asks the user on a terminal.
type asker struct {
	in  *os.File
	out io.Writer
}

func (a *asker) ask(ctx context.Context, q signin.Question) (string, error) {
	if q.First {
		said := map[string]bool{}
		for _, text := range []string{q.Form.Banner, q.Form.Error, q.Form.Message} {
			if text = printable(text); text != "" && !said[text] {
				said[text] = true
				fmt.Fprintln(a.out, text)
			}
		}
	}
	label := strings.TrimRight(printable(q.Field.Label), ": ")
	if label == "" {
		label = printable(q.Field.Name)
	}
	switch q.Field.Kind {
	case signin.Password:
		fmt.Fprintf(a.out, "%s: ", label)
		return a.secret(ctx)
	case signin.Select:
		return a.choose(ctx, label, q)
	}
	preset := q.Field.Value
	if preset != "" {
		label += " [" + printable(preset) + "]"
	}
	fmt.Fprintf(a.out, "%s: ", label)
	answer, err := readLine(ctx, a.in)
	if answer == "" {
		answer = preset
	}
	return answer, err
}

// printable is a server's text without what a terminal would obey.
func printable(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r != '\n' && !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, s))
}

// choose offers the choices by number; a name will do, too.
func (a *asker) choose(ctx context.Context, label string, q signin.Question) (string, error) {
	preset := 0
	for i, o := range q.Field.Options {
		if o.Value == q.Field.Value {
			preset = i
		}
		name := printable(o.Label)
		if name == "" || name == printable(o.Value) {
			name = printable(o.Value)
		} else {
			name += " (" + printable(o.Value) + ")"
		}
		fmt.Fprintf(a.out, "%3d  %s\n", i+1, name)
	}
	for range 3 {
		fmt.Fprintf(a.out, "%s [%d]: ", label, preset+1)
		line, err := readLine(ctx, a.in)
		if err != nil {
			return "", err
		}
		if line == "" {
			return q.Field.Options[preset].Value, nil
		}
		for _, o := range q.Field.Options {
			if line == o.Value || line == o.Label {
				return o.Value, nil
			}
		}
		if n, err := strconv.Atoi(line); err == nil && n >= 1 && n <= len(q.Field.Options) {
			return q.Field.Options[n-1].Value, nil
		}
		fmt.Fprintf(a.out, "a number from 1 to %d, or a name\n", len(q.Field.Options))
	}
	return "", errors.New("no choice was made")
}

// secret reads a line without echo.
func (a *asker) secret(ctx context.Context) (string, error) {
	fd := int(a.in.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	type answer struct {
		text []byte
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		text, err := term.ReadPassword(fd)
		got <- answer{text, err}
	}()
	select {
	case <-ctx.Done():
		_ = term.Restore(fd, before) // what else
		fmt.Fprintln(a.out)
		return "", context.Cause(ctx)
	case g := <-got:
		fmt.Fprintln(a.out)
		if errors.Is(g.err, io.EOF) {
			return "", errNoAnswer
		}
		return string(g.text), g.err
	}
}

var errNoAnswer = errors.New("the input has ended without an answer")

// maxLine bounds what is read as one answer, in bytes.
const maxLine = 4096

// readLine reads a line, and no byte beyond it. When ctx ends it returns; the read goes on until there is input.
func readLine(ctx context.Context, in io.Reader) (string, error) {
	type answer struct {
		text string
		err  error
	}
	got := make(chan answer, 1)
	go func() {
		var line []byte
		b := make([]byte, 1)
		for len(line) <= maxLine {
			n, err := in.Read(b)
			if n == 1 && b[0] == '\n' || err != nil && len(line) > 0 {
				got <- answer{text: strings.TrimSuffix(string(line), "\r")}
				return
			}
			if errors.Is(err, io.EOF) {
				err = errNoAnswer
			}
			if err != nil {
				got <- answer{err: err}
				return
			}
			line = append(line, b[:n]...)
		}
		got <- answer{err: fmt.Errorf("a line of more than %d bytes", maxLine)}
	}()
	select {
	case <-ctx.Done():
		return "", context.Cause(ctx)
	case g := <-got:
		return g.text, g.err
	}
}

// stdinPatience is how long the standard input may take for a line that the server's question has made
// necessary.
const stdinPatience = time.Minute

// lines are those of the standard input, read one by one as they are wanted, and kept.
type lines struct {
	in io.Reader

	mu   sync.Mutex
	have []string
	err  error // the input is at its end, or worse
}

func newLines(in io.Reader) *lines { return &lines{in: in} }

// get returns line n, counted from 0; ok is false when the input has no such line, or none within patience. 0 is
// no limit.
func (l *lines) get(ctx context.Context, n int, patience time.Duration) (line string, ok bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	limited := ctx
	if patience > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, patience)
		defer cancel()
	}
	for len(l.have) <= n && l.err == nil {
		line, err := readLine(limited, l.in)
		switch {
		case err == nil:
			l.have = append(l.have, line)
		case ctx.Err() != nil:
			return "", false, context.Cause(ctx)
		default:
			l.err = err // the reader may still be at it, so there is no second one
		}
	}
	if len(l.have) > n {
		return l.have[n], true, nil
	}
	if errors.Is(l.err, errNoAnswer) || errors.Is(l.err, context.DeadlineExceeded) {
		return "", false, nil
	}
	return "", false, l.err
}
