//go:build unix

package main

import (
	"encoding/json"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// TestNotify: what a service manager hears, from READY to STOPPING, and that a node that is stuck is not
// heard of.
func TestNotify(t *testing.T) {
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(t.TempDir(), "n")})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", socket.LocalAddr().String())
	t.Setenv("WATCHDOG_USEC", "300000")
	next := func() string {
		b := make([]byte, 1000)
		socket.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := socket.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(b[:n]), "\n", " ")
	}
	states := make(chan string, 1)
	stuck := make(chan struct{})
	state := "idle"
	status := func() (s netstack.Status) {
		select {
		case state = <-states:
		default:
		}
		if state == "stuck" {
			<-stuck
		}
		if err := json.Unmarshal([]byte(`{"tunnel": {"peers": [{"state": "`+state+`"}, {}]}}`), &s); err != nil {
			t.Error(err)
		}
		return s
	}
	line := func() string { return nodeLine(status()) }
	m := notifyReady(line, slog.New(slog.DiscardHandler))
	if got := next(); got != "READY=1 STATUS=0 of 2 peers established" {
		t.Errorf("first %q", got)
	}
	if got := next(); got != "WATCHDOG=1 " {
		t.Errorf("then %q", got)
	}
	states <- "established"
	for end := time.Now().Add(10 * time.Second); next() != "WATCHDOG=1 STATUS=1 of 2 peers established"; {
		if time.Now().After(end) {
			t.Fatal("the new state is not told")
		}
	}
	states <- "stuck"
	for quiet := false; !quiet; {
		socket.SetReadDeadline(time.Now().Add(time.Second))
		_, err := socket.Read(make([]byte, 100))
		quiet = err != nil
	}
	close(stuck)
	next()
	m.closing()
	last := ""
	for !strings.HasPrefix(last, "STOPPING=1") {
		last = next()
	}
	if last != "STOPPING=1 STATUS=closing" {
		t.Errorf("at the end %q", last)
	}

	t.Setenv("NOTIFY_SOCKET", "")
	notifyReady(line, slog.New(slog.DiscardHandler)).closing() // nobody listens
}
