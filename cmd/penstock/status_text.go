package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack"
)

// columns is the width that the text of penstock status keeps to.
const columns = 80

// page collects blocks of a heading with lines of a key and a value below it.
type page struct{ b strings.Builder }

func (p *page) heading(format string, args ...any) {
	if p.b.Len() > 0 {
		p.b.WriteByte('\n')
	}
	p.wrapped(0, fmt.Sprintf(format, args...))
}

const indent, keyWidth = 2, 11

// line writes a key and its value, the value continued below itself.
func (p *page) line(key, format string, args ...any) {
	fmt.Fprintf(&p.b, "%*s%-*s ", indent, "", keyWidth, key)
	p.wrapped(indent+keyWidth+1, fmt.Sprintf(format, args...))
}

// wrapped writes text whose first line begins at column at; it breaks between
// words, and within one that is too long for a line.
func (p *page) wrapped(at int, text string) {
	used := at
	for i, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		if i > 0 {
			if used+1+n <= columns {
				p.b.WriteByte(' ')
				used++
			} else {
				fmt.Fprintf(&p.b, "\n%*s", at+1, "")
				used = at + 1
			}
		}
		for used+n > columns {
			head := string([]rune(word)[:columns-used])
			fmt.Fprintf(&p.b, "%s\n%*s", head, at+1, "")
			word, n = word[len(head):], n-(columns-used)
			used = at + 1
		}
		p.b.WriteString(word)
		used += n
	}
	p.b.WriteByte('\n')
}

// statusText is what penstock status prints for people.
func statusText(r *control.Report, now time.Time) string {
	p := &page{}
	n := &r.Node
	p.heading("node %s", n.PublicKey)
	p.line("config", "%s", r.Config)
	p.line("running", "for %s, process %d, version %s", span(now.Sub(n.Started)), r.PID, r.Version)
	p.line("address", "%s", joined(n.Addresses))
	p.line("mtu", "%d bytes", n.MTU)
	p.openconnect(r, now)
	p.server(r, now)
	p.peers(r, now)
	p.sockets(r)
	p.tun(r)
	p.stack(r)
	p.relays(r)
	p.router(r)
	p.acl(r)
	p.drops(r)
	return p.b.String()
}

func (p *page) openconnect(r *control.Report, now time.Time) {
	s := r.Node.OpenConnect
	if s == nil {
		return
	}
	p.heading("tunnel to %s: %s", s.Server, s.State)
	p.line("remote", "%s", s.Remote)
	p.line("packets by", "%s (%s)", s.Path, s.Why)
	p.line("behind it", "%s", joined(s.AllowedIPs))
	p.line("connected", "%s ago, %d times again", span(now.Sub(s.Connected)), s.Reconnects)
	if s.LastError != "" {
		p.line("last error", "%s", s.LastError)
	}
}

func (p *page) server(r *control.Report, now time.Time) {
	s := r.Server
	if s == nil {
		return
	}
	p.heading("server %s", joined(s.Listen))
	p.line("clients", "%d, %d sessions", s.Clients, s.Sessions)
	p.line("sign-ins", "%d, %d wrong", s.SignIns, s.WrongSignIns)
	for _, why := range slices.Sorted(maps.Keys(s.Refused)) {
		p.line("refused", "%d connections: %s", s.Refused[why], why)
	}
	p.line("bans", "%d in all, %d now", s.Bans, len(s.Banned))
	for _, b := range s.Banned {
		p.line("", "%s for %s", b.Source, span(b.Until.Sub(now)))
	}
}

func (p *page) peers(r *control.Report, now time.Time) {
	if len(r.Node.Tunnel.Peers) == 0 && r.Node.OpenConnect == nil && r.Server == nil {
		p.heading("no peers")
	}
	for _, peer := range r.Node.Tunnel.Peers {
		p.heading("peer %s: %s", peerName(peer.Name, peer.PublicKey.String()), peer.State)
		p.line("key", "%s", peer.PublicKey)
		switch {
		case peer.Remote.IsValid() && peer.Endpoint != "" && peer.Endpoint != peer.Remote.String():
			p.line("remote", "%s (configured: %s)", peer.Remote, peer.Endpoint)
		case peer.Remote.IsValid():
			p.line("remote", "%s", peer.Remote)
		case peer.Endpoint != "":
			p.line("remote", "%s", peer.Endpoint)
		}
		p.line("allowed", "%s", joined(peer.AllowedIPs))
		if peer.LastHandshake.IsZero() {
			p.line("handshake", "never")
		} else {
			p.line("handshake", "%s ago, %d in all, %s", span(now.Sub(peer.LastHandshake)), peer.Handshakes, peer.CipherSuite)
			heard := "never"
			if !peer.LastInbound.IsZero() {
				heard = span(now.Sub(peer.LastInbound)) + " ago"
			}
			if peer.RTT > 0 {
				heard += ", round trip " + peer.RTT.Round(10*time.Microsecond).String()
			}
			p.line("heard", "%s", heard)
			p.line("path MTU", "%d bytes", peer.InnerMTU)
		}
		p.line("outbound", "%s in %d packets", amount(peer.OutboundBytes), peer.OutboundPackets)
		p.line("inbound", "%s in %d packets", amount(peer.InboundBytes), peer.InboundPackets)
		if peer.LastError != "" {
			p.line("last error", "%s", peer.LastError)
		}
	}
}

