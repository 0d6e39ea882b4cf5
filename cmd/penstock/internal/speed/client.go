package speed

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// Result is what a test has measured. Sent and Received are of payload.
type Result struct {
	Network           string  `json:"network"`
	Direction         string  `json:"direction"` // "outbound" or "inbound", as the client sees it
	Flows             int     `json:"flows"`
	Seconds           float64 `json:"seconds"` // from the start to the last byte that arrived
	Bytes             int64   `json:"bytes"`   // that arrived
	BitsPerSecond     float64 `json:"bits_per_second"`
	DatagramsSent     int64   `json:"datagrams_sent,omitempty"` // UDP only
	DatagramsReceived int64   `json:"datagrams_received,omitempty"`
	LostPercent       float64 `json:"lost_percent"` // of the datagrams
}

// Sample is a part of a test, while it runs.
type Sample struct {
	Direction     string  `json:"direction"`
	Elapsed       float64 `json:"elapsed"` // seconds
	Of            float64 `json:"of"`      // seconds that the test takes
	BitsPerSecond float64 `json:"bits_per_second"`
}

// sampleEvery is the time between samples.
const sampleEvery = 500 * time.Millisecond

// Run measures against the server at to, and tells progress (which may be nil) how it goes.
func Run(ctx context.Context, node *netstack.Node, to netip.Addr, t Test, progress func(Sample)) (*Result, error) {
	if err := t.Check(); err != nil {
		return nil, err
	}
	r := &run{node: node, test: t, address: net.JoinHostPort(to.String(), strconv.Itoa(Port))}
	defer r.close()
	ctx, cancel := context.WithTimeout(ctx, t.Duration+3*setupTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, r.close)
	defer stop()
	result, err := r.do(ctx, progress)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return result, err
}

// run is a test on the client's side.
type run struct {
	node    *netstack.Node
	test    Test
	address string
	token   uint64
	meter   meter

	mu     sync.Mutex
	closed bool
	conns  []net.Conn // the control connection first
}

func (r *run) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	for _, c := range r.conns {
		c.Close()
	}
}

func (r *run) dial(ctx context.Context, network string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, setupTimeout)
	defer cancel()
	c, err := r.node.Dial(ctx, network, r.address)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	r.conns = append(r.conns, c)
	return c, nil
}

func (r *run) do(ctx context.Context, progress func(Sample)) (*Result, error) {
	control, err := r.dial(ctx, "tcp")
	if err != nil {
		return nil, err
	}
	in := newReader(control)
	control.SetDeadline(time.Now().Add(setupTimeout))
	if err := send(control, message{Hello: "test", Test: &r.test}); err != nil {
		return nil, err
	}
	m, err := receive(in)
	if err != nil {
		return nil, err
	}
	if r.token, err = strconv.ParseUint(m.Token, 16, 64); err != nil {
		return nil, errors.New("the far side sent no token")
	}
	flows, err := r.open(ctx, m.Token)
	if err != nil {
		return nil, err
	}
	control.SetDeadline(time.Now().Add(r.test.Duration + 2*setupTimeout))
	if err := r.greet(flows, in); err != nil {
		return nil, err
	}
	r.meter.started = time.Now()
	stopSampling := r.sample(progress)
	theirs, err := r.move(flows, control, in)
	stopSampling()
	if err != nil {
		return nil, err
	}
	return r.result(theirs), nil
}

// open makes the flows.
func (r *run) open(ctx context.Context, token string) (flows []net.Conn, err error) {
	for i := range r.test.Flows {
		c, err := r.dial(ctx, r.test.Network)
		if err != nil {
			return nil, err
		}
		if r.test.Network == "tcp" {
			c.SetDeadline(time.Now().Add(setupTimeout))
			if err := send(c, message{Hello: "flow", Token: token, Flow: i}); err != nil {
				return nil, err
			}
			c.SetDeadline(time.Time{})
		}
		flows = append(flows, c)
	}
	return flows, nil
}

// greet shows the flows of UDP until the server says go.
func (r *run) greet(flows []net.Conn, in *bufio.Reader) error {
	over := make(chan struct{})
	var greeting sync.WaitGroup
	if r.test.Network == "udp" {
		greeting.Go(func() {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				for i, c := range flows {
					var b [headerSize]byte
					putHeader(b[:], r.token, i, 0)
					c.Write(b[:])
				}
				select {
				case <-over:
					return
				case <-tick.C:
				}
			}
		})
	}
	m, err := receive(in)
	close(over)
	greeting.Wait()
	if err == nil && !m.Go {
		err = errors.New("the far side did not say go")
	}
	return err
}

