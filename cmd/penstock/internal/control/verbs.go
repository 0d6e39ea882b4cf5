package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// Besides GET /status a node answers
//
//	GET /dial?address=HOST:PORT   101, and from then on the connection is one inside the VPN
//	GET /ping?host=HOST&...       200 and a netstack.PingReply
//	GET /speed?peer=NAME&test=... 200 and lines; see speed.go
//
// An error is 502, or 504 when it is about time, with the reason as text.

const (
	upgradeTo   = "penstock-stream"
	dialTimeout = 30 * time.Second
)

// verbs are what a node does for others.
type verbs struct {
	node *netstack.Node
	ctx  context.Context // ends when the node closes

	mu      sync.Mutex
	streams sync.WaitGroup // added to under mu while ctx lives
}

func (v *verbs) handle(mux *http.ServeMux) {
	mux.HandleFunc("GET /dial", v.dial)
	mux.HandleFunc("GET /ping", v.ping)
	mux.HandleFunc("GET /speed", v.speed)
}

// enter admits a stream unless the node closes. The caller calls v.streams.Done.
func (v *verbs) enter() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ctx.Err() != nil {
		return false
	}
	v.streams.Add(1)
	return true
}

// lateAnswer makes the answer arrive, a refusal too, that is known only after a while.
func lateAnswer(w http.ResponseWriter, after time.Duration) {
	// An error is of connections that have no deadlines.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(after + writeTimeout))
}

// fail answers with why something could not be done.
func fail(w http.ResponseWriter, err error) {
	code := http.StatusBadGateway
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		code = http.StatusGatewayTimeout
	}
	http.Error(w, err.Error(), code)
}

func (v *verbs) dial(w http.ResponseWriter, r *http.Request) {
	if !strings.EqualFold(r.Header.Get("Upgrade"), upgradeTo) {
		http.Error(w, "Upgrade: "+upgradeTo+" is missing", http.StatusUpgradeRequired)
		return
	}
	lateAnswer(w, dialTimeout)
	ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
	defer cancel()
	inside, err := v.node.Dial(ctx, "tcp", r.URL.Query().Get("address"))
	if err != nil {
		fail(w, err)
		return
	}
	defer inside.Close()
	if !v.enter() {
		fail(w, net.ErrClosed)
		return
	}
	defer v.streams.Done()
	outside, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		fail(w, err)
		return
	}
	defer outside.Close()
	stop := context.AfterFunc(v.ctx, func() { outside.Close() })
	defer stop()
	_, err = fmt.Fprintf(outside, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", upgradeTo)
	if err != nil {
		return
	}
	join(outside, buffered.Reader, inside)
}

// halfCloser is a connection whose halves end by themselves.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// join carries outside, of which in is the reader, and inside to each other until both halves have
// ended. An error ends both, with a reset inside.
func join(outside net.Conn, in io.Reader, inside net.Conn) {
	half := func(dst net.Conn, src io.Reader) {
		_, err := io.Copy(dst, src)
		if err == nil {
			if d, ok := dst.(halfCloser); ok {
				err = d.CloseWrite()
			}
		}
		if err != nil {
			if c, ok := inside.(*netstack.TCPConn); ok {
				c.SetLinger(0)
			}
			inside.Close()
			outside.Close()
		}
	}
	var other sync.WaitGroup
	other.Go(func() { half(inside, in) })
	half(outside, inside)
	other.Wait()
}

// PingRequest is one echo request.
type PingRequest struct {
	Host     string
	Network  string // "ip", "ip4" or "ip6"
	Size     int    // bytes of data
	Sequence int
	Timeout  time.Duration
}

func (v *verbs) ping(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	size, err1 := strconv.Atoi(q.Get("size"))
	sequence, err2 := strconv.ParseUint(q.Get("sequence"), 10, 16)
	timeout, err3 := time.ParseDuration(q.Get("timeout"))
	if err := errors.Join(err1, err2, err3); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	lateAnswer(w, timeout+dialTimeout)
	lookup, cancel := context.WithTimeout(r.Context(), dialTimeout)
	defer cancel()
	addrs, err := v.node.LookupNetIP(lookup, q.Get("network"), q.Get("host"))
	if err != nil {
		fail(w, err)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	reply, err := v.node.Ping(ctx, addrs[0], netstack.PingOptions{Size: size, Sequence: uint16(sequence)})
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(reply) // an error is the client's
}

// ErrNoReply: the host did not answer an echo request in time.
var ErrNoReply = errors.New("no reply in time")

// Ping lets the node behind the socket at path send an echo request.
func Ping(ctx context.Context, path string, p PingRequest) (reply netstack.PingReply, err error) {
	q := url.Values{
		"host": {p.Host}, "network": {p.Network}, "size": {strconv.Itoa(p.Size)},
		"sequence": {strconv.Itoa(p.Sequence)}, "timeout": {p.Timeout.String()},
	}
	body, err := get(ctx, path, "/ping?"+q.Encode())
	var re *refusal
	if errors.As(err, &re) && re.code == http.StatusGatewayTimeout && !strings.Contains(re.text, "lookup") {
		return reply, ErrNoReply
	}
	if err != nil {
		return reply, err
	}
	return reply, json.Unmarshal(body, &reply)
}

// refusal is the answer of a node that could not do what it was asked for.
type refusal struct {
	code int
	text string
}

func (r *refusal) Error() string { return r.text }

// refused reads a refusal.
func refused(resp *http.Response) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil || len(text) == 0 {
		text = []byte(resp.Status)
	}
	return &refusal{resp.StatusCode, strings.TrimSpace(string(text))}
}

// A Stream is a TCP connection inside the VPN, by way of a node's socket.
type Stream struct {
	*net.UnixConn
	r *bufio.Reader
}

// Read implements io.Reader.
func (s *Stream) Read(b []byte) (int, error) { return s.r.Read(b) }

// WriteTo implements io.WriterTo, in place of the socket's own, which would miss what has been read
// with the answer's header.
func (s *Stream) WriteTo(w io.Writer) (int64, error) { return s.r.WriteTo(w) }

// Dial connects to an address inside the VPN through the node behind the socket at path. ctx
// bounds the dialling.
func Dial(ctx context.Context, path, address string) (*Stream, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, asked(path, err)
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	s, err := upgrade(c, address)
	if !stop() && err == nil {
		err = os.ErrDeadlineExceeded
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return s, nil
}

func upgrade(c net.Conn, address string) (*Stream, error) {
	req, err := http.NewRequest(http.MethodGet, "http://penstock/dial?"+url.Values{"address": {address}}.Encode(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", upgradeTo)
	if err := req.Write(c); err != nil {
		return nil, err
	}
	r := bufio.NewReaderSize(c, 64<<10)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return nil, refused(resp)
	}
	return &Stream{c.(*net.UnixConn), r}, nil
}
