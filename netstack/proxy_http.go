package netstack

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"
)

// An httpProxy is the HTTP side of a proxy: net/http reads the requests, CONNECT is spliced,
// and the rest goes through a reverse proxy whose way out is the VPN.
type httpProxy struct {
	proxy     *proxy
	server    *http.Server
	transport *http.Transport
	forward   *httputil.ReverseProxy
	conns     handedOver
}

const (
	// httpIdle is how long a connection may wait for its next request.
	httpIdle = time.Minute
	// maxHTTPHeader bounds a request's header; browsers send a few KiB with many cookies.
	maxHTTPHeader = 64 << 10
)

func newHTTPProxy(p *proxy) *httpProxy {
	h := &httpProxy{proxy: p, conns: handedOver{ctx: p.relay.ctx, c: make(chan net.Conn)}}
	quiet := log.New(io.Discard, "", 0)
	h.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, address string) (net.Conn, error) { return p.dial(ctx, address) },
		DisableCompression:     true, // the client says what it wants
		MaxIdleConns:           128,
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        httpIdle / 2,
		MaxResponseHeaderBytes: 256 << 10,
		ExpectContinueTimeout:  time.Second,
	}
	h.forward = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			// What Go's own parser would not take, such as a semicolon, has been left out.
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			// Not ours to remove: they speak of proxies before us.
			for _, k := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
				if v, ok := r.In.Header[k]; ok {
					r.Out.Header[k] = v
				}
			}
		},
		Transport:     h.transport,
		FlushInterval: -1, // what comes slowly is wanted as it comes
		BufferPool:    blockPool{},
		ErrorLog:      quiet,
		ErrorHandler:  func(w http.ResponseWriter, r *http.Request, err error) { h.fail(w, r.URL.Host, err) },
	}
	h.server = &http.Server{
		Handler:           h,
		ReadHeaderTimeout: p.o.HandshakeTimeout,
		IdleTimeout:       httpIdle,
		MaxHeaderBytes:    maxHTTPHeader,
		ErrorLog:          quiet,
		BaseContext:       func(net.Listener) context.Context { return p.relay.ctx },
	}
	return h
}

func (h *httpProxy) serve() { h.server.Serve(&h.conns) } // until Close

// Close implements io.Closer for the relay.
func (h *httpProxy) Close() error {
	err := h.server.Close()
	h.transport.CloseIdleConnections()
	return err
}

// handOver gives a connection of which one byte has been read to the server, and waits for
// its end.
func (h *httpProxy) handOver(f *tcpFlow, first byte) {
	f.client.SetDeadline(time.Time{}) // the server has its own
	c := &httpConn{Conn: f.client, flow: f, first: []byte{first}, count: &h.proxy.relay.count, closed: make(chan struct{})}
	select {
	case h.conns.c <- c:
		<-c.closed
	case <-h.proxy.relay.ctx.Done():
		reset(f.client)
	}
	if h.proxy.relay.ctx.Err() != nil {
		h.transport.CloseIdleConnections()
	}
}

// handedOver is a listener for connections that were accepted elsewhere.
type handedOver struct {
	ctx context.Context
	c   chan net.Conn
}

func (l *handedOver) Accept() (net.Conn, error) {
	select {
	case c := <-l.c:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

func (l *handedOver) Close() error   { return nil }
func (l *handedOver) Addr() net.Addr { return &net.TCPAddr{} }

// An httpConn is a client's connection as the server sees it.
type httpConn struct {
	net.Conn
	flow   *tcpFlow
	first  []byte // already read from Conn
	count  *relayCounters
	once   sync.Once
	closed chan struct{}
}

func (c *httpConn) Read(b []byte) (n int, err error) {
	if len(c.first) > 0 && len(b) > 0 {
		n = copy(b, c.first)
		c.first = c.first[n:]
	} else {
		n, err = c.Conn.Read(b)
	}
	c.count.bytesToService.Add(uint64(n))
	return n, err
}

func (c *httpConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.count.bytesToClient.Add(uint64(n))
	return n, err
}

func (c *httpConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() { close(c.closed) })
	return err
}

// CloseWrite lets the server end a connection without losing its last words.
func (c *httpConn) CloseWrite() error { return closeWrite(c.Conn) }

// ServeHTTP implements http.Handler.
func (h *httpProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case h.proxy.o.locked() && !h.proxy.o.admitsBasic(r.Header.Get("Proxy-Authorization")):
		w.Header().Set("Proxy-Authenticate", `Basic realm="penstock"`)
		h.say(w, http.StatusProxyAuthRequired, "this proxy wants a user and a password")
	case r.Method == http.MethodConnect:
		h.connect(w, r)
	case r.URL.Scheme == "http" && r.URL.Host != "":
		// A service may answer before it has the whole request: without this, the rest of that
		// would be thrown away. An error is of HTTP/2, which nobody speaks to us.
		_ = http.NewResponseController(w).EnableFullDuplex()
		h.forward.ServeHTTP(w, r)
	case r.URL.IsAbs():
		h.say(w, http.StatusBadRequest, fmt.Sprintf("cannot fetch %s URLs; use CONNECT", r.URL.Scheme))
	default:
		h.say(w, http.StatusBadRequest, "this is a proxy: ask for a whole URL, or use CONNECT")
	}
}

// admitsBasic checks RFC 7617 credentials.
func (o *ProxyOptions) admitsBasic(header string) bool {
	scheme, text, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Basic") {
		return false
	}
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil {
		return false
	}
	user, password, _ := strings.Cut(string(b), ":")
	return o.admits(user, password)
}

// connect splices a client with what it wants to speak to.
func (h *httpProxy) connect(w http.ResponseWriter, r *http.Request) {
	// Not under the request's context: that ends with the client's half of the connection.
	service, err := h.proxy.dial(context.Background(), r.Host)
	if err != nil {
		h.fail(w, r.Host, err)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		reset(service)
		h.fail(w, r.Host, err)
		return
	}
	c := conn.(*httpConn)
	defer c.Close()
	if !c.flow.join(service) {
		return
	}
	c.SetDeadline(time.Now().Add(h.proxy.o.HandshakeTimeout))
	early, err := buffered.Reader.Peek(buffered.Reader.Buffered()) // sent without waiting for our answer
	if err == nil {
		_, err = io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
	}
	if err == nil && len(early) > 0 {
		_, err = service.Write(early)
	}
	if err != nil {
		reset(service)
		return
	}
	c.SetDeadline(time.Time{})
	splice(c.Conn, service, &c.count.bytesToService, &c.count.bytesToClient)
}

// fail answers for a service that cannot be reached.
func (h *httpProxy) fail(w http.ResponseWriter, host string, err error) {
	h.proxy.failed(err)
	h.say(w, statusOf(err), fmt.Sprintf("cannot reach %s in the VPN: %v", host, err))
}

func (h *httpProxy) say(w http.ResponseWriter, status int, text string) {
	http.Error(w, "penstock: "+text, status)
}

// blockPool lends a relay's blocks to the reverse proxy.
type blockPool struct{}

func (blockPool) Get() []byte  { return blocks.Get().(*block)[:] }
func (blockPool) Put(b []byte) { blocks.Put((*block)(b[:cap(b)])) }