// move moves the data, and returns what the server has counted.
func (r *run) move(flows []net.Conn, control net.Conn, in *bufio.Reader) (*count, error) {
	t := &r.test
	end := r.meter.started.Add(t.Duration)
	errs := make(chan error, len(flows))
	for i, c := range flows {
		go func() {
			switch {
			case t.Network == "udp" && t.Inbound:
				errs <- r.receiveUDP(c)
			case t.Network == "udp":
				errs <- sendUDP(func(b []byte) error { _, err := c.Write(b); return err }, t, r.token, i, &r.meter, end)
			case t.Inbound:
				errs <- receiveTCP(c, &r.meter, t.Duration)
			default:
				errs <- sendTCP(c, &r.meter, end)
			}
		}()
	}
	wait := func() (first error) {
		for range flows {
			if err := <-errs; err != nil && first == nil {
				first = err
			}
		}
		return first
	}
	if t.Network == "udp" && t.Inbound { // no end is in sight but the server's word
		m, err := receive(in)
		time.Sleep(settle)
		for _, c := range flows {
			c.SetReadDeadline(time.Unix(1, 0))
		}
		return m.Count, errors.Join(err, wait(), counted(m, err))
	}
	if err := wait(); err != nil {
		return nil, err
	}
	if t.Network == "udp" {
		if err := send(control, message{Done: true}); err != nil {
			return nil, err
		}
	}
	m, err := receive(in)
	return m.Count, errors.Join(err, counted(m, err))
}

func counted(m message, err error) error {
	if err == nil && m.Count == nil {
		return errors.New("the far side sent no count")
	}
	return nil
}

// receiveUDP counts until its deadline.
func (r *run) receiveUDP(c net.Conn) error {
	b := make([]byte, 64<<10)
	for {
		n, err := c.Read(b)
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				return nil
			}
			return err
		}
		if token, _, ok := header(b[:n]); ok && token == r.token {
			r.meter.add(n)
			r.meter.stamp()
		}
	}
}

func (r *run) direction() string {
	if r.test.Inbound {
		return "inbound"
	}
	return "outbound"
}

// sample tells progress what moved since the last time, until the returned function is called.
func (r *run) sample(progress func(Sample)) (stop func()) {
	if progress == nil {
		return func() {}
	}
	over := make(chan struct{})
	var sampling sync.WaitGroup
	sampling.Go(func() {
		tick := time.NewTicker(sampleEvery)
		defer tick.Stop()
		var before int64
		last := r.meter.started
		for {
			select {
			case <-over:
				return
			case now := <-tick.C:
				bytes := r.meter.bytes.Load()
				progress(Sample{
					Direction: r.direction(), Elapsed: min(now.Sub(r.meter.started), r.test.Duration).Seconds(), Of: r.test.Duration.Seconds(),
					BitsPerSecond: float64(bytes-before) * 8 / now.Sub(last).Seconds(),
				})
				before, last = bytes, now
			}
		}
	})
	return func() { close(over); sampling.Wait() }
}

func (r *run) result(theirs *count) *Result {
	sent, received := r.meter.count(), theirs
	if r.test.Inbound {
		sent, received = theirs, r.meter.count()
	}
	res := &Result{
		Network: r.test.Network, Direction: r.direction(), Flows: r.test.Flows,
		Seconds: received.Elapsed.Seconds(), Bytes: received.Bytes,
	}
	if res.Seconds > 0 {
		res.BitsPerSecond = float64(res.Bytes) * 8 / res.Seconds
	}
	if r.test.Network == "udp" {
		res.DatagramsSent, res.DatagramsReceived = sent.Datagrams, received.Datagrams
		if lost := sent.Datagrams - received.Datagrams; lost > 0 && sent.Datagrams > 0 {
			res.LostPercent = 100 * float64(lost) / float64(sent.Datagrams)
		}
	}
	return res
}

// String is a line for people.
func (r *Result) String() string {
	s := fmt.Sprintf("%s %-8s %2d flows  %6.2f s  %8.1f MB  %8.2f Mbit/s", r.Network, r.Direction, r.Flows, r.Seconds, float64(r.Bytes)/1e6, r.BitsPerSecond/1e6)
	if r.Network == "udp" {
		s += fmt.Sprintf("  %.2f%% lost", r.LostPercent)
	}
	return s
}
