package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets the scripts run this program as "penstock": the test binary is
// installed under that name and calls the real run.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) != "penstock" {
		// Under nohup the programs that tests start would inherit that SIGHUP is ignored, and honour it.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	testscript.Main(m, map[string]func(){
		"penstock": func() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

func TestScripts(t *testing.T) {
	required(t, "curl", "git", "ssh", "/usr/sbin/sshd") // chromium is too large to require
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("XDG_RUNTIME_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("LOCALHOST", "localhost")
			if _, err := net.LookupHost("localhost"); err != nil { // no /etc/hosts here
				env.Setenv("LOCALHOST", "127.0.0.1")
			}
			return os.Mkdir(filepath.Join(env.WorkDir, "run"), 0o700)
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"await":    await,
			"exits":    exits,
			"expand":   expand,
			"freeport": freeport,
			"http":     serveHTTP,
			"take":     takePort,
			"dns":      serveDNS,
			"tcpecho":  serveTCPEcho,
			"udpecho":  serveUDPEcho,
			"udpsend":  udpSend,
		},
	})
}

// required fails a test for want of a program where the environment says that all
// are there. Elsewhere the scripts that call it skip.
func required(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil && os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
			t.Fatalf("%s is not installed, and PENSTOCK_REQUIRE_TOOLS=1", name)
		}
	}
}

// exits runs a program and checks its exit code, which exec only tells from 0:
//
//	exits CODE PROGRAM [ARG...]
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG...]")
	}
	want := map[string]string{"1": "exit status 1", "2": "exit status 2"}[args[0]]
	if want == "" {
		ts.Fatalf("exits: code %q is none of this program's failures", args[0])
	}
	if err := ts.Exec(args[1], args[2:]...); err == nil || err.Error() != want {
		ts.Fatalf("%v: got %v, want %s", args[1:], err, want)
	}
}

// await runs a program until its standard output matches:
//
//	await REGEXP PROGRAM [ARG...]
func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: await REGEXP PROGRAM [ARG...]")
	}
	re, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var env []string
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR"} {
		env = append(env, name+"="+ts.Getenv(name))
	}
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		cmd := exec.Command(args[1], args[2:]...) // not ts.Exec, which logs every try
		cmd.Dir, cmd.Env = ts.MkAbs("."), env
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err == nil && re.Match(stdout.Bytes()) {
			return
		} else if time.Now().After(end) {
			ts.Fatalf("%v never matches %s: %v\n%s%s", args[1:], args[0], err, stdout.Bytes(), stderr.Bytes())
		}
	}
}

// freeport sets variables to ports that nobody uses for TCP or UDP on loopback:
//
//	freeport NAME...
func freeport(ts *testscript.TestScript, _ bool, args []string) {
	for _, name := range args {
		for {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			ts.Check(err)
			defer l.Close() // when all are found, so that they differ
			port := l.Addr().(*net.TCPAddr).Port
			u, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
			if err != nil {
				continue
			}
			defer u.Close()
			ts.Setenv(name, strconv.Itoa(port))
			break
		}
	}
}

// expand replaces ${NAME} by variables, and ${FILE:name} by the content of a file,
// in files:
//
//	expand FILE...
func expand(ts *testscript.TestScript, _ bool, args []string) {
	for _, file := range args {
		text := os.Expand(ts.ReadFile(file), func(name string) string {
			if content, ok := strings.CutPrefix(name, "FILE:"); ok {
				return strings.TrimSpace(ts.ReadFile(content))
			}
			return ts.Getenv(name)
		})
		ts.Check(os.WriteFile(ts.MkAbs(file), []byte(text), 0o600))
	}
}

// serveHTTP serves the files of a folder until the script ends:
//
//	http PORT FOLDER
func serveHTTP(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:"+args[0])
	ts.Check(err)
	server := &http.Server{Handler: http.FileServer(http.Dir(ts.MkAbs(args[1])))}
	served := make(chan struct{})
	go func() { defer close(served); server.Serve(l) }()
	ts.Defer(func() { server.Close(); <-served })
}

// takePort keeps a port until the script ends:
//
//	take tcp|udp ADDRESS
func takePort(ts *testscript.TestScript, _ bool, args []string) {
	var c io.Closer
	var err error
	if args[0] == "tcp" {
		c, err = net.Listen("tcp", args[1])
	} else {
		c, err = net.ListenPacket("udp", args[1])
	}
	ts.Check(err)
	ts.Defer(func() { c.Close() })
}

// serveUDPEcho answers datagrams until the script ends:
//
//	udpecho PORT
func serveUDPEcho(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:"+args[0])
	ts.Check(err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		b := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				c.WriteTo(b[:n], from)
			}
		}
	}()
	ts.Defer(func() { c.Close(); <-served })
}

// udpSend sends a datagram and wants it back:
//
//	udpsend ADDRESS TEXT
func udpSend(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.Dial("udp", args[0])
	ts.Check(err)
	defer c.Close()
	b := make([]byte, 64<<10)
	for range 50 { // UDP may lose some
		_, err = c.Write([]byte(args[1]))
		ts.Check(err)
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Read(b)
		if err == nil && string(b[:n]) == args[1] {
			return
		}
	}
	ts.Fatalf("%s never answers", args[0])
}
