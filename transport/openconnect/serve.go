package openconnect

import (
	"errors"
	"html"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

var _ http.Handler = (*Handler)(nil)

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.seal.init(h.Secret)
	header := w.Header()
	header.Set("X-Transcend-Version", "1")
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	c := clientOf(r)
	switch r.Method {
	case http.MethodConnect:
		h.connect(w, r, c)
	case http.MethodPost:
		h.post(w, r, c)
	case http.MethodGet, http.MethodHead:
		h.get(w, r, c)
	default:
		header.Set("Allow", "GET, HEAD, POST, CONNECT")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
	}
}

// clientOf gathers what is known of who is asking.
func clientOf(r *http.Request) *Client {
	c := &Client{UserAgent: cut(clean(r.UserAgent())), Device: deviceOf(r.Header)}
	if remote, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		c.Remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		c.Local = netip.AddrPortFrom(local.AddrPort().Addr().Unmap(), local.AddrPort().Port())
	}
	if r.TLS != nil {
		c.ServerName = r.TLS.ServerName
		if len(r.TLS.VerifiedChains) > 0 {
			c.Certificate = r.TLS.PeerCertificates[0]
		}
	}
	return c
}

// post answers documents and forms.
func (h *Handler) post(w http.ResponseWriter, r *http.Request, c *Client) {
	m, d, err := readMessage(w, r)
	switch {
	case errors.Is(err, errTooBig):
		http.Error(w, "too large", http.StatusRequestEntityTooLarge)
		return
	case err != nil:
		http.Error(w, "malformed request", http.StatusBadRequest)
		return
	}
	if c.Device == (Device{}) {
		c.Device = m.device
	}
	switch {
	case m.kind == typeLogout || r.URL.Path == "/logout":
		h.logout(w, r, c)
	case m.kind == typeInit:
		c.URL = m.groupAccess
		h.begin(w, r, c, m.groupSelect, "", d)
	default:
		h.answer(w, r, c, m, d)
	}
}

// get answers old clients, which start so, the paths that stock clients fetch, and
// people who look with a browser.
func (h *Handler) get(w http.ResponseWriter, r *http.Request, c *Client) {
	path := r.URL.Path
	switch {
	case path == "/logout" || path == "/+webvpn+/webvpn_logout.html":
		h.logout(w, r, c)
	case path == "/favicon.ico" || path == "/robots.txt":
		http.NotFound(w, r)
	// What Cisco's client fetches before it connects: its own updates, of which there
	// are none.
	case path == "/1/VPNManifest.xml":
		writeBody(w, http.StatusOK, "text/xml; charset=utf-8",
			[]byte(xmlHead+"<vpn rev=\"1.0\">\n</vpn>\n"))
	case path == "/1/binaries/update.txt":
		writeBody(w, http.StatusOK, "text/plain; charset=utf-8", []byte("0,0,0000\n"))
	case path == "/1/binaries/vpndownloader.sh":
		writeBody(w, http.StatusOK, "application/x-shellscript", []byte("#!/bin/sh\n\nexit 0\n"))
	case strings.HasPrefix(path, "/1/") || strings.HasPrefix(path, "/+CSCOT+/"):
		writeBody(w, http.StatusOK, "text/html; charset=utf-8", nil)
	case !isVPNClient(r) && path == "/":
		h.page(w)
	case strings.Count(path, "/") > 1 || !isVPNClient(r):
		http.NotFound(w, r)
	default:
		h.begin(w, r, c, "", "", speaksForm)
	}
}

// isVPNClient tells a client from a browser.
func isVPNClient(r *http.Request) bool {
	agent := strings.ToLower(r.UserAgent())
	return strings.Contains(agent, "anyconnect") || strings.Contains(agent, "openconnect") ||
		r.Header.Get("X-Transcend-Version") != "" || r.Header.Get("X-Aggregate-Auth") != ""
}

// page is for people with a browser.
func (h *Handler) page(w http.ResponseWriter) {
	title := html.EscapeString(h.title())
	header := w.Header()
	header.Set("Content-Security-Policy", "default-src 'none'")
	header.Set("Referrer-Policy", "no-referrer")
	writeBody(w, http.StatusOK, "text/html; charset=utf-8", []byte("<!DOCTYPE html>\n"+
		"<html lang=\"en\"><head><meta charset=\"utf-8\"><title>"+title+"</title></head>\n"+
		"<body><h1>"+title+"</h1>\n"+
		"<p>This is a VPN server. Connect to it with OpenConnect, or another client of the AnyConnect protocol.</p>\n"+
		"</body></html>\n"))
}

// logout ends the session of the cookie that came along.
func (h *Handler) logout(w http.ResponseWriter, r *http.Request, c *Client) {
	io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, maxClientDocument))
	if cookie := cookieOf(r.Header, cookieName); cookie != "" {
		h.Sessions.Logout(r.Context(), c, cookie)
	}
	setCookie(w, cookieName, "", -1)
	setCookie(w, contextName, "", -1)
	m := &serverMessage{kind: typeComplete, hasAuth: true, form: Form{ID: "logout", Title: h.title(), Message: "Signed out."}}
	writeBody(w, http.StatusOK, "text/xml; charset=utf-8", m.document())
}

// unavailable answers 503 with a reason that openconnect shows.
func (h *Handler) unavailable(w http.ResponseWriter, reason string) {
	if reason = clean(reason); reason == "" {
		reason = "Server error"
	}
	header := w.Header()
	header.Set("X-Reason", reason)
	header.Set("Connection", "close")
	writeBody(w, http.StatusServiceUnavailable, "text/plain; charset=utf-8", []byte(reason+"\n"))
}

func (h *Handler) title() string {
	if h.Title == "" {
		return "VPN server"
	}
	return h.Title
}

func (h *Handler) signInTime() time.Duration {
	if h.SignInTime <= 0 {
		return 5 * time.Minute
	}
	return h.SignInTime
}

func (h *Handler) log() *slog.Logger {
	if h.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return h.Logger
}
