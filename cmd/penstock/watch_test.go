package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack"
)

func TestWatchFits(t *testing.T) {
	r := fullReport()
	r.Node.Tunnel.Peers = r.Node.Tunnel.Peers[:1]
	r.Node.Tunnel.Peers[0].Name = "an\x1b[31m escape"
	for _, width := range []int{40, 80, 200} {
		var w watcher
		now := time.Unix(1e9, 0)
		if w.note(r, now) {
			t.Error("rates after one report")
		}
		for i := range 100 {
			next := *r
			next.Node.Tunnel.Peers = append(next.Node.Tunnel.Peers[:0:0], r.Node.Tunnel.Peers...)
			next.Node.Tunnel.Peers[0].OutboundBytes = uint64(i*i) * 1000
			now = now.Add(time.Second)
			if !w.note(&next, now) {
				t.Error("no rates")
			}
		}
		text := w.page(now, width)
		for _, line := range strings.Split(text, "\n") {
			if n := utf8.RuneCountInString(line); n > width {
				t.Errorf("%d of %d columns: %s", n, width, line)
			}
		}
		if strings.ContainsRune(text, 0x1b) || !strings.Contains(text, "an?[31m escape") {
			t.Errorf("%q", text)
		}
		if width >= 80 && !strings.Contains(text, "▇█") {
			t.Errorf("no graph:\n%s", text)
		}
	}
}

// TestWatchRates: the numbers, by hand.
func TestWatchRates(t *testing.T) {
	report := func(pid int, out, in, dropped uint64) *control.Report {
		r := &control.Report{PID: pid}
		r.Node.Tunnel.Peers = fullReport().Node.Tunnel.Peers[:1]
		p := &r.Node.Tunnel.Peers[0]
		p.Name, p.PublicKey, p.OutboundBytes, p.InboundBytes = "b", netstack.PublicKey{1}, out, in
		r.Node.Drops = map[string]uint64{"why": dropped}
		return r
	}
	now := time.Unix(1e9, 0).UTC()
	var w watcher
	w.note(report(1, 5000, 0, 3), now)
	w.note(report(1, 5000+125000, 25, 10), now.Add(2*time.Second))
	line := w.plain(now)
	for _, want := range []string{"01:46:40", "of 1 up", "outbound 500 kb/s", "inbound 100 b/s"} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in %q", want, line)
		}
	}
	if w.fresh["why"] != 7 {
		t.Errorf("new drops %v, want 7", w.fresh)
	}
	if w.note(report(2, 10, 10, 0), now.Add(3*time.Second)) {
		t.Error("rates across a restart")
	}
	if got := sparkline([]float64{0, 1, 4, 8}, 3); got != "▂▅█" {
		t.Errorf("graph %q", got)
	}
	if got := strings.Count(onScreen(strings.Repeat("x\n", 50), 24), "\n"); got != 23 {
		t.Errorf("%d line breaks on 24 lines", got)
	}
}