func (p *page) sockets(r *control.Report) {
	for _, s := range r.Node.Tunnel.Sockets {
		p.heading("socket %s", s.Local)
		c := s.Capabilities
		gso := c.GSO.String()
		if c.GSO.On {
			gso = fmt.Sprintf("on, %d datagrams a message", c.MaxSegments)
			if c.GSO.Reason != "" {
				gso += ": " + c.GSO.Reason
			}
		}
		p.line("GSO", "%s", gso)
		p.line("GRO", "%s", c.GRO)
		p.line("batches", "%s", c.MessageBatches)
		p.line("no fragm.", "%s", c.DontFragment)
		p.line("buffers", "%s receive, %s send", amount(uint64(c.ReceiveBuffer)), amount(uint64(c.SendBuffer)))
		p.line("outbound", "%s in %d datagrams, %s a system call", amount(s.Stats.BytesOut), s.Stats.DatagramsOut, ratio(s.Stats.DatagramsOut, s.Stats.Sends))
		p.line("inbound", "%s in %d datagrams, %s a system call", amount(s.Stats.BytesIn), s.Stats.DatagramsIn, ratio(s.Stats.DatagramsIn, s.Stats.Receives))
	}
}

func (p *page) tun(r *control.Report) {
	s := r.Node.TUN
	if s == nil {
		return
	}
	p.heading("interface %s", s.Name)
	c := s.Capabilities
	p.line("TSO", "%s", c.TSO)
	p.line("USO", "%s", c.USO)
	if c.GROTCP == c.GROUDP {
		p.line("GRO", "%s", c.GROTCP)
	} else {
		p.line("GRO TCP", "%s", c.GROTCP)
		p.line("GRO UDP", "%s", c.GROUDP)
	}
	p.line("queues", "%d", c.Queues)
	p.line("outbound", "%s, %s segments a packet", amount(s.Outbound.Bytes), ratio(s.Outbound.Segments, s.Outbound.Packets))
	p.line("inbound", "%s, %s segments a packet", amount(s.Inbound.Bytes), ratio(s.Inbound.Segments, s.Inbound.Packets))
	p.line("divided", "%d packets to the kernel, %d to the stack", s.ToKernel, s.ToStack)
	if s.PortConflict != "" {
		p.line("ports", "%s", s.PortConflict)
	}
}

func (p *page) stack(r *control.Report) {
	n := &r.Node
	p.heading("stack")
	super := "on"
	if !n.GSO {
		super = "off: switched off by configuration"
	}
	p.line("superpkts", "%s, %s segments a packet outbound, %s inbound", super, ratio(n.Outbound.Segments, n.Outbound.Packets), ratio(n.Inbound.Segments, n.Inbound.Packets))
	p.line("queue", "%s of %s in use", amount(uint64(n.Queue.Bytes)), amount(uint64(n.Queue.Bound)))
	p.line("TCP", "%d connections, %d segments retransmitted of %d", n.TCP.Established, n.TCP.Retransmits, n.TCP.SegmentsSent)
	p.line("UDP", "%d datagrams sent, %d received", n.UDP.Sent, n.UDP.Received)
}

func (p *page) relays(r *control.Report) {
	for _, s := range r.Node.Relays {
		p.heading("%s %s %s to %s", s.Kind, s.Network, s.Listen, s.To)
		p.line("flows", "%d open, %d in all, %d failed, %d refused", s.Open, s.Total, s.Failed, s.Refused)
		p.line("outbound", "%s", amount(s.OutboundBytes))
		p.line("inbound", "%s", amount(s.InboundBytes))
		if s.DroppedDatagrams > 0 {
			p.line("dropped", "%d datagrams", s.DroppedDatagrams)
		}
		if s.LastError != "" {
			p.line("last error", "%s", s.LastError)
		}
	}
}

