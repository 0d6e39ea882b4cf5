package transport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// SessionConfig describes one end of an OpenConnect session.
type SessionConfig struct {
	Name string // for logs and status
	// Client: we have signed in at the far end, and call it. Else it has signed in here, and calls us.
	Client bool
	// Endpoint is where a client finds the server's datagram channel, "host:port". Unused by a server.
	Endpoint string
	// Link is what the first CONNECT has made.
	Link SessionLink
	// AllowedIPs are the inner addresses behind the far end: packets to them go to it, and
	// only packets from them are accepted of it.
	AllowedIPs []netip.Prefix
	// Datagrams and Stream are the intervals of the two channels, as the server has pushed them.
	Datagrams, Stream Intervals
	// TiedChannels: the far end's datagram channel ends with the stream whose CONNECT it belongs to, as that of ocserv
	// does (1.1.6), where one process serves both. A client then gives its datagrams up when the stream is lost or about to be
	// replaced: what it would still send would be taken for the beginning of the next channel, and spoil that.
	TiedChannels bool
	// Events tell the owner what happens to the session.
	Events SessionEvents
}

// SessionLink is what one CONNECT has made: a stream, and the secret for datagrams.
type SessionLink struct {
	// Stream is the TLS connection that carried CONNECT, past its answer: frames follow. It
	// should lie on a [StreamConn] and have DynamicRecordSizingDisabled in its tls.Config, or stock
	// software finds its frames cut in two. The Session takes it.
	//
	// A server may call AddSession or Renew without it, before it answers the CONNECT, and Renew with it afterwards: the client's hello may be
	// quicker than the answer's writer.
	Stream net.Conn
	// Buffered are bytes of the stream that were read with the answer, or before it.
	Buffered []byte

	// AppID names the session in the hellos of its client, 1 to 32 bytes.
	AppID []byte
	// PSK is the key of the datagram channel, 32 bytes out of the exporter of the TLS connection.
	PSK []byte
	// NoDatagrams says, for people, why there is no datagram channel; empty: there is one. With it AppID and
	// PSK are not looked at.
	NoDatagrams string

	// MTU is the largest inner packet either way, as was agreed with CONNECT, in bytes. 0, and anything
	// larger, means Config.InnerMTU. The path of datagrams is probed up to it.
	MTU int
	// PackFrames puts several frames into one TLS record, which is much faster. Only for a far end
	// that is known to read a stream of frames, as Penstock does: stock software wants one frame a record.
	PackFrames bool
}

// Intervals are the clocks of one channel. Zero takes what Config.Timing has.
type Intervals struct {
	DPD       time.Duration // silence after which the far end is asked
	Keepalive time.Duration // idle time after which a NAT is kept open
}

// SessionEvents are called one at a time in the order of what happened, from a goroutine of the session's own.
// They may call the Session and must not call Transport.Close, which waits for them. Any may be nil.
type SessionEvents struct {
	// Closed is called once, when the session has ended. reason is a [*Goodbye] if the far end has ended it,
	// an error that wraps [ErrStreamProtocol] if it sent what is no frame, what was given to Session.Close,
	// or [ErrClosed].
	Closed func(reason error)
	// StreamLost is called when the stream has ended without a goodbye, or has been silent for too
	// long. The session goes on with datagrams if there are any, else it waits, for [Session.Renew] or Close. It is not called for a
	// stream that Renew has replaced.
	StreamLost func(reason error)
	// PathChanged is called when packets take another path from now on, with the reason in words.
	PathChanged func(path SessionPath, why string)
}

// A Goodbye is the end of a session that the far end wanted: a DISCONNECT or TERMINATE.
type Goodbye struct {
	Terminate bool  // TERMINATE, which a server sends; else DISCONNECT
	Code      uint8 // the reason byte; 0xb0 is that of a user. 0 when there is none
	Text      string
}

// ForGood tells whether the far end is not coming back. AnyConnect says goodbye with other reasons than the user's when its
// network has changed, and connects again with the same cookie.
func (g *Goodbye) ForGood() bool { return g.Terminate || g.Code == disconnectBody[0] }

// Error gives the far end's words, with what is not printable replaced.
func (g *Goodbye) Error() string {
	what := "the peer has ended the session"
	if g.Text != "" {
		what += ": " + g.Text
	}
	return what
}

// newGoodbye reads the body of a goodbye, which it borrows.
func newGoodbye(typ frameType, body []byte) *Goodbye {
	g := &Goodbye{Terminate: typ == frameTerminate}
	if len(body) > 0 {
		g.Code = body[0]
		text := body[1:min(len(body), 1+maxGoodbyeText)]
		g.Text = strings.Map(func(r rune) rune {
			if r < ' ' || r == 0x7f || r == '\uFFFD' {
				return '.'
			}
			return r
		}, strings.ToValidUTF8(string(text), "."))
	}
	return g
}

