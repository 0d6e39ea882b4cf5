package netstack_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// fickle answers CONNECT as it likes.
type fickle struct {
	*httptest.Server
	mu       sync.Mutex
	accept   bool // else 401
	connects int
	conns    []net.Conn
}

func newFickle(t *testing.T) *fickle {
	f := &fickle{accept: true}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.connects++
		if !f.accept {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		s := openconnect.Settings{Addresses: []netip.Prefix{netip.MustParsePrefix("10.97.0.5/24")}, MTU: 1400, Include: []netip.Prefix{netip.MustParsePrefix("10.97.0.0/24")}}
		c.Write(append(s.AppendTo([]byte("HTTP/1.1 200 CONNECTED\r\n")), "\r\n"...))
		f.conns = append(f.conns, c)
	}))
	f.StartTLS()
	t.Cleanup(func() {
		f.mu.Lock()
		for _, c := range f.conns {
			c.Close()
		}
		f.mu.Unlock()
		f.Server.Close()
	})
	return f
}

func (f *fickle) login() openconnect.Login {
	return openconnect.Login{Host: f.Listener.Addr().String(), Cookie: "abc", Pin: openconnect.Pin(f.Certificate())}
}

// lose ends the tunnels without a goodbye.
func (f *fickle) lose(accept bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.accept = accept
	for _, c := range f.conns {
		c.Close()
	}
	f.conns = nil
}

// A server that lets the user sign in, and then does not take the cookie (ocserv when the user has too many
// sessions), is not to be called without a pause.
func TestOpenConnectSignInLoop(t *testing.T) {
	f := newFickle(t)
	var signIns atomic.Int32
	n, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{
		Login:   f.login(),
		Connect: openconnect.ConnectOptions{NoDTLS: true},
		SignIn: func(context.Context) (*openconnect.Login, error) {
			signIns.Add(1)
			l := f.login()
			return &l, nil
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	f.lose(false)
	time.Sleep(3 * time.Second)
	if got := signIns.Load(); got > 4 {
		t.Errorf("%d sign-ins in 3 seconds", got)
	}
}

// A sign-in that fails for want of a network is no end of the tunnel.
func TestOpenConnectSignInUnavailable(t *testing.T) {
	for name, failure := range map[string]error{
		"the server is busy": &openconnect.UnavailableError{Reason: "The server is busy."},
		"no network":         &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("network is unreachable")},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFickle(t)
			var signIns atomic.Int32
			n, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{
				Login:   f.login(),
				Connect: openconnect.ConnectOptions{NoDTLS: true},
				SignIn: func(context.Context) (*openconnect.Login, error) {
					if signIns.Add(1) == 1 {
						return nil, failure
					}
					f.lose(true)
					l := f.login()
					return &l, nil
				},
			}})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			f.lose(false)
			for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				s := n.OpenConnect()
				if s.State == netstack.OpenConnectEnded {
					t.Fatalf("ended: %v", s.Err)
				}
				if s.State == netstack.OpenConnectUp && signIns.Load() == 2 {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("%+v after %d sign-ins", s, signIns.Load())
				}
			}
		})
	}
}

// A server that hangs up right after its answer is called again and again, with pauses.
func TestOpenConnectHangsUp(t *testing.T) {
	f := newFickle(t)
	n, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{
		Login: f.login(), Connect: openconnect.ConnectOptions{NoDTLS: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		f.lose(true)
	}
	f.mu.Lock()
	got := f.connects
	f.mu.Unlock()
	if got > 6 {
		t.Errorf("%d times CONNECT in 4 seconds", got)
	}
	if got < 3 {
		t.Errorf("only %d times CONNECT in 4 seconds: %+v", got, n.OpenConnect())
	}
}
