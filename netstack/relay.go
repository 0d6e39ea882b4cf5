package netstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A Relay joins a listener on one side of a node to a service on the other:
//
//	program ── listener of the system ── Forward ── VPN ── service
//	program ── VPN ── listener of the node ── Publish ── service of the system
//	program ── listener of the system ── ServeProxy ── VPN ── services of the program's choice
//
// TCP is carried with both halves of a connection closing by themselves, and a
// reset on one side as a reset on the other. A UDP client keeps its flow until it
// has been silent for a while, and is answered from the address that it asked.
type Relay struct {
	kind    string // "forward", "publish" or "proxy"
	network string
	to      string
	dial    func(ctx context.Context) (net.Conn, error) // to the service
	handle  func(*tcpFlow)                              // serves a TCP client; runTCP, or a proxy
	limits  relayLimits
	log     *slog.Logger

	addr      net.Addr
	listeners []io.Closer // closed first, which ends the goroutines that accept
	ctx       context.Context
	cancel    context.CancelFunc
	disown    func() // takes the relay off its node

	mu     sync.Mutex
	closed bool
	flows  map[relayFlow]struct{}
	tasks  sync.WaitGroup // every goroutine of the relay; added to under mu unless closed
	done   chan struct{}  // closed when Close has ended
	err    error          // of Close

	failing atomic.Bool // the last attempt to reach the service failed
	count   relayCounters
}

// relayFlow is one TCP connection or UDP client.
type relayFlow interface {
	// abort ends the flow from any goroutine: TCP with a reset, since what has been
	// sent so far is not all.
	abort()
}

// relayLimits bound what strangers can make a relay hold.
type relayLimits struct {
	flows       int           // at once; more are refused, the old ones stay
	dialTimeout time.Duration // for the service to accept
	udpIdle     time.Duration // silence after which a UDP flow is forgotten
	closing     time.Duration // for the goroutines to end in Close
}

// defaultLimits. A flow that moves no data costs two goroutines and two sockets
// and no buffer. RFC 4787 4.3 asks for at least two minutes for UDP.
var defaultLimits = relayLimits{
	flows:       4096,
	dialTimeout: 10 * time.Second,
	udpIdle:     2 * time.Minute,
	closing:     5 * time.Second,
}

// dnsIdle is the udpIdle of a relay to port 53. RFC 4787 4.3 allows a shorter one
// for an application whose needs are known, and resolvers ask every question from
// a port of its own.
const dnsIdle = 10 * time.Second

// relayCounters are in bytes, datagrams and flows. "ToService" is the direction
// from the listener.
type relayCounters struct {
	total, refused, failed, dropped       atomic.Uint64
	bytesToService, bytesToClient         atomic.Uint64
	datagramsToService, datagramsToClient atomic.Uint64
	acceptErrors                          atomic.Uint64
	lastError                             atomic.Pointer[string]
}

// RelayStatus is a snapshot of a [Relay].
type RelayStatus struct {
	Kind    string `json:"kind"`    // "forward", "publish" or "proxy"
	Network string `json:"network"` // "tcp", "udp" ...
	Listen  string `json:"listen"`  // with the port that the system chose
	To      string `json:"to"`      // of a proxy: what it speaks

	Open    int    `json:"open"`    // TCP connections or UDP clients now
	Total   uint64 `json:"total"`   // since the start
	Refused uint64 `json:"refused"` // because too many were open
	Failed  uint64 `json:"failed"`  // because the service could not be reached

	OutboundBytes     uint64 `json:"outbound_bytes"` // payload towards the peer
	InboundBytes      uint64 `json:"inbound_bytes"`
	OutboundDatagrams uint64 `json:"outbound_datagrams"` // UDP only
	InboundDatagrams  uint64 `json:"inbound_datagrams"`
	DroppedDatagrams  uint64 `json:"dropped_datagrams"` // that could not be handed on, or arrived while too many flows were open

	LastError string `json:"last_error,omitempty"` // why the service could not be reached, the last time
}

var errRelayFull = errors.New("too many flows are open")

