package netstack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wzshiming/socks5"
	xproxy "golang.org/x/net/proxy"
)

// proxyPair is a proxy of node a, on loopback, and node b with services:
//
//	:7 TCP and UDP echo, :80 HTTP, :443 HTTPS; www.example is b
func proxyPair(t *testing.T, o ProxyOptions) (p *Relay, a *Node) {
	t.Helper()
	server := newTestDNS(map[string][]string{
		"www.example A": {"10.66.0.2"}, "www.example AAAA": {"fd66::2"}, "four.example A": {"10.66.0.2"},
	})
	a, b := pair(t, func(a, _ *Config) { a.DNS.Servers = []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")} })
	server.inside(t, b)
	for network, to := range map[string]string{"tcp": testService(t, echo), "udp": udpService(t)} {
		if _, err := b.Publish(network, ":7", to); err != nil {
			t.Fatal(err)
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Seen", strings.Join([]string{r.Method, r.Host, r.Header.Get("X-Forwarded-For"), r.Header.Get("Proxy-Authorization")}, "|"))
		http.NewResponseController(w).EnableFullDuplex() // the answer begins before the request has ended
		io.Copy(w, r.Body)
	})
	plain, secure := httptest.NewServer(mux), httptest.NewTLSServer(mux)
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	for listen, s := range map[string]*httptest.Server{":80": plain, ":443": secure} {
		if _, err := b.Publish("tcp", listen, s.Listener.Addr().String()); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if p, err = a.ServeProxy(l, o); err != nil {
		t.Fatal(err)
	}
	return p, a
}

func echoes(t *testing.T, c net.Conn, size int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(patience))
	sent := randomBytes(size)
	go func() {
		c.Write(sent)
		c.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back as %d, %v", size, len(got), err)
	}
}

// TestProxySOCKS: with the client of golang.org/x/net, to addresses and names.
func TestProxySOCKS(t *testing.T) {
	for name, auth := range map[string]*xproxy.Auth{"open": nil, "locked": {User: "u", Password: "p"}} {
		t.Run(name, func(t *testing.T) {
			o := ProxyOptions{}
			if auth != nil {
				o.User, o.Password = auth.User, auth.Password
			}
			p, _ := proxyPair(t, o)
			d, err := xproxy.SOCKS5("tcp", p.Addr().String(), auth, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, to := range []string{"10.66.0.2:7", "[fd66::2]:7", "www.example:7", "four.example:7"} {
				c, err := d.Dial("tcp", to)
				if err != nil {
					t.Fatalf("%s: %v", to, err)
				}
				echoes(t, c.(*net.TCPConn), 1<<20+3)
				c.Close()
			}
			for to, want := range map[string]string{
				"10.66.0.2:1":      "connection refused",
				"[fd66::2]:1":      "connection refused",
				"192.0.2.1:7":      "network unreachable",
				"nowhere.example:": "",
				"no.example:7":     "host unreachable",
			} {
				if _, err := d.Dial("tcp", to); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v, want %q", to, err, want)
				}
			}
			if auth != nil {
				for what, auth := range map[string]*xproxy.Auth{"no": nil, "a wrong": {User: "u", Password: "x"}, "a longer": {User: "u", Password: "pp"}} {
					d, _ := xproxy.SOCKS5("tcp", p.Addr().String(), auth, nil)
					if c, err := d.Dial("tcp", "10.66.0.2:7"); err == nil {
						c.Close()
						t.Errorf("connected with %s password", what)
					}
				}
			}
			s := waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 0 })
			if s.Kind != "proxy" || s.OutboundBytes < 4<<20 || s.InboundBytes < 4<<20 || s.Failed < 4 || s.LastError == "" {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// TestProxySOCKSReplies looks at the bytes.
func TestProxySOCKSReplies(t *testing.T) {
	p, _ := proxyPair(t, ProxyOptions{})
	const greeting, accepted = "\x05\x01\x00", "\x05\x00"
	for _, tt := range []struct{ what, says, want string }{
		{"bind", greeting + "\x05\x02\x00\x01\x0a\x42\x00\x02\x00\x07", accepted + "\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"address type", greeting + "\x05\x01\x00\x02\x0a\x42\x00\x02\x00\x07", accepted + "\x05\x08\x00\x01\x00\x00\x00\x00\x00\x00"},
		{"method", "\x05\x01\x02", "\x05\xff"},
		{"no method", "\x05\x00", "\x05\xff"},
		{"empty name", greeting + "\x05\x01\x00\x03\x00\x00\x07", accepted},
		{"version", greeting + "\x04\x01\x00\x01\x0a\x42\x00\x02\x00\x07", accepted},
		{"name of zeros", greeting + "\x05\x01\x00\x03\x03\x00\x00\x00\x00\x07", accepted + "\x05\x04\x00\x01\x00\x00\x00\x00\x00\x00"},
	} {
		c := dialTCP(t, p)
		c.Write([]byte(tt.says))
		if got, err := io.ReadAll(c); string(got) != tt.want {
			t.Errorf("%s: got %q, %v, want %q", tt.what, got, err, tt.want)
		}
	}
}

// nameAddr is an address that only the proxy can resolve.
type nameAddr string

func (nameAddr) Network() string  { return "udp" }
func (a nameAddr) String() string { return string(a) }

// TestProxyUDP: with the client of wzshiming/socks5.
func TestProxyUDP(t *testing.T) {
	p, _ := proxyPair(t, ProxyOptions{})
	client, err := socks5.NewDialer("socks5h://" + p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"10.66.0.2:7", "[fd66::2]:7"} {
		c, err := client.Dial("udp", to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		for _, size := range []int{0, 1, 1200, 9000, 40000} {
			exchange(t, c, randomBytes(size))
		}
		pc := c.(net.PacketConn)
		for name, want := range map[nameAddr]string{"www.example:7": "[fd66::2]:7", "four.example:7": "10.66.0.2:7"} {
			for _, size := range []int{1, 1200, 9000} {
				sent, got := randomBytes(size), make([]byte, maxDatagram)
				if _, err := pc.WriteTo(sent, name); err != nil {
					t.Fatal(err)
				}
				n, from, err := pc.ReadFrom(got)
				if err != nil || !bytes.Equal(got[:n], sent) || from.String() != want {
					t.Fatalf("%s: sent %d bytes, got %d from %v, %v", name, size, n, from, err)
				}
			}
		}
	}
	// What has been sent is counted a moment later.
	s := waitStatus(t, p, func(s RelayStatus) bool { return s.OutboundDatagrams >= 22 && s.InboundDatagrams >= 22 })
	if s.Open != 2 || s.OutboundDatagrams != 22 || s.InboundDatagrams != 22 || s.DroppedDatagrams != 0 {
		t.Errorf("status %+v", s)
	}
}

// associate makes an association by hand.
func associate(t *testing.T, p *Relay) (control *net.TCPConn, data *net.UDPConn) {
	t.Helper()
	control = dialTCP(t, p)
	control.Write([]byte("\x05\x01\x00\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"))
	var b [12]byte
	if _, err := io.ReadFull(control, b[:]); err != nil || b[3] != 0 {
		t.Fatalf("the proxy says %x, %v", b, err)
	}
	to, _, err := parseSocksAddr(b[5:])
	if err != nil {
		t.Fatal(err)
	}
	data, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to.ip, to.port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { data.Close() })
	return control, data
}

// TestProxyUDPStrangers: neither other programs nor other hosts of the VPN come in through
// an association, and it does not outlive the connection or its use.
func TestProxyUDPStrangers(t *testing.T) {
	p, a := proxyPair(t, ProxyOptions{UDPIdle: 3 * time.Second})
	control, data := associate(t, p)
	to7 := append([]byte{0, 0, 0}, appendSocksAddr(nil, netip.MustParseAddrPort("10.66.0.2:7"))...)
	say := func(c net.Conn, header []byte, text string) {
		if _, err := c.Write(append(slices.Clone(header), text...)); err != nil {
			t.Fatal(err)
		}
	}
	// answer is the next datagram that comes, without its header.
	answer := func(c net.Conn, within time.Duration) (string, bool) {
		c.SetReadDeadline(time.Now().Add(within))
		b := make([]byte, 100)
		n, err := c.Read(b)
		return string(b[min(n, len(to7)):n]), err == nil
	}
	for _, text := range []string{"hello", "again"} {
		say(data, to7, text)
		if got, ok := answer(data, patience); got != text {
			t.Fatalf("%q was answered by %q, %v", text, got, ok)
		}
	}
	other, err := net.Dial("udp", data.RemoteAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	say(other, to7, "stranger")
	if _, ok := answer(other, 100*time.Millisecond); ok {
		t.Error("a second client was served")
	}
	fragment := bytes.Clone(to7)
	fragment[2] = 1
	for what, b := range map[string][]byte{"a fragment": fragment, "no address": {0, 0, 0, 9}, "nothing": {}, "half an address": to7[:6]} {
		say(data, b, "")
		if _, ok := answer(data, 50*time.Millisecond); ok {
			t.Errorf("%s was answered", what)
		}
	}
	say(data, to7, "still here")
	if got, ok := answer(data, patience); got != "still here" {
		t.Errorf("after garbage: %q, %v", got, ok)
	}
	// Silence ends it, although the control connection is open.
	waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 0 })
	if _, err := control.Read(make([]byte, 1)); err == nil {
		t.Error("the control connection says something")
	}
	// And so does the end of that connection.
	control, _ = associate(t, p)
	control.Close()
	waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 0 })
	if got := a.Status().Relays; len(got) != 1 || got[0].DroppedDatagrams < 5 {
		t.Errorf("relays %+v, want drops counted", got)
	}
}

func TestProxyHTTP(t *testing.T) {
	p, _ := proxyPair(t, ProxyOptions{User: "u", Password: "p:w"})
	client := func(user *url.Userinfo) *http.Client {
		tr := http.DefaultTransport.(*http.Transport).Clone()
		tr.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: p.Addr().String(), User: user})
		tr.TLSClientConfig.InsecureSkipVerify = true
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr, Timeout: patience}
	}
	c := client(url.UserPassword("u", "p:w"))
	body := randomBytes(3 << 20)
	for _, base := range []string{"http://www.example", "http://10.66.0.2", "http://[fd66::2]:80", "https://www.example", "https://[fd66::2]"} {
		req, err := http.NewRequest("POST", base+"/echo", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-For", "192.0.2.7")
		resp, err := c.Do(req)
		if err != nil {
			t.Errorf("%s: %v", base, err)
			continue
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !bytes.Equal(got, body) {
			t.Errorf("%s: %d bytes came back as %d, %v", base, len(body), len(got), err)
		}
		if want := "POST|" + req.URL.Host + "|192.0.2.7|"; resp.Header.Get("X-Seen") != want {
			t.Errorf("%s: the server saw %q, want %q", base, resp.Header.Get("X-Seen"), want)
		}
	}
	for _, tt := range []struct {
		what, url string
		user      *url.Userinfo
		status    int
		says      string
	}{
		{"refused", "http://10.66.0.2:1/", url.UserPassword("u", "p:w"), 502, "connection refused"},
		{"unreachable", "http://192.0.2.1/", url.UserPassword("u", "p:w"), 502, "network is unreachable"},
		{"unknown", "http://no.example/", url.UserPassword("u", "p:w"), 502, "no such host"},
		{"no password", "http://10.66.0.2/echo", nil, 407, "wants a user"},
		{"wrong password", "http://10.66.0.2/echo", url.UserPassword("u", "p"), 407, "wants a user"},
	} {
		resp, err := client(tt.user).Get(tt.url)
		if err != nil {
			t.Errorf("%s: %v", tt.what, err)
			continue
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tt.status || !strings.Contains(string(b), tt.says) {
			t.Errorf("%s: %s %q", tt.what, resp.Status, b)
		}
	}
	if _, err := client(nil).Get("https://10.66.0.2/"); err == nil || !strings.Contains(err.Error(), "Proxy Authentication Required") {
		t.Errorf("CONNECT without a password: %v", err)
	}
}

// TestProxyHTTPBytes: what no client library would send.
func TestProxyHTTPBytes(t *testing.T) {
	p, a := proxyPair(t, ProxyOptions{})
	for _, tt := range []struct{ what, says, want string }{
		{"a path", "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"},
		{"another scheme", "GET ftp://10.66.0.2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"},
		{"no HTTP", "HELO there\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n"},
		{"no port", "CONNECT 10.66.0.2 HTTP/1.1\r\nHost: 10.66.0.2\r\nConnection: close\r\n\r\n", "HTTP/1.1 502 Bad Gateway\r\n"},
		{"a long header", "GET http://10.66.0.2/ HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("x", 2*maxHTTPHeader) + "\r\n\r\n", "HTTP/1.1 431 "},
	} {
		c := dialTCP(t, p)
		c.Write([]byte(tt.says))
		got, err := io.ReadAll(c)
		if !strings.HasPrefix(string(got), tt.want) {
			t.Errorf("%s: got %.60q, %v, want %q", tt.what, got, err, tt.want)
		}
	}
	// Data right behind the header, before the answer has come.
	c := dialTCP(t, p)
	c.Write([]byte("CONNECT www.example:7 HTTP/1.1\r\nHost: www.example:7\r\n\r\nearly"))
	c.CloseWrite()
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, &http.Request{Method: "CONNECT"})
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != "early" {
		t.Errorf("got %q, %v", got, err)
	}
	// A service that never answers the dial.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = a.Dial(ctx, "tcp", "10.66.0.2:7")
	if err == nil {
		if code := statusOf(context.DeadlineExceeded); code != http.StatusGatewayTimeout {
			t.Errorf("a timeout is status %d", code)
		}
	}
}

// TestProxyHTTPQuery: what a client asks for is not the proxy's to tidy up.
func TestProxyHTTPQuery(t *testing.T) {
	a, b := pair(t, nil)
	l, err := b.Listen("tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.RequestURI) })}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.ServeProxy(outside, ProxyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: p.Addr().String()})}
	t.Cleanup(c.CloseIdleConnections)
	for _, uri := range []string{"/?p=penstock.git;a=summary", "/a%2Fb/../c?z=1&a=%zz", "/x?b=2&a=1", "/?"} {
		request, _ := http.NewRequest("GET", "http://10.66.0.2/", nil)
		request.URL.Opaque = "//10.66.0.2" + uri
		response, err := c.RoundTrip(request)
		if err != nil {
			t.Fatal(err)
		}
		got, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if string(got) != uri {
			t.Errorf("asked for %s, the service was asked for %s", uri, got)
		}
	}
}

// TestProxyAbuse: clients that say nothing, too little, too slowly or nonsense are gone when their time
// is over, however many, and those that behave are served meanwhile.
func TestProxyAbuse(t *testing.T) {
	const conns = 60
	p, _ := proxyPair(t, ProxyOptions{HandshakeTimeout: 2 * time.Second, MaxConns: conns + 5})
	var clients sync.WaitGroup
	for i := range conns {
		c := dialTCP(t, p)
		clients.Go(func() {
			switch i % 6 {
			case 0: // nothing
			case 1:
				c.Write([]byte("\x05\x02\x00"))
			case 2:
				c.Write([]byte("\x05\x01\x00\x05\x01\x00\x03\xff"))
			case 3:
				c.Write([]byte("GET http://10.66.0.2/ HTTP/1.1\r\nHost: x\r\n"))
			case 4: // a byte at a time
				for _, b := range []byte("GET http://10.66.0.2/ HTTP/1.1\r\nHost: a-name-that-takes-its-time\r\n") {
					if _, err := c.Write([]byte{b}); err != nil {
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
			case 5:
				c.Write(append([]byte{0x16, 3, 1}, randomBytes(200)...)) // what TLS would send
			}
			c.SetReadDeadline(time.Now().Add(patience))
			io.Copy(io.Discard, c)
		})
	}
	d, _ := xproxy.SOCKS5("tcp", p.Addr().String(), nil, nil)
	c, err := d.Dial("tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatalf("a client that behaves was not served: %v", err)
	}
	echoes(t, c.(*net.TCPConn), 1000)
	c.Close()
	clients.Wait()
	waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 0 })

	// More than the bound: the rest is refused at once, and the bound is free again afterwards.
	var open []net.Conn
	for range conns + 20 {
		if c, err := net.Dial("tcp", p.Addr().String()); err == nil { // a reset can be that prompt
			open = append(open, c)
		}
	}
	s := waitStatus(t, p, func(s RelayStatus) bool { return s.Refused >= 10 })
	if s.Open > conns+5 {
		t.Errorf("%d connections at once, want at most %d", s.Open, conns+5)
	}
	for _, c := range open {
		c.Close()
	}
	waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 0 })
	if c, err = d.Dial("tcp", "10.66.0.2:7"); err != nil {
		t.Fatalf("after the crowd: %v", err)
	}
	c.Close()
}

// TestProxyClose: whatever is going on, Close ends it.
func TestProxyClose(t *testing.T) {
	p, a := proxyPair(t, ProxyOptions{})
	d, _ := xproxy.SOCKS5("tcp", p.Addr().String(), nil, nil)
	spliced, err := d.Dial("tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	defer spliced.Close()
	control, _ := associate(t, p)
	idle := dialTCP(t, p)
	waiting := dialTCP(t, p) // for the rest of its body
	waiting.Write([]byte("POST http://10.66.0.2/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx"))
	keptAlive := dialTCP(t, p)
	keptAlive.Write([]byte("GET http://10.66.0.2/echo HTTP/1.1\r\nHost: x\r\n\r\n"))
	if _, err := http.ReadResponse(bufio.NewReader(keptAlive), nil); err != nil {
		t.Fatal(err)
	}
	waitStatus(t, p, func(s RelayStatus) bool { return s.Open == 5 })
	began := time.Now()
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > defaultLimits.closing {
		t.Errorf("Close took %v", took)
	}
	for what, c := range map[string]net.Conn{"spliced": spliced, "association": control, "idle": idle, "waiting": waiting, "kept alive": keptAlive} {
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := io.Copy(io.Discard, c); timedOut(err) {
			t.Errorf("%s is still open", what)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ServeProxy(l, ProxyOptions{NoHTTP: true, NoSOCKS5: true}); err == nil {
		t.Error("a proxy that speaks nothing")
	}
	a.Close()
	l, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.ServeProxy(l, ProxyOptions{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close of the node: %v", err)
	}
}

// TestProxyOneProtocol: what is left out is not served.
func TestProxyOneProtocol(t *testing.T) {
	p, a := proxyPair(t, ProxyOptions{NoHTTP: true})
	c := dialTCP(t, p)
	c.Write([]byte("GET http://10.66.0.2/echo HTTP/1.1\r\nHost: x\r\n\r\n"))
	if got, _ := io.ReadAll(c); len(got) > 0 {
		t.Errorf("HTTP: %q", got)
	}
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 on loopback")
	}
	if p, err = a.ServeProxy(l, ProxyOptions{NoSOCKS5: true}); err != nil {
		t.Fatal(err)
	}
	c = dialTCP(t, p)
	c.Write([]byte("\x05\x01\x00"))
	if got, _ := io.ReadAll(c); len(got) > 0 {
		t.Errorf("SOCKS5: %q", got)
	}
	c = dialTCP(t, p)
	c.Write([]byte("GET http://[fd66::2]/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
	if got, err := io.ReadAll(c); !strings.HasPrefix(string(got), "HTTP/1.1 200 ") {
		t.Errorf("HTTP over IPv6: %q, %v", got, err)
	}
}

// FuzzSocksAddr: an address reads back as it was written, and no bytes are read that are
// not there.
func FuzzSocksAddr(f *testing.F) {
	f.Add([]byte("\x01\x0a\x42\x00\x02\x00\x07data"))
	f.Add([]byte("\x03\x0bwww.example\x00\x50"))
	f.Add([]byte("\x03\x0810.1.2.3\x00\x50"))
	f.Add(append([]byte{4}, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xff\xff\x0a\x42\x00\x02\x00\x07"...))
	f.Add([]byte("\x03\x00\x00\x50"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, size, err := parseSocksAddr(b)
		if err != nil {
			return
		}
		if size > len(b) || a.ip.IsValid() == (a.name != "") || a.ip.Is4In6() {
			t.Fatalf("%+v of %d bytes out of %d", a, size, len(b))
		}
		again, n, err := parseSocksAddr(b[:size])
		if err != nil || n != size || again != a {
			t.Fatalf("alone it is %+v, %d bytes, %v; was %+v, %d bytes", again, n, err, a, size)
		}
		if a.ip.IsValid() {
			w := appendSocksAddr(nil, netip.AddrPortFrom(a.ip, a.port))
			if again, n, err := parseSocksAddr(w); err != nil || n != len(w) || again != a {
				t.Fatalf("written down it is %+v, %v; was %+v", again, err, a)
			}
		}
	})
}
