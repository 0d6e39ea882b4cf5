package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A tunnel is the way to the client of a session, as long as it keeps its addresses. Connections come and go: the
// client makes a new one when it has lost the old, and for new keys.
type tunnel struct {
	s         *session
	handle    *transport.Session
	addresses []netip.Addr

	// Guarded by s.mu.
	stream bool // there is a TLS connection
}

// serverName introduces us.
const serverName = "Penstock"

// connect answers a CONNECT. connecting is held.
func (s *session) connect(a *openconnect.Attempt, profile *Profile) (*openconnect.Admission, error) {
	srv := s.table.s
	base := baseMTU(a.Request.BaseMTU)
	mtu := openconnect.InnerMTU(base, a.Client.Remote.Addr())
	asked := 0
	if a.Request.BaseMTU == 0 && a.Request.MTU > 0 { // old clients know nothing of the path, but what they can take
		asked = max(a.Request.MTU, openconnect.InnerMTU(minBaseMTU, a.Client.Remote.Addr()))
	}
	for _, limit := range []int{profile.MTU, srv.mtu, asked} {
		if limit > 0 {
			mtu = min(mtu, limit)
		}
	}
	link := transport.SessionLink{
		NoDatagrams: s.whyNoDatagrams(a, profile), MTU: mtu,
		PackFrames: packs(a.Client.UserAgent), // the cookie may have moved to other software
	}
	settings := s.settings(profile, a)
	settings.BaseMTU, settings.MTU = base, mtu
	if link.NoDatagrams == "" {
		link.AppID = make([]byte, 32)
		rand.Read(link.AppID) // never fails
		link.PSK = a.PSK
		settings.DTLSPort = srv.portOf(a.Client)
		settings.AppID, settings.CipherSuite = link.AppID, openconnect.PSKNegotiate
		// The client's first datagram may be here before its answer has left us.
		if err := s.carry(link, profile, a); err != nil {
			return nil, err
		}
	}
	return &openconnect.Admission{
		Settings: settings,
		Start: func(h *openconnect.Handover) {
			link.Stream, link.Buffered = h.Conn, h.Buffered
			s.connecting.Lock()
			defer s.connecting.Unlock()
			if err := s.carry(link, profile, a); err != nil {
				srv.log.Error("tunnel not made", "session", s.public, "error", err)
				s.lost() // the client comes again
			}
		},
		Abort: func(err error) {
			srv.log.Info("connection lost before the tunnel was up", "session", s.public, "error", err)
			s.lost()
		},
	}, nil
}

// baseMTU is the MTU of the path to a client, from what it believes. 1280 is what any IPv6 path carries, and
// clients say less where an interface has less; below 576 nothing works.
func baseMTU(asked int) int {
	if asked == 0 {
		asked = 1500
	}
	return min(max(asked, minBaseMTU), 1500)
}

// minBaseMTU is what every IPv4 path carries (RFC 791 3.1).
const minBaseMTU = 576

// whyNoDatagrams is "" if the client gets DTLS.
func (s *session) whyNoDatagrams(a *openconnect.Attempt, profile *Profile) string {
	switch {
	case profile.NoUDP:
		return "UDP is switched off"
	case !a.Request.PSK():
		return "the client does not offer DTLS with a pre-shared key"
	case a.PSK == nil:
		return a.NoPSK
	}
	return ""
}

// settings are what the client is told, but for MTU and DTLS.
func (s *session) settings(profile *Profile, a *openconnect.Attempt) openconnect.Settings {
	now := time.Now()
	rekey := openconnect.RekeyNewTunnel
	if profile.Rekey < 0 {
		rekey = openconnect.RekeyNone
	}
	timers := openconnect.Timers{DPD: profile.DPD, Keepalive: profile.Keepalive, Rekey: max(profile.Rekey, 0), RekeyMethod: rekey}
	set := openconnect.Settings{
		ServerName:    serverName,
		Hostname:      a.Request.Hostname,
		Include:       profile.Routes,
		Exclude:       profile.NoRoutes,
		DefaultDomain: strings.Join(profile.Search, " "),
		SplitDNS:      profile.SplitDNS,
		TunnelAllDNS:  profile.AllDNS,
		Banner:        profile.Banner,
		CSTP:          timers, DTLS: timers,
		IdleTimeout:         profile.IdleTimeout,
		SessionTimeout:      profile.SessionTimeout,
		DisconnectedTimeout: profile.DisconnectedTimeout,
		ClientBypass:        true,
	}
	rec, _ := s.record()
	if !rec.Expires.IsZero() {
		set.SessionRemaining = rec.Expires.Sub(now)
	}
	for _, addr := range rec.Address {
		set.Addresses = append(set.Addresses, s.table.s.networkOf(addr))
	}
	for _, dns := range profile.DNS {
		if dns.Is4() || a.Request.FullIPv6 {
			set.DNS = append(set.DNS, dns)
		}
	}
	return set
}