// maxGoodbyeText bounds, in bytes, what is kept of the far end's words.
const maxGoodbyeText = 200

// A Session is one end of an OpenConnect session: a peer that proves itself by a secret out of its TLS
// connection in place of a key, and that can be reached by two channels, datagrams (DTLS) and a stream
// (CSTP). Packets go by datagrams while those are known to arrive, else by the stream.
type Session struct {
	t    *Transport
	cfg  SessionConfig
	peer *peer
	// timing is the Transport's with the intervals pushed; peer.timing points here.
	timing Timing
	mtu    atomic.Int32 // largest inner packet; changes under peer.mu

	secret atomic.Pointer[sharedSecret] // nil without datagrams; replaced under peer.mu

	// halfOpen are the handshakes that the far end has begun and not completed; guarded by halfOpenTable.mu.
	halfOpen []*pending

	streamDPD, streamTimeout, streamKeepalive time.Duration
	byStream                                  struct{ in, out traffic } // the stream's part of the peer's
	lastPacket                                atomic.Int64              // clock reading of the last packet by datagram

	// What follows is guarded by peer.mu.
	stream      *stream   // of the last CONNECT; nil when it was lost
	old         []*stream // replaced, still read
	watch       datagramWatch
	requests    openRequests // by datagram
	path        SessionPath
	why         string // the reason for path
	noDatagrams string
	redial      bool  // a handshake under a new secret is due
	again       bool  // the handshake under way is under an old one
	renewing    bool  // the owner makes a new CONNECT
	untold      error // the stream was lost meanwhile
	streamRTT   time.Duration

	events eventQueue
}

var _ identity = (*Session)(nil)

// AddSession makes a session known, with the stream and the secret of its CONNECT. It takes cfg.Link.Stream, also
// when it fails. It fails for an App-ID in use or a prefix that another peer has.
func (t *Transport) AddSession(cfg SessionConfig) (*Session, error) {
	s, err := t.addSession(cfg)
	if err != nil {
		cfg.Link.close()
		return nil, fmt.Errorf("session %s: %w", cfg.Name, err)
	}
	return s, nil
}

func (t *Transport) addSession(cfg SessionConfig) (*Session, error) {
	secret, err := cfg.Link.secret()
	if err != nil {
		return nil, err
	}
	if cfg.Client && secret != nil && cfg.Endpoint == "" {
		return nil, errors.New("no endpoint for datagrams")
	}
	cfg.AllowedIPs = slices.Clone(cfg.AllowedIPs)
	for i, pfx := range cfg.AllowedIPs {
		cfg.AllowedIPs[i] = pfx.Masked()
	}
	s := newSession(t, cfg, secret)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, ErrClosed
	}
	if err := t.admitPrefixesLocked(cfg.AllowedIPs); err != nil {
		return nil, err
	}
	if !cfg.Client && secret != nil && !t.apps.add(secret.appID, s) {
		return nil, errAppIDTaken
	}
	t.sessions[s] = struct{}{}
	t.enterLocked(s.peer)
	p := s.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	if cfg.Link.Stream != nil {
		s.connectLocked(&cfg.Link, "the session begins")
	}
	p.startLocked()
	return s, nil
}

func newSession(t *Transport, cfg SessionConfig, secret *sharedSecret) *Session {
	s := &Session{t: t, cfg: cfg, timing: t.cfg.Timing, noDatagrams: cfg.Link.NoDatagrams}
	s.mtu.Store(int32(s.mtuOf(&cfg.Link)))
	s.secret.Store(secret)
	if dpd := cfg.Datagrams.DPD; dpd > 0 {
		s.timing.DPDTimeout = inProportion(dpd, s.timing.DPDTimeout, s.timing.DPD)
		s.timing.DPD = dpd
	}
	if !cfg.Client {
		s.timing.RekeyAfterRecords = maxRecords / 4 * 3 // the client's business, until there is no more to wait for
	}
	setPositive(&s.timing.Keepalive, cfg.Datagrams.Keepalive)
	s.streamDPD, s.streamKeepalive = t.cfg.Timing.DPD, t.cfg.Timing.Keepalive
	setPositive(&s.streamDPD, cfg.Stream.DPD)
	s.streamTimeout = inProportion(s.streamDPD, t.cfg.Timing.DPDTimeout, t.cfg.Timing.DPD)
	setPositive(&s.streamKeepalive, cfg.Stream.Keepalive)
	s.peer = &peer{
		t: t, name: cfg.Name, identity: s, session: s, endpoint: cfg.Endpoint,
		allowed: cfg.AllowedIPs, timing: &s.timing,
	}
	s.peer.init(int(s.mtu.Load()))
	return s
}

