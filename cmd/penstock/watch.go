package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack"
)

// watch shows what a node is doing until ctx ends: as a page that renews itself on a terminal,
// as a line for each interval elsewhere.
func watch(ctx context.Context, path string, interval time.Duration, out io.Writer) error {
	page := isTerminal(out)
	if page {
		// The other screen, without a cursor; and back.
		fmt.Fprint(out, "\x1b[?1049h\x1b[?25l")
		defer fmt.Fprint(out, "\x1b[?25h\x1b[?1049l")
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var w watcher
	for {
		r, err := fetchReport(ctx, path)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		switch now := time.Now(); {
		case page:
			w.note(r, now)
			fmt.Fprint(out, onScreen(w.page(now, terminalWidth(out)), terminalHeight(out)))
		case w.note(r, now):
			if _, err := fmt.Fprintln(out, w.plain(now)); err != nil {
				return err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func fetchReport(ctx context.Context, path string) (*control.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	body, err := control.Fetch(ctx, path)
	if err != nil {
		return nil, err
	}
	var r control.Report
	if err := json.Unmarshal(body, &r); err != nil {
		return nil, fmt.Errorf("the node behind %s answers in another language: %w", path, err)
	}
	return &r, nil
}

// onScreen makes text replace what is on a terminal of some height.
func onScreen(text string, height int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) > height {
		lines = append(lines[:height-1:height-1], "...")
	}
	return "\x1b[H" + strings.Join(lines, "\x1b[K\r\n") + "\x1b[K\x1b[J"
}

// terminalHeight is in lines, 24 where it is not known.
func terminalHeight(w any) int {
	if f, ok := w.(*os.File); ok {
		if _, height, err := term.GetSize(int(f.Fd())); err == nil && height > 1 {
			return height
		}
	}
	return 24
}

// historyLength is how many intervals the graphs reach back at most.
const historyLength = 60

// A watcher turns reports into rates.
type watcher struct {
	report *control.Report
	at     time.Time
	total  traffic
	peers  map[netstack.PublicKey]*traffic
	drops  map[string]uint64 // of the last report
	fresh  map[string]uint64 // of these, since the one before
}

// traffic is the history of one peer, or of all.
type traffic struct {
	outbound, inbound         uint64    // counters of the last report
	outboundRate, inboundRate float64   // bits a second
	outs, ins, sums           []float64 // of the last historyLength intervals; sums are of both
}

func (t *traffic) note(outbound, inbound uint64, span time.Duration) {
	t.outboundRate, t.inboundRate = rate(outbound, t.outbound, span), rate(inbound, t.inbound, span)
	t.outbound, t.inbound = outbound, inbound
	t.outs = remember(t.outs, t.outboundRate)
	t.ins = remember(t.ins, t.inboundRate)
	t.sums = remember(t.sums, t.outboundRate+t.inboundRate)
}

func remember(history []float64, v float64) []float64 {
	history = append(history, v)
	return history[max(0, len(history)-historyLength):]
}

// rate is in bits a second; a counter that has gone back began anew.
func rate(now, before uint64, span time.Duration) float64 {
	if now < before || span <= 0 {
		return 0
	}
	return float64(now-before) * 8 / span.Seconds()
}

// note takes a report. It tells whether there are rates: not after the first, and not after one of
// another process.
func (w *watcher) note(r *control.Report, now time.Time) bool {
	again := w.report != nil && w.report.PID == r.PID && w.report.Node.Started.Equal(r.Node.Started)
	if !again {
		*w = watcher{peers: map[netstack.PublicKey]*traffic{}}
	}
	span := now.Sub(w.at)
	peers := map[netstack.PublicKey]*traffic{}
	var outbound, inbound uint64
	for _, p := range r.Node.Tunnel.Peers {
		t := w.peers[p.PublicKey]
		if t == nil {
			t = &traffic{outbound: p.OutboundBytes, inbound: p.InboundBytes}
		}
		if again {
			t.note(p.OutboundBytes, p.InboundBytes, span)
		}
		peers[p.PublicKey] = t
		outbound += p.OutboundBytes
		inbound += p.InboundBytes
	}
	if again {
		w.total.note(outbound, inbound, span)
	} else {
		w.total = traffic{outbound: outbound, inbound: inbound}
	}
	drops := allDrops(r)
	w.fresh = map[string]uint64{}
	for reason, n := range drops {
		if again && n > w.drops[reason] {
			w.fresh[reason] = n - w.drops[reason]
		}
	}
	w.report, w.at, w.peers, w.drops = r, now, peers, drops
	return again
}

// established counts the peers that packets can flow to.
func (w *watcher) established() (n int) {
	for _, p := range w.report.Node.Tunnel.Peers {
		if string(p.State) == "established" {
			n++
		}
	}
	return n
}

func sum(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}

// plain is one line of fixed columns.
func (w *watcher) plain(now time.Time) string {
	n := &w.report.Node
	return fmt.Sprintf("%s  peers %d of %d up  outbound %s  inbound %s  TCP %d  drops +%d",
		now.Format(time.TimeOnly), w.established(), len(n.Tunnel.Peers),
		bits(w.total.outboundRate), bits(w.total.inboundRate), n.TCP.Established, sum(w.fresh))
}

// page is the whole view, no line of it longer than width.
func (w *watcher) page(now time.Time, width int) string {
	n := &w.report.Node
	var b strings.Builder
	line := func(format string, args ...any) {
		b.WriteString(cut(fmt.Sprintf(format, args...), width) + "\n")
	}
	line("penstock %s  up %s  mtu %d", joined(n.Addresses), span(now.Sub(n.Started)), n.MTU)
	line("%d of %d peers up  %d TCP connections  %d segments retransmitted of %d",
		w.established(), len(n.Tunnel.Peers), n.TCP.Established, n.TCP.Retransmits, n.TCP.SegmentsSent)
	line("outbound %10s %s", bits(w.total.outboundRate), sparkline(w.total.outs, historyLength))
	line("inbound  %10s %s", bits(w.total.inboundRate), sparkline(w.total.ins, historyLength))
	line("")
	const nameWidth, graphAt = 16, 16 + 1 + 12 + 1 + 12 + 1 + 12 + 1 + 9 + 1
	graph := min(max(width-graphAt, 8), historyLength)
	line("%-*s %-12s %12s %12s %9s", nameWidth, "peer", "state", "outbound", "inbound", "rtt")
	row := func(name, state string, t *traffic, rtt string) {
		line("%s %s %12s %12s %9s %s", padded(name, nameWidth), padded(state, 12), bits(t.outboundRate), bits(t.inboundRate), rtt, sparkline(t.sums, graph))
	}
	for _, p := range n.Tunnel.Peers {
		rtt := ""
		if p.RTT > 0 {
			rtt = fmt.Sprintf("%.1f ms", float64(p.RTT)/1e6)
			if p.RTT >= time.Second {
				rtt = fmt.Sprintf("%.0f ms", float64(p.RTT)/1e6)
			}
		}
		row(peerName(p.Name, p.PublicKey.String()), string(p.State), w.peers[p.PublicKey], rtt)
	}
	for _, r := range n.Relays {
		line("%s %s %s to %s: %d open of %d, %d failed", r.Kind, r.Network, r.Listen, r.To, r.Open, r.Total, r.Failed)
	}
	line("")
	if len(w.drops) == 0 {
		line("no drops")
	}
	for _, reason := range slices.Sorted(maps.Keys(w.drops)) {
		fresh := ""
		if n := w.fresh[reason]; n > 0 {
			fresh = fmt.Sprintf("+%d", n)
		}
		line("%10d %8s dropped: %s", w.drops[reason], fresh, reason)
	}
	return b.String()
}

// bits is a rate with three digits or so.
func bits(perSecond float64) string {
	units := []string{"b/s", "kb/s", "Mb/s", "Gb/s", "Tb/s"}
	u := 0
	for perSecond >= 999.5 && u < len(units)-1 {
		perSecond /= 1000
		u++
	}
	if u == 0 || perSecond >= 99.95 {
		return fmt.Sprintf("%.0f %s", perSecond, units[u])
	}
	return fmt.Sprintf("%.1f %s", perSecond, units[u])
}

// sparkline draws the last values, the newest at the right, as high as their largest.
func sparkline(values []float64, width int) string {
	levels := []rune("▁▂▃▄▅▆▇█")
	values = values[max(0, len(values)-width):]
	most := 0.0
	for _, v := range values {
		most = max(most, v)
	}
	var b strings.Builder
	for _, v := range values {
		switch {
		case v <= 0:
			b.WriteByte(' ')
		default:
			b.WriteRune(levels[min(int(v/most*float64(len(levels))), len(levels)-1)])
		}
	}
	return b.String()
}

// padded is s in exactly width columns.
func padded(s string, width int) string {
	s = cut(s, width)
	return s + strings.Repeat(" ", width-utf8.RuneCountInString(s))
}

// cut is s in at most width columns, without control characters: names come from a file.
func cut(s string, width int) string {
	r := []rune(strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x7f {
			return '?'
		}
		return c
	}, s))
	if len(r) > width {
		r = append(r[:width-1:width-1], '…')
	}
	return strings.TrimRight(string(r), " ")
}