func (p *page) router(r *control.Report) {
	s := r.Node.Router
	if s == nil {
		return
	}
	p.heading("router")
	p.line("TCP", "%d open, %d of them half open, %d in all; %s to targets, %s back",
		s.TCP.Open, s.TCP.HalfOpen, s.TCP.Total, amount(s.TCP.BytesToTarget), amount(s.TCP.BytesToClient))
	p.line("UDP", "%d flows, %d in all; %s to targets, %s back", s.UDP.Open, s.UDP.Total, amount(s.UDP.BytesToTarget), amount(s.UDP.BytesToClient))
	p.line("ping", "%d flows, %d in all; %d requests, %d replies", s.ICMP.Open, s.ICMP.Total, s.ICMP.DatagramsToTarget, s.ICMP.DatagramsToClient)
	if s.Echo4 == s.Echo6 {
		p.line("ping by", "%s", s.Echo4)
	} else {
		p.line("ping IPv4", "%s", s.Echo4)
		p.line("ping IPv6", "%s", s.Echo6)
	}
	for _, reason := range slices.Sorted(maps.Keys(s.Refused)) {
		p.line("refused", "%d: %s", s.Refused[reason], reason)
	}
}

func (p *page) acl(r *control.Report) {
	s := r.Node.ACL
	if s == nil {
		return
	}
	p.heading("packet filter")
	if !s.Stateless {
		p.line("flows", "%d known, of %d and %d a peer; %s in %d packets were theirs",
			s.Flows, s.FlowLimit, s.FlowLimitPerPeer, amount(s.Known.Bytes), s.Known.Packets)
	}
	for i, rule := range s.Rules {
		p.line(fmt.Sprintf("rule %d", i+1), "%s", rule.Rule)
		flows := ""
		if !s.Stateless {
			flows = fmt.Sprintf("%d flows, ", rule.Flows)
		}
		p.line("", "%soutbound %s in %d packets, inbound %s in %d", flows,
			amount(rule.Outbound.Bytes), rule.Outbound.Packets, amount(rule.Inbound.Bytes), rule.Inbound.Packets)
	}
	for _, d := range []struct {
		why string
		n   netstack.ACLCount
	}{
		{"that no rule fits", s.NoRule}, {"that only a known flow may have", s.Unknown}, {"that would begin too many flows", s.Full},
	} {
		if d.n.Packets > 0 {
			p.line("dropped", "%d packets, %s, %s", d.n.Packets, amount(d.n.Bytes), d.why)
		}
	}
}

func (p *page) drops(r *control.Report) {
	all := allDrops(r)
	if len(all) == 0 {
		p.heading("no drops")
		return
	}
	p.heading("drops")
	for _, reason := range slices.Sorted(maps.Keys(all)) {
		n, _ := fmt.Fprintf(&p.b, "%*s%*d ", indent, "", keyWidth, all[reason])
		p.wrapped(n, reason)
	}
}

// allDrops are those of the tunnel, the sockets and the stack side together, by reason.
func allDrops(r *control.Report) map[string]uint64 {
	all := maps.Clone(r.Node.Tunnel.Drops)
	if all == nil {
		all = map[string]uint64{}
	}
	for reason, n := range r.Node.Drops {
		all[reason] += n
	}
	if r.Node.TUN != nil {
		for reason, n := range r.Node.TUN.Drops {
			all["interface: "+reason] += n
		}
	}
	for _, s := range r.Node.Tunnel.Sockets {
		for reason, n := range map[string]uint64{
			"send: larger than the interface's MTU": s.Stats.DropTooBig,
			"send: the interface's queue was full":  s.Stats.DropNoBuffers,
			"send: other error":                     s.Stats.DropSendError,
			"receive: larger than its buffer":       s.Stats.DropTruncated,
			"receive: the socket's buffer was full": s.Stats.DropKernel,
		} {
			if n > 0 {
				all[reason] += n
			}
		}
	}
	return all
}

// span is a time that is over, as people say it.
func span(d time.Duration) string {
	day := 24 * time.Hour
	switch d = max(d, 0); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < day:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%02dh", d/day, d%day/time.Hour)
}

// amount is a number of bytes with three digits or so.
func amount(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for f >= 1000 && u < len(units)-1 {
		f /= 1024
		u++
	}
	switch {
	case u == 0:
		return fmt.Sprintf("%d B", n)
	case f < 9.995:
		return fmt.Sprintf("%.2f %s", f, units[u])
	case f < 99.95:
		return fmt.Sprintf("%.1f %s", f, units[u])
	}
	return fmt.Sprintf("%.0f %s", f, units[u])
}

func ratio(n, d uint64) string {
	if d == 0 {
		return "0"
	}
	return fmt.Sprintf("%.1f", float64(n)/float64(d))
}
