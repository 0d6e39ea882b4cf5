package netstack

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// dnsRounds are the times that a server gets for a datagram to be answered, each time all
// servers have been tried. Five seconds and two attempts are what resolvers usually have
// (resolv.conf(5)); a server inside the VPN is nearer.
var dnsRounds = []time.Duration{2 * time.Second, 4 * time.Second}

const (
	maxFlights = 256              // questions under way at once; more are refused
	maxFlight  = 20 * time.Second // for one question, over all servers
)

var (
	errTooManyLookups = errors.New("too many lookups under way")
	errNoServer       = errors.New("no server for this name")
)

// dnsDial opens a socket to a server.
type dnsDial func(ctx context.Context, network, address string) (net.Conn, error)

// A dnsClient asks name servers, remembers what they say, and asks one question once however
// many want to know.
type dnsClient struct {
	rules   []*dnsRule
	viaVPN  dnsDial
	viaHost dnsDial
	rounds  []time.Duration
	now     func() time.Time

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup // flights; added to under mu unless closed

	mu      sync.Mutex
	closed  bool
	cache   dnsCache
	flights map[dnsKey]*dnsFlight
	good    map[*dnsRule]int // the server that answered last
}

// A dnsFlight is a question under way.
type dnsFlight struct {
	done chan struct{} // closed when the rest is set
	msg  []byte
	err  error
}

func newDNSClient(d *DNS, viaVPN dnsDial) *dnsClient {
	c := &dnsClient{
		rules: d.rules(), viaVPN: viaVPN, viaHost: new(net.Dialer).DialContext,
		rounds: dnsRounds, now: time.Now,
		flights: map[dnsKey]*dnsFlight{}, good: map[*dnsRule]int{},
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	return c
}

// Close ends the questions under way. It waits for them.
func (c *dnsClient) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.tasks.Wait()
	return nil
}

// rule is that for a canonical name; nil when none covers it.
func (c *dnsClient) rule(name string) *dnsRule {
	for _, r := range c.rules {
		if r.covers(name) {
			return r
		}
	}
	return nil
}

