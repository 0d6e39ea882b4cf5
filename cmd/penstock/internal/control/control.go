// Package control is how a running node is asked what it is doing: HTTP over a
// Unix socket that only the node's own user can open.
//
//	curl --unix-socket $XDG_RUNTIME_DIR/penstock/node.sock http://penstock/status
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// Report is the answer to GET /status. Its JSON form is stable: keys are added,
// never renamed.
type Report struct {
	Version string          `json:"version"` // of the program that runs
	PID     int             `json:"pid"`
	Config  string          `json:"config"` // the file's absolute path
	Node    netstack.Status `json:"node"`
	// Server is nil unless the node is that of penstock serve.
	Server *gateway.Status `json:"server,omitempty"`
}

// writeTimeout is what an answer may take, if it is not about something that takes longer itself.
const writeTimeout = 10 * time.Second

// Serve answers requests on l, which it takes, until the returned function is
// called. That waits for requests under way, for a second at most. node does what programs
// ask for; nil: only the report can be had. More can be handled besides.
func Serve(l net.Listener, report func() Report, node *netstack.Node, besides ...func(*http.ServeMux)) (stop func()) {
	return serve(l, report, node, besides...)
}

// ServeGateway is Serve for a server and its node.
func ServeGateway(l net.Listener, report func() Report, server *gateway.Server, besides ...func(*http.ServeMux)) (stop func()) {
	return serve(l, report, server.Node(), append(besides, serverVerbs{server}.handle)...)
}

func serve(l net.Listener, report func() Report, node *netstack.Node, besides ...func(*http.ServeMux)) (stop func()) {
	mux := http.NewServeMux()
	for _, handle := range besides {
		handle(mux)
	}
	ctx, cancel := context.WithCancel(context.Background())
	v := &verbs{node: node, ctx: ctx}
	if node != nil {
		v.handle(mux)
	}
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		// An error is the client's: it has gone away.
		_ = e.Encode(report())
	})
	s := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       10 * time.Second,
		MaxHeaderBytes:    4 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = s.Serve(l) // http.ErrServerClosed, always: nothing else ends it but a broken socket
	}()
	return func() {
		v.mu.Lock()
		cancel() // streams end, and no new one begins
		v.mu.Unlock()
		wait, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if s.Shutdown(wait) != nil {
			s.Close()
		}
		<-served
		v.streams.Wait()
	}
}

// OnDown calls down when somebody asks the node to end, with POST /down. The answer, 202, does not
// wait for the end.
func OnDown(down func()) func(*http.ServeMux) {
	return func(mux *http.ServeMux) {
		mux.HandleFunc("POST /down", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusAccepted)
			down()
		})
	}
}

// Down asks the node behind the socket at path to end.
func Down(ctx context.Context, path string) error {
	resp, err := send(ctx, http.MethodPost, path, "/down")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusAccepted {
		return fmt.Errorf("ask the node behind %s: %w", path, refused(resp))
	}
	return nil
}

// ErrNotRunning: nobody answers on the socket.
var ErrNotRunning = errors.New("no node is running")

// maxReport is a bound on what a client reads: a report takes about 700 bytes a
// peer.
const maxReport = 64 << 20

// Fetch asks the node behind the socket at path for its report and returns it as it came.
func Fetch(ctx context.Context, path string) ([]byte, error) {
	body, err := get(ctx, path, "/status")
	var re *refusal
	if errors.As(err, &re) {
		return nil, fmt.Errorf("ask the node behind %s: %w", path, err)
	}
	return body, err
}

// get asks the node behind the socket at path. An answer that is none is a *refusal.
func get(ctx context.Context, path, what string) ([]byte, error) {
	resp, err := ask(ctx, path, what)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReport))
	if err != nil {
		return nil, asked(path, err)
	}
	return body, nil
}

// ask is get for an answer that comes bit by bit. The caller closes its body.
func ask(ctx context.Context, path, what string) (*http.Response, error) {
	resp, err := send(ctx, http.MethodGet, path, what)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		return nil, refused(resp)
	}
	return resp, nil
}

// send sends a request without a body. The caller closes the answer's.
func send(ctx context.Context, method, path, what string) (*http.Response, error) {
	t := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://penstock"+what, nil)
	if err != nil {
		return nil, err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, asked(path, err)
	}
	return resp, nil
}

// asked says why the node behind path could not be asked.
func asked(path string, err error) error {
	if stale(err) {
		return fmt.Errorf("%w behind %s", ErrNotRunning, path)
	}
	return fmt.Errorf("ask the node behind %s: %w", path, err)
}
