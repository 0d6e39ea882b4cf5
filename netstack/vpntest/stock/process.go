//go:build linux

package stock

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// find looks for a program; some that only root runs are not in everybody's PATH.
func find(t testing.TB, name string) string {
	t.Helper()
	for _, at := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(at); err == nil {
			return path
		}
	}
	if os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
		t.Fatalf("%s is not installed, and PENSTOCK_REQUIRE_TOOLS=1", name)
	}
	t.Skipf("SKIPPED: %s is not installed", name)
	return ""
}

// A process is a program under way and what it has printed.
type process struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // of Wait; after exited

	mu  sync.Mutex
	out bytes.Buffer
}

// Write takes what the program prints.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

// Log is what the program has printed so far.
func (p *process) Log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

func launch(t testing.TB, stdin string, path string, args ...string) *process {
	t.Helper()
	p := &process{t: t, name: path[strings.LastIndexByte(path, '/')+1:], cmd: exec.Command(path, args...), exited: make(chan struct{})}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = strings.NewReader(stdin), p, p
	// A group of its own: ocserv's workers are to go with it. WaitDelay: they inherit its output.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 2 * time.Second
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		p.Stop(syscall.SIGTERM)
		if t.Failed() {
			t.Logf("%s:\n%s", p.name, p.Log())
		}
	})
	return p
}

// Stop sends the signal and waits for the end; after 5 s it kills the program and all that it has
// started. It does nothing to one that has ended.
func (p *process) Stop(signal syscall.Signal) {
	select {
	case <-p.exited:
		return
	default:
	}
	p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
	case <-time.After(5 * time.Second):
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.exited
	}
}

// Signal sends a signal and returns.
func (p *process) Signal(signal syscall.Signal) error { return p.cmd.Process.Signal(signal) }

// PID is the process id.
func (p *process) PID() int { return p.cmd.Process.Pid }

// Wait waits for the program to end by itself and returns its exit code; it fails the test
// if that takes longer.
func (p *process) Wait(patience time.Duration) (code int) {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.t.Fatalf("%s has not ended within %v:\n%s", p.name, patience, p.Log())
	}
	var failed *exec.ExitError
	if p.err != nil && !errors.As(p.err, &failed) && !errors.Is(p.err, exec.ErrWaitDelay) {
		p.t.Fatal(p.err)
	}
	return p.cmd.ProcessState.ExitCode()
}

// Await waits until the program has printed what matches the pattern and returns the
// match with its groups; it fails the test if the program ends before, or takes longer.
func (p *process) Await(patience time.Duration, pattern string) []string {
	p.t.Helper()
	re := regexp.MustCompile(pattern)
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		ended := false
		select {
		case <-p.exited:
			ended = true
		default:
		}
		if m := re.FindStringSubmatch(p.Log()); m != nil {
			return m
		}
		if ended || time.Now().After(end) {
			p.t.Fatalf("%s does not say %q (ended: %v):\n%s", p.name, pattern, ended, p.Log())
		}
	}
}