// mtuOf is what l says of the largest inner packet.
func (s *Session) mtuOf(l *SessionLink) int {
	if l.MTU > 0 {
		return min(l.MTU, s.t.cfg.InnerMTU)
	}
	return s.t.cfg.InnerMTU
}

// inProportion is to d as a is to b. The product of two intervals of some seconds does not fit 64 bits.
func inProportion(d, a, b time.Duration) time.Duration {
	return time.Duration(float64(d) * (float64(a) / float64(b)))
}

func setPositive(v *time.Duration, d time.Duration) {
	if d > 0 {
		*v = d
	}
}

func (l *SessionLink) close() {
	if l.Stream != nil {
		l.Stream.Close()
	}
}

// secret checks the link and returns its secret, nil for one without datagrams.
func (l *SessionLink) secret() (*sharedSecret, error) {
	if l.MTU < 0 {
		return nil, fmt.Errorf("MTU %d", l.MTU)
	}
	if l.NoDatagrams != "" {
		if l.Stream == nil {
			return nil, errors.New("neither stream nor datagrams")
		}
		return nil, nil
	}
	if len(l.AppID) == 0 || len(l.AppID) > maxAppID {
		return nil, fmt.Errorf("App-ID of %d bytes", len(l.AppID))
	}
	if len(l.PSK) != pskSize {
		return nil, fmt.Errorf("PSK of %d bytes, want %d", len(l.PSK), pskSize)
	}
	return &sharedSecret{appID: string(l.AppID), psk: [pskSize]byte(l.PSK)}, nil
}

// Renew gives the session the stream and the secret of a new CONNECT, of a client that has lost the old ones or wants
// new keys. Packets take the new stream at once. The old stream and the old association
// go on with what was under way, until the far end has changed over too. MTU may be another from then on. It takes l.Stream, also when it fails.
func (s *Session) Renew(l SessionLink) error {
	if err := s.renew(l); err != nil {
		l.close()
		return fmt.Errorf("session %s: %w", s.cfg.Name, err)
	}
	s.t.reportMTU()
	return nil
}

