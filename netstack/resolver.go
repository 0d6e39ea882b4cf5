package netstack

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Resolver asks the servers that Dial asks, for any kind of record, and shares their
// cache; it is Config.Resolver if that is set, and the system's if nothing is configured.
//
// As everywhere in Go it completes names by the search domains of the machine and knows
// its hosts file; [Node.LookupNetIP] does what Dial does.
func (n *Node) Resolver() *net.Resolver { return n.resolver }

func (n *Node) newResolver() *net.Resolver {
	switch {
	case n.cfg.Resolver != nil:
		return n.cfg.Resolver
	case n.cfg.DNS.empty():
		return net.DefaultResolver
	}
	return &net.Resolver{
		PreferGo: true, // the system's library would not ask our servers
		Dial: func(_ context.Context, _, address string) (net.Conn, error) {
			return newDNSConn(n.dns, address), nil
		},
	}
}

// A dnsConn looks to Go's resolver like a TCP connection to a server, over which answers of any
// size fit. Behind it is the node's own client.
type dnsConn struct {
	client *dnsClient
	server netip.AddrPort // the system's, for names that no rule covers

	mu       sync.Mutex
	query    []byte // framed, as far as written
	answer   []byte // framed, what is left to read
	deadline time.Time
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc
}

func newDNSConn(client *dnsClient, address string) *dnsConn {
	c := &dnsConn{client: client}
	c.server, _ = netip.ParseAddrPort(address) // not valid: such names have no server
	c.ctx, c.cancel = context.WithCancel(client.ctx)
	return c
}

// maxQuery is more than a question needs: a name of 255 bytes and an OPT record.
const maxQuery = 1 << 10

func (c *dnsConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return 0, net.ErrClosed
	}
	if len(c.query)+len(b) > maxQuery {
		return 0, errNotTheAnswer
	}
	c.query = append(c.query, b...)
	return len(b), nil
}

func (c *dnsConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.answer) == 0 {
		if err := c.exchange(); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.answer)
	c.answer = c.answer[n:]
	return n, nil
}

// exchange answers the query that was written.
func (c *dnsConn) exchange() error {
	if len(c.query) < 2 || len(c.query) < 2+int(binary.BigEndian.Uint16(c.query)) {
		return io.ErrUnexpectedEOF // the whole query is written before the answer is read
	}
	h, q, err := readQuery(c.query[2:])
	if err != nil {
		return err
	}
	c.query = nil
	ctx := c.ctx
	if !c.deadline.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, c.deadline)
		defer cancel()
	}
	r := c.client.rule(canonical(q.Name.String()))
	if r.system() {
		r = &dnsRule{servers: []netip.AddrPort{c.server}, viaHost: true, of: c.server}
	}
	msg, err := c.client.exchange(ctx, r, q)
	switch {
	case c.ctx.Err() != nil:
		return net.ErrClosed
	case ctx.Err() != nil:
		return os.ErrDeadlineExceeded
	case err != nil:
		if msg, err = packFailure(h.ID, q); err != nil {
			return err
		}
	}
	c.answer = append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)
	setID(c.answer[2:], h.ID)
	return nil
}

func (c *dnsConn) Close() error { c.cancel(); return nil }

func (c *dnsConn) LocalAddr() net.Addr  { return &net.TCPAddr{} }
func (c *dnsConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.server) }

func (c *dnsConn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return nil
}
func (c *dnsConn) SetReadDeadline(t time.Time) error { return c.SetDeadline(t) }
func (c *dnsConn) SetWriteDeadline(time.Time) error  { return nil }
