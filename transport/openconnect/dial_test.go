package openconnect

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestRedirect(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	var seen atomic.Int32
	from := serve(t, newGate(), "127.0.0.1:0", nil)
	from.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Add(1)
		http.SetCookie(w, &http.Cookie{Name: "theirs", Value: "secret"})
		http.Redirect(w, r, "https://"+s.addr+"/", http.StatusFound)
	})
	watched := s.http.Handler
	s.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Cookie"), "theirs") {
			t.Error("a cookie went to another host")
		}
		watched.ServeHTTP(w, r)
	})
	o := s.options()
	o.Server, o.Pin = from.addr, ""
	o.RootCAs = s.ca.pool
	o.RootCAs.AddCert(from.ca.cert)
	login := mustSignIn(t, o)
	if seen.Load() != 1 || login.Host != s.addr || login.Pin != s.pin {
		t.Errorf("%d redirects, %+v", seen.Load(), login)
	}

	from.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+s.addr+"/", http.StatusFound)
	})
	if _, err := SignIn(bounded(t), o); err == nil || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("out of TLS: %v", err)
	}
	from.http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/again", http.StatusFound)
	})
	if _, err := SignIn(bounded(t), o); err == nil || !strings.Contains(err.Error(), "redirecting") {
		t.Errorf("for ever: %v", err)
	}
}

// TestProxy goes through an HTTP proxy that wants a password.
func TestProxy(t *testing.T) {
	g := newGate()
	s := serve(t, g, "127.0.0.1:0", nil)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var asked atomic.Int32
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r, err := http.ReadRequest(bufio.NewReader(conn))
				if err != nil || r.Method != http.MethodConnect || r.Header.Get("Proxy-Authorization") != "Basic dTpw" {
					conn.Write([]byte("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"))
					return
				}
				asked.Add(1)
				to, err := net.Dial("tcp", r.Host)
				if err != nil {
					return
				}
				defer to.Close()
				conn.Write([]byte("HTTP/1.1 200 OK\r\nVia: test\r\n\r\n"))
				go io.Copy(to, conn)
				io.Copy(conn, to)
			}()
		}
	}()
	with := func(user *url.Userinfo) func(*url.URL) (*url.URL, error) {
		return func(*url.URL) (*url.URL, error) {
			return &url.URL{Scheme: "http", Host: l.Addr().String(), User: user}, nil
		}
	}
	o := s.options()
	o.Proxy = with(url.UserPassword("u", "p"))
	login := mustSignIn(t, o)
	tunnel, err := Connect(bounded(t), login, ConnectOptions{Dialer: o.Dialer})
	if err != nil {
		t.Fatal(err)
	}
	tunnel.Conn.Close()
	if !tunnel.Proxied || asked.Load() != 2 {
		t.Errorf("proxied %v, the proxy was asked %d times", tunnel.Proxied, asked.Load())
	}
	o.Proxy = with(nil)
	if _, err := SignIn(bounded(t), o); err == nil || !strings.Contains(err.Error(), "407") {
		t.Errorf("without a password: %v", err)
	}
}

// TestCancelled: a server that never answers is left at once.
func TestCancelled(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = SignIn(ctx, Options{Server: l.Addr().String(), Dialer: Dialer{Proxy: noProxy}})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
