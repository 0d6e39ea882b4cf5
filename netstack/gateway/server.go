package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A Server lets OpenConnect clients into a network. Its methods may be called from any goroutine.
type Server struct {
	cfg       Config
	log       *slog.Logger
	started   time.Time
	groups    *groups
	scores    *scoreboard
	codes     *codeTries
	strangers strangers
	sessions  *sessionTable
	pair      *keyPair
	node      *netstack.Node
	http      *http.Server
	listeners []net.Listener
	own       map[netip.Addr]bool // of the node, inside
	mtu       int                 // the largest packet inside

	signIns, wrongSignIns atomic.Uint64
	refused               [refusedTooMany + 1]atomic.Uint64 // connections, by admission

	away atomic.Int64 // until when upkeep does not ask the store; Unix time in nanoseconds

	cancel  context.CancelFunc
	tasks   sync.WaitGroup
	closing sync.Once
	err     error // of Close
}

// New starts a server. Its error has every mistake in cfg as a [ConfigError]; it takes cfg.Store also then.
func New(cfg Config) (*Server, error) {
	if cfg.Store == nil {
		cfg.Store = NewMemoryStore()
	}
	s := &Server{started: time.Now()}
	if err := s.start(cfg); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

// start starts the parts from the inside out. On failure the caller calls stop.
func (s *Server) start(cfg Config) error {
	s.cfg = cfg
	if err := s.cfg.complete(); err != nil {
		return err
	}
	cfg = s.cfg
	s.log = cfg.Logger
	s.groups = newGroups(cfg.Profile, cfg.Groups)
	s.scores = newScoreboard(cfg.Ban)
	s.strangers.max = s.scores.cfg.Unknown
	s.codes = newCodeTries()
	s.sessions = newSessionTable(s)
	tlsConfig, err := s.tlsConfig()
	if err != nil {
		return err
	}
	ctx, cancel := s.storeContext()
	defer cancel()
	secret, err := sharedSecret(ctx, cfg.Store)
	if err != nil {
		return storeError(err)
	}
	if err := s.sessions.recover(ctx); err != nil {
		return err
	}
	if err := s.listen(); err != nil {
		return err
	}
	s.serve(tlsConfig, secret)
	return nil
}

// tlsConfig has the certificate, and asks clients for theirs where that is a way in.
func (s *Server) tlsConfig() (*tls.Config, error) {
	cert, key := s.cfg.Certificate, s.cfg.Key
	if cert == "" {
		var err error
		if cert, key, err = selfSigned(s.cfg.StateDir, s.cfg.Names); err != nil {
			return nil, fmt.Errorf("gateway: %w", err)
		}
	}
	var err error
	if s.pair, err = openKeyPair(cert, key, s.log); err != nil {
		return nil, err
	}
	c := &tls.Config{
		GetCertificate: s.pair.get,
		// A frame is one record, and one record is one frame: stock software insists on it.
		DynamicRecordSizingDisabled: true,
	}
	if s.cfg.Method.certificates() {
		if c.ClientCAs, err = readCAs(s.cfg.ClientCAs); err != nil {
			return nil, err
		}
		c.ClientAuth = tls.VerifyClientCertIfGiven
	}
	return c, nil
}

// portTries is how often a port of the system's choice is looked for that is free for TCP and for UDP.
const portTries = 20

// listen opens the TCP ports, and starts the node on the same ports for UDP.
func (s *Server) listen() error {
	node := s.cfg.Node
	if node.MTU == 0 {
		node.MTU = DefaultMTU
	}
	if node.PrivateKey.IsZero() {
		// Nobody knows it: no static peer gets in.
		key, err := netstack.GenerateKey()
		if err != nil {
			return err
		}
		node.PrivateKey = key
	}
	if node.Logger == nil {
		node.Logger = s.log
	}
	if len(node.ACL) == 0 {
		node.ACLLimits.Stateless = true
	}
	node.ACL = s.groups.fence(node.ACL, node.Addresses)
	s.mtu, s.own = node.MTU, map[netip.Addr]bool{}
	for _, a := range node.Addresses {
		s.own[a.Addr()] = true
	}
	for try := 1; ; try++ {
		ls, err := listenTCP(s.cfg.Listen)
		if err != nil {
			return fmt.Errorf("gateway: %w", err)
		}
		node.Listen = portsOf(ls, s.cfg.Listen)
		s.node, err = netstack.New(node)
		if err == nil {
			s.listeners = ls
			return nil
		}
		closeListeners(ls)
		if !s.anyPort() || try == portTries {
			return err
		}
	}
}

// anyPort tells whether a port is of the system's choice.
func (s *Server) anyPort() bool {
	for _, l := range s.cfg.Listen {
		if l.Port() == 0 {
			return true
		}
	}
	return false
}

// serve starts to answer.
func (s *Server) serve(tlsConfig *tls.Config, secret []byte) {
	handler := &openconnect.Handler{
		Authenticator: signIn{s},
		Sessions:      connector{s},
		Secret:        secret,
		Logger:        s.log,
	}
	s.http = openconnect.NewServer(handler, tlsConfig)
	// It complains about every stranger that hangs up.
	s.http.ErrorLog = slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)
	s.http.ConnContext = withGuest
	for _, l := range s.listeners {
		s.tasks.Go(func() {
			_ = s.http.ServeTLS(&doorman{Listener: l, s: s}, "", "") // http.ErrServerClosed
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.tasks.Go(func() { s.upkeep(ctx) })
}

// ownAddress tells whether a is one of the node's inside.
func (s *Server) ownAddress(a netip.Addr) bool { return s.own[a] }

// networkOf is a client's address with the length of the network that it is part of: that of the node's own
// address, if it is in there.
func (s *Server) networkOf(a netip.Addr) netip.Prefix {
	for _, p := range s.cfg.Node.Addresses {
		if p.Contains(a) {
			return netip.PrefixFrom(a, p.Bits())
		}
	}
	return netip.PrefixFrom(a, a.BitLen())
}

// portOf is the UDP port that a client is told: that by which it has come, where there are several.
func (s *Server) portOf(c *openconnect.Client) int {
	if s.cfg.PublicPort != 0 {
		return s.cfg.PublicPort
	}
	if p := c.Local.Port(); p != 0 {
		return int(p)
	}
	return int(s.Addrs()[0].Port())
}

// Addrs are the addresses that the server listens on, with the ports that the system chose.
func (s *Server) Addrs() (addrs []netip.AddrPort) {
	for _, l := range s.listeners {
		if a, ok := l.Addr().(*net.TCPAddr); ok {
			addrs = append(addrs, a.AddrPort())
		}
	}
	return addrs
}

// Node is the inside: a program can dial clients and listen for them.
func (s *Server) Node() *netstack.Node { return s.node }

// Pin is the server's key as openconnect --servercert wants it, "pin-sha256:...".
func (s *Server) Pin() string {
	c, err := s.pair.get(nil)
	if err != nil || c.Leaf == nil {
		return ""
	}
	return pin(c.Leaf)
}

// SelfSigned tells whether the certificate is the server's own, so that clients need the pin.
func (s *Server) SelfSigned() bool { return s.cfg.Certificate == "" }

// Kick ends the sessions of a user, or the one of an ID as [Status] shows it or with an address. It returns how many
// it has ended, here or in the store.
func (s *Server) Kick(ctx context.Context, what string) (n int, err error) {
	list, err := s.Sessions(ctx)
	if err != nil {
		return 0, err
	}
	addr, _ := netip.ParseAddr(what)
	for _, st := range list {
		match := st.User == what || st.ID == what
		for _, a := range st.Addresses {
			match = match || a == addr
		}
		if !match {
			continue
		}
		if err := s.sessions.endID(ctx, st.id, "ended by the operator"); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}

// Close stops the server: no new connections; then the clients are told goodbye, unless the store keeps their
// sessions, so that they come back by themselves; then the node closes, and the store. A second Close waits for
// the first.
func (s *Server) Close() error {
	s.closing.Do(func() { s.err = s.stop() })
	return s.err
}

// stop stops what was started.
func (s *Server) stop() error {
	var errs []error
	if s.cancel != nil {
		s.cancel()
	}
	if s.http != nil {
		errs = append(errs, s.http.Close()) // the listeners too
	}
	s.tasks.Wait()
	if s.sessions != nil {
		s.leave()
	}
	if s.node != nil {
		errs = append(errs, s.node.Close())
	}
	return errors.Join(append(errs, s.cfg.Store.Close())...)
}

// leave lets go of the sessions.
func (s *Server) leave() {
	_, volatile := s.cfg.Store.(*memoryStore)
	ctx, cancel := s.storeContext()
	defer cancel()
	var all sync.WaitGroup
	for _, session := range s.sessions.all() {
		all.Go(func() { // together, as the disk is slow and the network too
			if volatile {
				session.end(ctx, "the server is closing")
			} else {
				session.abandon(ctx)
			}
		})
	}
	all.Wait()
}

// abandon leaves the session in the store, and its client without an answer: it will ask again, here or elsewhere.
func (s *session) abandon(ctx context.Context) {
	s.connecting.Lock()
	defer s.connecting.Unlock()
	s.mu.Lock()
	if s.ended || s.rec == nil {
		s.mu.Unlock()
		return
	}
	t := s.tunnel
	s.tunnel = nil
	s.mu.Unlock()
	s.touch(ctx, false)
	if t != nil {
		t.handle.Abandon()
	}
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
}

// Command is the command line by which a stock client connects to the server at host as user, who may be "".
func (s *Server) Command(host, user string) string {
	var b strings.Builder
	b.WriteString("openconnect")
	if s.SelfSigned() {
		b.WriteString(" --servercert " + s.Pin())
	}
	port := s.portOf(&openconnect.Client{})
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	fmt.Fprintf(&b, " https://%s", host)
	if port != 443 {
		fmt.Fprintf(&b, ":%d", port)
	}
	if user != "" {
		b.WriteString(" -u " + user)
	}
	return b.String()
}