// carry gives the session's tunnel a link, or makes a tunnel of it. It takes link.Stream. connecting is held.
func (s *session) carry(link transport.SessionLink, profile *Profile, a *openconnect.Attempt) error {
	srv := s.table.s
	s.mu.Lock()
	t, ended, rec := s.tunnel, s.ended, s.rec
	s.mu.Unlock()
	if ended {
		closeStream(link)
		return errEnded
	}
	if t != nil && slices.Equal(t.addresses, rec.Address) {
		if err := t.handle.Renew(link); err != nil {
			return err
		}
		s.isUp(t, link, a)
		return nil
	}
	if t != nil {
		s.mu.Lock()
		s.tunnel = nil // its end is not that of the session
		s.mu.Unlock()
		t.handle.Close(errReplaced)
	}
	t = &tunnel{s: s, addresses: rec.Address}
	intervals := transport.Intervals{DPD: profile.DPD, Keepalive: profile.Keepalive}
	cfg := transport.SessionConfig{
		Name: rec.User + "/" + s.public, Link: link, Datagrams: intervals, Stream: intervals,
	}
	for _, addr := range rec.Address {
		cfg.AllowedIPs = append(cfg.AllowedIPs, netip.PrefixFrom(addr, addr.BitLen()))
	}
	ready := make(chan struct{}) // closed when t is the session's
	defer close(ready)
	cfg.Events.Closed = func(reason error) { <-ready; t.closed(reason) }
	cfg.Events.StreamLost = func(reason error) { <-ready; t.streamLost(reason) }
	var err error
	if t.handle, err = srv.node.AddSession(cfg, fenceOf(rec.Group)); err != nil {
		return err
	}
	s.isUp(t, link, a)
	return nil
}

func closeStream(link transport.SessionLink) {
	if link.Stream != nil {
		link.Stream.Close()
	}
}

var errReplaced = errors.New("replaced by a tunnel with other addresses")

// packs tells whether a client reads several frames out of one TLS record: ours does.
func packs(agent string) bool { return strings.Contains(agent, "Penstock") }

// isUp makes t, which has link, the session's tunnel.
func (s *session) isUp(t *tunnel, link transport.SessionLink, a *openconnect.Attempt) {
	now := time.Now()
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		t.handle.Close(errEnded)
		return
	}
	s.tunnel = t
	if link.Stream == nil { // that comes later
		s.left = now
		s.mu.Unlock()
		return
	}
	t.stream = true
	s.active, s.asked = now, now
	rec := s.rec
	s.mu.Unlock()
	dtls := "offered"
	if link.NoDatagrams != "" {
		dtls = link.NoDatagrams
	}
	s.table.s.log.Info("connected", "session", s.public, "user", rec.User, "remote", a.Client.Remote,
		"addresses", joinAddrs(rec.Address), "dtls", dtls, "agent", a.Client.UserAgent)
}

var errEnded = errors.New("the session has ended")

func joinAddrs(list []netip.Addr) string {
	s := make([]string, len(list))
	for i, a := range list {
		s[i] = a.String()
	}
	return strings.Join(s, ",")
}

// closed is called when the transport has no session any more.
func (t *tunnel) closed(reason error) {
	s := t.s
	var bye *transport.Goodbye
	s.mu.Lock()
	mine := s.tunnel == t
	if mine {
		s.tunnel = nil
		s.left = time.Now()
	}
	s.mu.Unlock()
	if !mine {
		return
	}
	if errors.As(reason, &bye) && bye.ForGood() {
		ctx, cancel := s.table.s.storeContext()
		defer cancel()
		s.end(ctx, "goodbye of the client")
		return
	}
	s.table.s.log.Info("tunnel lost", "session", s.public, "reason", reason)
	s.lost()
}

// streamLost is called when the TLS connection is gone and the tunnel may live on.
func (t *tunnel) streamLost(reason error) {
	s := t.s
	s.mu.Lock()
	mine := s.tunnel == t
	if mine {
		t.stream = false
		s.left = time.Now()
	}
	s.mu.Unlock()
	if mine {
		s.table.s.log.Info("connection lost", "session", s.public, "reason", reason)
	}
}

// terminate ends the tunnel and tells the client.
func (t *tunnel) terminate(why string) { t.handle.Close(errors.New(why)) }

// lost notes that there is no client now. The session waits for it.
func (s *session) lost() {
	ctx, cancel := s.table.s.storeContext()
	defer cancel()
	s.mu.Lock()
	if s.ended || s.rec == nil {
		s.mu.Unlock()
		return
	}
	s.left = time.Now()
	s.mu.Unlock()
	s.touch(ctx, false)
}

// storeContext bounds what is not on behalf of a request.
func (s *Server) storeContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), 5*time.Second)
}