// newRelay makes a relay without listeners.
func newRelay(kind, network, to string, limits relayLimits, log *slog.Logger, dial func(context.Context) (net.Conn, error)) *Relay {
	r := &Relay{
		kind: kind, network: network, to: to, dial: dial, limits: limits,
		log:    log.With("relay", kind, "network", network, "to", to),
		flows:  map[relayFlow]struct{}{},
		done:   make(chan struct{}),
		disown: func() {},
	}
	if _, port, err := net.SplitHostPort(to); err == nil && port == "53" {
		r.limits.udpIdle = min(r.limits.udpIdle, dnsIdle)
	}
	r.handle = r.runTCP
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// Addr is what the relay listens on, with the port that the system chose.
func (r *Relay) Addr() net.Addr { return r.addr }

// Status is a snapshot.
func (r *Relay) Status() RelayStatus {
	r.mu.Lock()
	open := len(r.flows)
	r.mu.Unlock()
	c := &r.count
	s := RelayStatus{
		Kind: r.kind, Network: r.network, Listen: r.addr.String(), To: r.to,
		Open: open, Total: c.total.Load(), Refused: c.refused.Load(), Failed: c.failed.Load(),
		OutboundBytes: c.bytesToService.Load(), InboundBytes: c.bytesToClient.Load(),
		OutboundDatagrams: c.datagramsToService.Load(), InboundDatagrams: c.datagramsToClient.Load(),
		DroppedDatagrams: c.dropped.Load(),
	}
	if r.kind == "publish" { // the clients are the peers
		s.OutboundBytes, s.InboundBytes = s.InboundBytes, s.OutboundBytes
		s.OutboundDatagrams, s.InboundDatagrams = s.InboundDatagrams, s.OutboundDatagrams
	}
	if e := c.lastError.Load(); e != nil {
		s.LastError = *e
	}
	return s
}

// relayStatuses are snapshots in a fixed order.
func relayStatuses(relays []*Relay) []RelayStatus {
	all := make([]RelayStatus, 0, len(relays))
	for _, r := range relays {
		all = append(all, r.Status())
	}
	slices.SortFunc(all, func(a, b RelayStatus) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Network, b.Network), cmp.Compare(a.Listen, b.Listen))
	})
	return all
}

// Close stops listening, resets the connections that are open and waits for the
// relay's goroutines. A second Close waits for the first and returns the same.
func (r *Relay) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		<-r.done
		return r.err
	}
	r.closed = true
	flows := make([]relayFlow, 0, len(r.flows))
	for f := range r.flows {
		flows = append(flows, f)
	}
	disown := r.disown
	r.mu.Unlock()
	defer close(r.done)
	defer disown()

	r.cancel()
	for _, l := range r.listeners {
		l.Close()
	}
	for _, f := range flows {
		f.abort()
	}
	if !endsWithin(r.limits.closing, r.tasks.Wait) {
		r.err = fmt.Errorf("netstack: %s of %s did not end within %v", r.kind, r.addr, r.limits.closing)
	}
	return r.err
}

// spawn runs task unless the relay is closed.
func (r *Relay) spawn(task func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.tasks.Go(task)
	return true
}

// enter admits a flow, which leave gives up again. Its errors are errRelayFull,
// counted, and net.ErrClosed.
func (r *Relay) enter(f relayFlow) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return net.ErrClosed
	case len(r.flows) >= r.limits.flows:
		r.count.refused.Add(1)
		return errRelayFull
	}
	r.count.total.Add(1)
	r.flows[f] = struct{}{}
	return nil
}

func (r *Relay) leave(f relayFlow) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.flows, f)
}

// reach dials the service. A failure is counted, and logged as a warning the first
// time in a row.
func (r *Relay) reach() (net.Conn, error) {
	ctx, cancel := context.WithTimeout(r.ctx, r.limits.dialTimeout)
	defer cancel()
	conn, err := r.dial(ctx)
	if r.ctx.Err() != nil { // closed: nobody's failure
		return conn, err
	}
	if err != nil {
		r.count.failed.Add(1)
		text := err.Error()
		r.count.lastError.Store(&text)
		level := slog.LevelDebug
		if !r.failing.Swap(true) {
			level = slog.LevelWarn
		}
		r.log.Log(r.ctx, level, "service cannot be reached", "error", err)
		return nil, err
	}
	if r.failing.Swap(false) {
		r.log.Info("service can be reached again")
	}
	return conn, nil
}

// pause waits after the failures-th failure in a row to accept or receive, so that a
// lasting one does not keep a CPU busy. It tells whether the relay goes on.
func (r *Relay) pause(failures int) bool {
	r.count.acceptErrors.Add(1)
	t := time.NewTimer(min(5*time.Millisecond<<min(failures, 8), time.Second))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.ctx.Done():
		return false
	}
}
