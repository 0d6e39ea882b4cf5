package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// ProxyOptions say how [Node.ServeProxy] serves; the zero value is good.
type ProxyOptions struct {
	// NoSOCKS5 and NoHTTP leave one of the protocols out. With both in, the first byte of a
	// connection tells which it is.
	NoSOCKS5, NoHTTP bool
	// User and Password are asked of every client unless both are empty. They travel in the
	// clear: they tell users of one machine apart, and are no protection on a network.
	User, Password string
	// MaxConns bounds the connections at once; those beyond it are reset. 0 means 1024.
	MaxConns int
	// HandshakeTimeout bounds what comes before a connection is of use: the SOCKS5
	// negotiation, the header of an HTTP request. 0 means 10 s.
	HandshakeTimeout time.Duration
	// UDPIdle is the silence after which a UDP association is given up. 0 means two
	// minutes (RFC 4787 4.3).
	UDPIdle time.Duration
}

const (
	defaultProxyConns       = 1024
	defaultHandshakeTimeout = 10 * time.Second
	// maxAssociations is a bound of its own: an association holds 64 KiB to receive into.
	maxAssociations = 256
	// maxCredential is what fits the length byte of RFC 1929 2.
	maxCredential = 255
)

// ServeProxy lets programs that can speak to a proxy use the VPN: SOCKS5 (RFC 1928, with
// CONNECT, UDP ASSOCIATE, IPv6 and names) and HTTP (CONNECT and absolute URIs), both on
// the same listener. Names are resolved as Dial does.
//
// It takes l. Closing the relay, or the node, resets the connections that it carries. In
// [Status] it is among the relays.
func (n *Node) ServeProxy(l net.Listener, o ProxyOptions) (*Relay, error) {
	if err := o.validate(); err != nil {
		l.Close()
		return nil, fmt.Errorf("netstack: %w", err)
	}
	limits := defaultLimits
	limits.flows = o.MaxConns
	limits.udpIdle = o.UDPIdle
	r := newRelay("proxy", "tcp", o.protocols(), limits, n.log, nil)
	p := &proxy{node: n, relay: r, o: o}
	r.handle = p.run
	if !o.NoHTTP {
		p.http = newHTTPProxy(p)
		r.listeners = append(r.listeners, p.http)
		r.spawn(p.http.serve)
	}
	r.serveTCP(l)
	return n.ownRelay(r)
}

// validate fills in the defaults.
func (o *ProxyOptions) validate() error {
	switch {
	case o.NoSOCKS5 && o.NoHTTP:
		return &ConfigError{Key: "ProxyOptions.NoHTTP", Value: "true", Want: "false when NoSOCKS5 is true"}
	case len(o.User) > maxCredential || strings.Contains(o.User, ":"): // RFC 7617 2
		return &ConfigError{Key: "ProxyOptions.User", Want: "at most 255 bytes without a colon"}
	case len(o.Password) > maxCredential:
		return &ConfigError{Key: "ProxyOptions.Password", Want: "at most 255 bytes"}
	case o.MaxConns < 0:
		return &ConfigError{Key: "ProxyOptions.MaxConns", Value: fmt.Sprint(o.MaxConns), Want: "0 or more"}
	}
	if o.MaxConns == 0 {
		o.MaxConns = defaultProxyConns
	}
	if o.HandshakeTimeout <= 0 {
		o.HandshakeTimeout = defaultHandshakeTimeout
	}
	if o.UDPIdle <= 0 {
		o.UDPIdle = defaultLimits.udpIdle
	}
	return nil
}

func (o *ProxyOptions) locked() bool { return o.User != "" || o.Password != "" }

func (o *ProxyOptions) protocols() string {
	switch {
	case o.NoHTTP:
		return "SOCKS5"
	case o.NoSOCKS5:
		return "HTTP"
	}
	return "SOCKS5 and HTTP"
}

// A proxy serves the connections of one relay.
type proxy struct {
	node         *Node
	relay        *Relay
	o            ProxyOptions
	http         *httpProxy // nil without
	associations atomic.Int32
}

var errNoProtocol = errors.New("a client speaks neither of the proxy's protocols")

// run is the life of one connection.
func (p *proxy) run(f *tcpFlow) {
	defer p.relay.leave(f)
	f.client.SetDeadline(time.Now().Add(p.o.HandshakeTimeout))
	var first [1]byte
	if _, err := io.ReadFull(f.client, first[:]); err != nil {
		reset(f.client) // nothing has been said that could be answered
		return
	}
	switch {
	case first[0] == socksVersion && !p.o.NoSOCKS5:
		if err := p.socks(f); err != nil {
			p.failed(err)
		}
	case 'A' <= first[0] && first[0] <= 'Z' && p.http != nil:
		p.http.handOver(f, first[0])
	default:
		p.failed(errNoProtocol)
		reset(f.client)
	}
}

// dial connects to what a client asks for.
func (p *proxy) dial(ctx context.Context, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.relay.limits.dialTimeout)
	defer cancel()
	stop := context.AfterFunc(p.relay.ctx, cancel)
	defer stop()
	return p.node.Dial(ctx, "tcp", address)
}

// failed counts what a client could not have.
func (p *proxy) failed(err error) {
	if p.relay.ctx.Err() != nil { // closed: nobody's failure
		return
	}
	p.relay.count.failed.Add(1)
	text := err.Error()
	p.relay.count.lastError.Store(&text)
	p.relay.log.Debug("proxy", "error", err)
}

// closeSlowly closes a connection whose last words matter. What the client has sent and
// nobody has read would make the system reset it, and the words could be lost.
func closeSlowly(c net.Conn) {
	defer c.Close()
	if closeWrite(c) != nil {
		return
	}
	c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	io.CopyN(io.Discard, c, 64<<10)
}

// timedOut tells whether err is about time.
func timedOut(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// statusOf is the HTTP status for a service that cannot be reached.
func statusOf(err error) int {
	if timedOut(err) {
		return http.StatusGatewayTimeout
	}
	return http.StatusBadGateway
}
