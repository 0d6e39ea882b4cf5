package speed

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// maxConns bounds connections at once: a test with all its flows, and some that ask in vain.
const maxConns = MaxFlows + 16

// A Server lets peers measure. It does one test at a time.
type Server struct {
	listener net.Listener
	sockets  []*netstack.UDPConn
	slots    chan struct{}
	ctx      context.Context
	cancel   context.CancelFunc
	tasks    sync.WaitGroup

	mu      sync.Mutex
	session *session // nil when free
	conns   map[net.Conn]struct{}
}

// A session is one test, on the server's side.
type session struct {
	test  Test
	token uint64
	host  netip.Addr // of the client; flows come from there alone
	meter meter

	mu    sync.Mutex
	ready int
	tcp   []net.Conn       // by flow
	udp   []netip.AddrPort // by flow
	via   *netstack.UDPConn
	full  chan struct{} // closed when all flows are there
}

// Serve listens on node, on all its addresses, until Close.
func Serve(node *netstack.Node) (*Server, error) {
	port := strconv.Itoa(Port)
	l, err := node.Listen("tcp", ":"+port)
	if err != nil {
		return nil, err
	}
	s := &Server{listener: l, slots: make(chan struct{}, maxConns), conns: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	for _, a := range node.Addresses() { // one for each, so that the answers come from it
		c, err := node.ListenPacket("udp", net.JoinHostPort(a.Addr().String(), port))
		if err != nil {
			s.Close()
			return nil, err
		}
		u := c.(*netstack.UDPConn)
		s.sockets = append(s.sockets, u)
		s.tasks.Go(func() { s.receive(u) })
	}
	s.tasks.Go(s.accept)
	return s, nil
}

// Close ends the test under way. It waits for the server's goroutines.
func (s *Server) Close() error {
	s.cancel()
	s.listener.Close()
	for _, c := range s.sockets {
		c.Close()
	}
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.tasks.Wait()
	return nil
}

func (s *Server) accept() {
	for {
		c, err := s.listener.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		select {
		case s.slots <- struct{}{}:
			s.mu.Lock()
			s.conns[c] = struct{}{}
			s.mu.Unlock()
			s.tasks.Go(func() { s.serve(c) })
			if s.ctx.Err() != nil { // Close may have missed it
				c.Close()
			}
		default:
			c.Close()
		}
	}
}

// serve is the life of one connection: of a test's control or of a flow.
func (s *Server) serve(c net.Conn) {
	defer func() {
		c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		<-s.slots
	}()
	c.SetDeadline(time.Now().Add(setupTimeout))
	r := newReader(c)
	m, err := receive(r)
	switch {
	case err != nil:
	case m.Hello == "flow":
		err = s.flow(c, &m)
	case m.Hello == "test" && m.Test != nil:
		err = s.control(c, r, m.Test)
	default:
		err = errors.New("expected a test or a flow")
	}
	if err != nil && s.ctx.Err() == nil {
		send(c, message{Error: err.Error()})
	}
}

func hostOf(c net.Conn) netip.Addr {
	a, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return a.AddrPort().Addr().Unmap()
}

// control runs a test.
func (s *Server) control(c net.Conn, r *bufio.Reader, t *Test) error {
	if err := t.Check(); err != nil {
		return err
	}
	var token [8]byte
	rand.Read(token[:])
	ss := &session{
		test: *t, token: binary.BigEndian.Uint64(token[:]), host: hostOf(c),
		tcp: make([]net.Conn, t.Flows), udp: make([]netip.AddrPort, t.Flows), full: make(chan struct{}),
	}
	s.mu.Lock()
	busy := s.session != nil
	if !busy {
		s.session = ss
	}
	s.mu.Unlock()
	if busy {
		return errors.New("another test is running")
	}
	free := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.session == ss {
			s.session = nil
		}
	}
	defer free()
	if err := send(c, message{Token: fmt.Sprintf("%016x", ss.token)}); err != nil {
		return err
	}
	wait := time.NewTimer(setupTimeout)
	defer wait.Stop()
	select {
	case <-ss.full:
	case <-wait.C:
		return errors.New("not all flows have come")
	case <-s.ctx.Done():
		return net.ErrClosed
	}
	c.SetDeadline(time.Now().Add(t.Duration + 2*setupTimeout))
	ss.meter.started = time.Now()
	if err := send(c, message{Go: true}); err != nil {
		return err
	}
	if err := ss.run(s, r); err != nil {
		return err
	}
	count := ss.meter.count()
	free() // before the client hears that it is over: it may begin the next test at once
	return send(c, message{Count: count})
}

// run moves the data of a test.
func (ss *session) run(s *Server, r *bufio.Reader) error {
	t := &ss.test
	if t.Network == "udp" && !t.Inbound {
		_, err := receive(r) // done; s.receive counts
		time.Sleep(settle)
		return err
	}
	errs := make(chan error, t.Flows)
	end := ss.meter.started.Add(t.Duration)
	for i := range t.Flows {
		s.tasks.Go(func() {
			switch {
			case t.Network == "udp":
				errs <- sendUDP(func(b []byte) error {
					_, err := ss.via.WriteToUDPAddrPort(b, ss.udp[i])
					return err
				}, t, ss.token, i, &ss.meter, end)
			case t.Inbound:
				errs <- sendTCP(ss.tcp[i], &ss.meter, end)
			default:
				errs <- receiveTCP(ss.tcp[i], &ss.meter, t.Duration)
			}
		})
	}
	var first error
	for range t.Flows {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// flow adds a connection to the test and stays until that is over.
func (s *Server) flow(c net.Conn, m *message) error {
	s.mu.Lock()
	ss := s.session
	s.mu.Unlock()
	if ss == nil || m.Token != fmt.Sprintf("%016x", ss.token) || ss.test.Network != "tcp" || hostOf(c) != ss.host {
		return errors.New("no such test")
	}
	if !ss.join(m.Flow, func() bool {
		if ss.tcp[m.Flow] != nil {
			return false
		}
		ss.tcp[m.Flow] = c
		return true
	}) {
		return errors.New("no such flow")
	}
	c.SetDeadline(time.Time{}) // its own deadlines come with the data
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for s.ctx.Err() == nil { // the session closes c by leaving
		s.mu.Lock()
		over := s.session != ss
		s.mu.Unlock()
		if over {
			return nil
		}
		select {
		case <-t.C:
		case <-s.ctx.Done():
		}
	}
	return nil
}

// join notes a flow; take tells whether it was free.
func (ss *session) join(flow int, take func() bool) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if flow < 0 || flow >= ss.test.Flows || !take() {
		return false
	}
	if ss.ready++; ss.ready == ss.test.Flows {
		close(ss.full)
	}
	return true
}

// receive takes datagrams: of a client that sends, or the first ones of one that will
// receive.
func (s *Server) receive(c *netstack.UDPConn) {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		token, flow, ok := header(b[:n])
		s.mu.Lock()
		ss := s.session
		s.mu.Unlock()
		if !ok || ss == nil || token != ss.token || ss.test.Network != "udp" || from.Addr() != ss.host {
			continue
		}
		if binary.BigEndian.Uint64(b[12:]) == 0 {
			ss.join(flow, func() bool {
				if ss.udp[flow].IsValid() {
					return false
				}
				ss.udp[flow], ss.via = from, c
				return true
			})
			continue
		}
		ss.meter.add(n)
		ss.meter.stamp()
	}
}