func (s *Session) renew(l SessionLink) error {
	secret, err := l.secret()
	if err != nil {
		return err
	}
	if s.cfg.Client && secret != nil && s.cfg.Endpoint == "" {
		return errors.New("no endpoint for datagrams")
	}
	t, p := s.t, s.peer
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.sessions[s]; !known || t.closed {
		return ErrClosed
	}
	if !s.cfg.Client {
		old := s.secret.Load()
		if secret != nil && (old == nil || old.appID != secret.appID) && !t.apps.add(secret.appID, s) {
			return errAppIDTaken
		}
		if old != nil && (secret == nil || old.appID != secret.appID) {
			t.apps.remove(old.appID)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.secret.Store(secret)
	s.noDatagrams = l.NoDatagrams
	if mtu := s.mtuOf(&l); mtu != int(s.mtu.Load()) { // the client is in another network
		s.mtu.Store(int32(mtu))
		p.innerMTU.Store(int32(mtu))
		p.mtu.init(mtu)
	}
	if l.Stream == nil {
		return nil // the rest is for when it is there
	}
	s.redial = secret != nil
	if s.again = p.dialling; s.again && p.hangUp != nil {
		p.hangUp()
	}
	p.attempts, p.nextDial = 0, 0
	s.renewing, s.untold = false, nil
	// The stream is sure to work. What the association does has to show: the far end may have kept it, or not.
	now := t.clock.now()
	s.watch = datagramWatch{died: now, lastAsk: now, mirrored: !s.cfg.Client}
	s.connectLocked(&l, "a new CONNECT")
	return nil
}

// connectLocked takes over the stream of a CONNECT.
func (s *Session) connectLocked(l *SessionLink, why string) {
	st := newStream(s, l)
	s.setStreamLocked(st, why)
	for _, packet := range s.peer.waiting.take() {
		s.divertOne(st, packet)
	}
	st.start()
	s.peer.wakeLocked()
}

// divertOne sends one packet by a stream.
func (s *Session) divertOne(st *stream, packet []byte) {
	switch {
	case len(packet) > int(s.mtu.Load()):
		s.tooBig(packet)
	case st.send(frameData, packet):
		s.peer.out.add(1, len(packet))
		s.byStream.out.add(1, len(packet))
	default:
		s.t.drops.add(DropStreamQueue, 1)
	}
}

// tooBig drops a packet that the session does not carry by any path.
func (s *Session) tooBig(packet []byte) {
	s.t.drops.add(DropTooBig, 1)
	s.t.cfg.TooBig(packet, int(s.mtu.Load()))
}

// Renewing says that the owner is about to make a new CONNECT, or has given that up. In between a goodbye counts as the
// loss of the stream it came by, as servers say it to the old stream when they see the new CONNECT; and the loss of the stream
// is told only once the owner has given up.
func (s *Session) Renewing(on bool) {
	s.peer.mu.Lock()
	defer s.peer.mu.Unlock()
	s.renewing = on
	if on {
		s.tieLocked("a new CONNECT is due")
	}
	if !on && s.untold != nil {
		s.tellLost(s.untold)
		s.untold = nil
	}
}

// Close ends the session and tells the far end why. It does not wait for what
// leaves last, Transport.Close does. SessionEvents.Closed gets reason, or [ErrClosed] for nil.
func (s *Session) Close(reason error) {
	if reason == nil {
		reason = ErrClosed
	}
	s.end(reason)
}

// Abandon ends the session here without a word. Its client finds the stream ended, and may come back with a new CONNECT,
// here or at another server that knows its cookie.
func (s *Session) Abandon() { s.end(errAbandoned) }

// Endpoint is SessionConfig.Endpoint.
func (s *Session) Endpoint() string { return s.cfg.Endpoint }

// end takes the session out of the transport.
func (s *Session) end(reason error) {
	t := s.t
	t.mu.Lock()
	_, known := t.sessions[s]
	if known {
		delete(t.sessions, s)
		if secret := s.secret.Load(); secret != nil && !s.cfg.Client {
			t.apps.remove(secret.appID)
		}
		t.leaveLocked(s.peer)
	}
	t.mu.Unlock()
	if !known {
		return
	}
	s.goodbyeAll(reason)
	t.reportMTU()
	if closed := s.cfg.Events.Closed; closed != nil {
		s.events.add(t, func() { closed(reason) })
	}
}

// goodbyeAll tells the far end why the session ends, by every channel, unless it was the far end that ended it, or
// is to find out for itself.
func (s *Session) goodbyeAll(reason error) {
	var body []byte
	if g := (*Goodbye)(nil); !errors.As(reason, &g) && !errors.Is(reason, errAbandoned) {
		text := reason.Error()
		body = append([]byte{disconnectBody[0]}, text[:min(len(text), maxGoodbyeText)]...)
	}
	s.peer.stop(body)
	s.peer.mu.Lock()
	st, old := s.stream, s.old
	s.peer.mu.Unlock()
	for _, o := range old {
		o.finish(nil, true, lastWordsTime)
	}
	if st != nil {
		st.finish(body, true, lastWordsTime)
	}
}

// client calls the server of the session.
func (s *Session) client(ctx context.Context, conn *handshakeConn) (*agreement, error) {
	secret := s.secret.Load()
	if secret == nil {
		conn.Close()
		return nil, errNoDatagrams
	}
	return s.t.handshaker.sessionClient(ctx, conn, secret)
}

// calls: only the client may, and only where there are datagrams.
func (s *Session) calls() bool { return s.cfg.Client && s.secret.Load() != nil }

// prevails: only one side calls.
func (s *Session) prevails() bool { return true }

// appTable finds the session that a hello names. The inbound pumps ask it for every hello.
type appTable struct {
	mu sync.RWMutex
	m  map[string]*Session
}

func (a *appTable) get(appID []byte) *Session {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.m[string(appID)]
}

func (a *appTable) add(appID string, s *Session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.m[appID] != nil {
		return false
	}
	a.m[appID] = s
	return true
}

func (a *appTable) remove(appID string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.m, appID)
}

// eventQueue calls functions one after the other, in a goroutine that lives while there are any.
type eventQueue struct {
	mu      sync.Mutex
	queue   []func()
	running bool
}

// add never waits. Once Close of the Transport waits for its goroutines, f is called
// by that of Close.
func (q *eventQueue) add(t *Transport, f func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.queue = append(q.queue, f)
	if q.running {
		return
	}
	q.running = true
	if !t.spawn(q.run) {
		go q.run()
	}
}

func (q *eventQueue) run() {
	for {
		q.mu.Lock()
		if len(q.queue) == 0 {
			q.running = false
			q.mu.Unlock()
			return
		}
		f := q.queue[0]
		q.queue = q.queue[1:]
		q.mu.Unlock()
		f()
	}
}
