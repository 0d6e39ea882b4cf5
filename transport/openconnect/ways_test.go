package openconnect

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestGroupListOfAnotherKind: a server that calls a text "group_list" is answered, or refused, like any other.
func TestGroupListOfAnotherKind(t *testing.T) {
	for _, kind := range []string{"text", "password", "hidden"} {
		h := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `<config-auth client="vpn" type="auth-request"><auth id="main"><form method="post" action="/">`+
				`<input type="`+kind+`" name="group_list" label="Group:" value="staff"/></form></auth></config-auth>`)
		}))
		func() {
			defer h.Close()
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("%s: the client panics: %v", kind, p)
				}
			}()
			_, err := SignIn(bounded(t), Options{
				Dialer: Dialer{Pin: Pin(h.Certificate())}, Server: h.URL,
				Prompt: func(context.Context, Question) (string, error) { return "staff", nil },
			})
			t.Log(kind, err)
		}()
	}
}

// TestInternationalName: the pin of a server whose name is not ASCII.
func TestInternationalName(t *testing.T) {
	s := serve(t, newGate(), "127.0.0.1:0", nil)
	_, port, _ := net.SplitHostPort(s.addr)
	var dialled []string
	o := s.options()
	o.Server = "https://b\u00fccher.example:" + port
	o.Dialer = Dialer{Pin: s.pin, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled = append(dialled, address)
		return new(net.Dialer).DialContext(ctx, network, s.addr)
	}}
	login, err := SignIn(bounded(t), o)
	if err != nil {
		t.Fatal(err)
	}
	if login.Pin != s.pin {
		t.Errorf("the login of %q has pin %q, the server has shown %q", login.Host, login.Pin, s.pin)
	}
	tunnel, err := Connect(bounded(t), login, ConnectOptions{Dialer: o.Dialer})
	if err != nil {
		t.Errorf("CONNECT: %v", err)
	} else {
		tunnel.Conn.Close()
	}
	t.Log(dialled)
}

// TestOneRecordAWrite: what is written at once is one record, as ocserv reads one frame a record.
func TestOneRecordAWrite(t *testing.T) {
	s := serve(t, newGate(), "127.0.0.1:0", nil)
	login, err := SignIn(bounded(t), s.options())
	if err != nil {
		t.Fatal(err)
	}
	tunnel, err := Connect(bounded(t), login, ConnectOptions{BaseMTU: 9000})
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Conn.Close()
	h := <-s.started
	defer h.Conn.Close()
	if _, err := tunnel.Conn.Write(make([]byte, 8000)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16<<10)
	h.Conn.SetDeadline(time.Now().Add(5 * time.Second))
	n, err := h.Conn.Read(b) // one record
	if n != 8000 || err != nil {
		t.Errorf("the first record of a frame of 8000 bytes has %d, %v", n, err)
	}
}

// TestSlowBody: an answer has its time, the body too.
func TestSlowBody(t *testing.T) {
	release := make(chan struct{})
	h := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write([]byte("<config-auth"))
		w.(http.Flusher).Flush()
		<-release
	}))
	defer h.Close()
	defer close(release)
	ctx := bounded(t)
	_, err := SignIn(ctx, Options{Dialer: Dialer{Pin: Pin(h.Certificate())}, Server: h.URL, exchangeTime: 200 * time.Millisecond})
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an answer that never ends: %v", err)
	}
}