// exchange returns a final answer to q, which is not to be changed. ctx bounds the
// caller's waiting, not the question.
func (c *dnsClient) exchange(ctx context.Context, r *dnsRule, q dnsmessage.Question) ([]byte, error) {
	k := dnsKey{canonical(q.Name.String()), q.Type, q.Class, r.of}
	c.mu.Lock()
	if e, ok := c.cache.get(k, c.now()); ok {
		c.mu.Unlock()
		return e.msg, e.err
	}
	f := c.flights[k]
	switch {
	case c.closed:
		c.mu.Unlock()
		return nil, net.ErrClosed
	case f == nil && len(c.flights) >= maxFlights:
		c.mu.Unlock()
		return nil, errTooManyLookups
	case f == nil:
		f = &dnsFlight{done: make(chan struct{})}
		c.flights[k] = f
		c.tasks.Add(1)
		go c.fly(f, k, r, q)
	}
	c.mu.Unlock()
	select {
	case <-f.done:
		return f.msg, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fly is the life of one question.
func (c *dnsClient) fly(f *dnsFlight, k dnsKey, r *dnsRule, q dnsmessage.Question) {
	defer c.tasks.Done()
	ctx, cancel := context.WithTimeout(c.ctx, maxFlight)
	defer cancel()
	var ttl time.Duration
	f.msg, ttl, f.err = c.askAll(ctx, r, q)
	c.mu.Lock()
	delete(c.flights, k)
	if ttl > 0 {
		c.cache.put(&dnsEntry{k, f.msg, f.err, c.now().Add(ttl)})
	}
	c.mu.Unlock()
	close(f.done)
}

// askAll asks one server after the other until one has a final answer, and says for how
// long to remember it.
func (c *dnsClient) askAll(ctx context.Context, r *dnsRule, q dnsmessage.Question) (msg []byte, ttl time.Duration, err error) {
	if len(r.servers) == 0 {
		return nil, 0, errNoServer
	}
	c.mu.Lock()
	first := c.good[r]
	c.mu.Unlock()
	for _, timeout := range c.rounds {
		for i := range r.servers {
			at := (first + i) % len(r.servers)
			msg, a, askErr := c.ask(ctx, r, r.servers[at], q, timeout)
			if c.ctx.Err() != nil {
				return nil, 0, net.ErrClosed
			}
			if askErr == nil && a.final() {
				if at != first {
					c.mu.Lock()
					c.good[r] = at
					c.mu.Unlock()
				}
				return msg, keepFor(&a), nil
			}
			if askErr == nil {
				askErr = fmt.Errorf("server answered %s", rcodeText(a.rcode))
			}
			err = &dnsServerError{r.servers[at], askErr}
		}
	}
	return nil, failureTTL, err
}

// keepFor is the time in the cache.
func keepFor(a *dnsAnswer) time.Duration {
	if a.negative {
		return min(a.ttl, maxNegativeTTL)
	}
	return min(a.ttl, maxTTL)
}

// dnsServerError says which server failed.
type dnsServerError struct {
	server netip.AddrPort
	err    error
}

func (e *dnsServerError) Error() string { return fmt.Sprintf("%v: %v", e.server, e.err) }
func (e *dnsServerError) Unwrap() error { return e.err }

// ask asks one server, by a datagram first, and by TCP if the answer is too long for one.
func (c *dnsClient) ask(ctx context.Context, r *dnsRule, server netip.AddrPort, q dnsmessage.Question, timeout time.Duration) ([]byte, dnsAnswer, error) {
	var random [2]byte
	rand.Read(random[:])
	id := binary.BigEndian.Uint16(random[:])
	query, err := packQuery(id, q)
	if err != nil {
		return nil, dnsAnswer{}, err
	}
	msg, a, err := c.over(ctx, r, "udp", server, timeout, func(conn net.Conn) ([]byte, dnsAnswer, error) {
		return askDatagram(conn, query, id, q)
	})
	if err != nil || !a.truncated {
		return msg, a, err
	}
	return c.over(ctx, r, "tcp", server, timeout, func(conn net.Conn) ([]byte, dnsAnswer, error) {
		return askStream(conn, query, id, q)
	})
}

// over opens a socket, bounded by timeout with everything that do does.
func (c *dnsClient) over(ctx context.Context, r *dnsRule, network string, server netip.AddrPort, timeout time.Duration,
	do func(net.Conn) ([]byte, dnsAnswer, error)) ([]byte, dnsAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dial := c.viaVPN
	if r.viaHost {
		dial = c.viaHost
	}
	conn, err := dial(ctx, network, server.String())
	if err != nil {
		return nil, dnsAnswer{}, err
	}
	defer conn.Close()
	// Closed by the timeout or by Close, whichever is first: a socket of a node that closes takes no
	// deadline any more.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	msg, a, err := do(conn)
	if err != nil && ctx.Err() == context.DeadlineExceeded {
		err = os.ErrDeadlineExceeded
	}
	return msg, a, err
}

// askDatagram waits for the answer among whatever else arrives: a forged or late one does not
// end the waiting.
func askDatagram(conn net.Conn, query []byte, id uint16, q dnsmessage.Question) ([]byte, dnsAnswer, error) {
	if _, err := conn.Write(query); err != nil {
		return nil, dnsAnswer{}, err
	}
	b := make([]byte, 4096) // some send more than we ask for
	for {
		n, err := conn.Read(b)
		if err != nil {
			return nil, dnsAnswer{}, err
		}
		if a, err := readAnswer(b[:n], id, q); err == nil {
			return b[:n:n], a, nil
		}
	}
}

func askStream(conn net.Conn, query []byte, id uint16, q dnsmessage.Question) ([]byte, dnsAnswer, error) {
	framed := binary.BigEndian.AppendUint16(nil, uint16(len(query)))
	if _, err := conn.Write(append(framed, query...)); err != nil {
		return nil, dnsAnswer{}, err
	}
	var size [2]byte
	if _, err := io.ReadFull(conn, size[:]); err != nil {
		return nil, dnsAnswer{}, err
	}
	msg := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(conn, msg); err != nil {
		return nil, dnsAnswer{}, err
	}
	a, err := readAnswer(msg, id, q)
	if err == nil && a.truncated {
		err = errNotTheAnswer // over TCP there is no longer one
	}
	return msg, a, err
}

// rcodeText names a code as dig does.
func rcodeText(c dnsmessage.RCode) string {
	switch c {
	case dnsmessage.RCodeFormatError:
		return "FORMERR"
	case dnsmessage.RCodeServerFailure:
		return "SERVFAIL"
	case dnsmessage.RCodeNotImplemented:
		return "NOTIMP"
	case dnsmessage.RCodeRefused:
		return "REFUSED"
	}
	return fmt.Sprintf("code %d", c)
}
