package openconnect

import (
	"crypto/tls"
	"errors"
	"net/http"
	"strings"
	"time"
)

// The key of DTLS: RFC 5705 exporter (RFC 8446 7.5 in TLS 1.3) of the connection that
// carried CONNECT, without context. draft-mavrogiannopoulos-openconnect, 2.1.5.
const (
	exporterLabel = "EXPORTER-openconnect-psk"
	pskSize       = 32
)

// exportPSK takes the key out of a TLS connection, or says in words for people why it
// cannot be had.
func exportPSK(state *tls.ConnectionState) (psk []byte, reason string) {
	if state == nil {
		return nil, "the connection has no TLS"
	}
	psk, err := state.ExportKeyingMaterial(exporterLabel, nil, pskSize)
	if err != nil {
		if state.Version == tls.VersionTLS12 {
			// crypto/tls: "ExportKeyingMaterial is unavailable when neither TLS 1.3 nor
			// Extended Master Secret are negotiated".
			return nil, "TLS 1.2 without extended master secret: crypto/tls exports no key (TLS 1.3 does, GODEBUG=tlsunsafeekm=1 overrides)"
		}
		return nil, "TLS exports no key: " + strings.TrimPrefix(err.Error(), "crypto/tls: ")
	}
	return psk, ""
}

// connect answers CONNECT, and hands the connection over.
func (h *Handler) connect(w http.ResponseWriter, r *http.Request, c *Client) {
	if r.URL.Path != tunnelPath {
		// Not a proxy.
		w.Header().Set("Connection", "close")
		http.Error(w, "not found", http.StatusNotFound)
		return
	}
	request, err := ParseConnectRequest(r)
	if err != nil {
		w.Header().Set("Connection", "close")
		http.Error(w, "malformed request", http.StatusBadRequest)
		return
	}
	if request.Cookie == "" {
		h.refuse(w, r, ErrCookie)
		return
	}
	attempt := &Attempt{Client: c, Request: request}
	if request.PSK() {
		attempt.PSK, attempt.NoPSK = exportPSK(r.TLS)
	} else {
		attempt.NoPSK = "the client does not offer " + PSKNegotiate
	}
	admission, err := h.Sessions.Connect(r.Context(), attempt)
	if err != nil {
		h.refuse(w, r, err)
		return
	}
	settings := admission.Settings.fit(request, attempt.PSK != nil)
	handover, err := takeOver(w, settings.AppendTo([]byte("HTTP/1.1 200 CONNECTED\r\n")))
	if err != nil {
		h.log().Info("CONNECT: lost while answering", "remote", r.RemoteAddr, "err", err)
		if admission.Abort != nil {
			admission.Abort(err)
		}
		return
	}
	admission.Start(handover)
}

// refuse answers a CONNECT that gets no tunnel.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, ErrCookie) {
		w.Header().Set("Connection", "close")
		w.Header().Set("X-Reason", "Cookie is not acceptable")
		writeBody(w, http.StatusUnauthorized, "text/plain; charset=utf-8", nil)
		return
	}
	if full, ok := errors.AsType[*UnavailableError](err); ok {
		h.unavailable(w, full.Reason)
		return
	}
	h.log().Error("CONNECT: no decision", "remote", r.RemoteAddr, "err", err)
	h.unavailable(w, "")
}

// takeOver takes the connection from net/http and writes the head of an answer. On an
// error the connection is closed.
func takeOver(w http.ResponseWriter, head []byte) (*Handover, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(headerTime))
	if _, err := conn.Write(append(head, "\r\n"...)); err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	early, err := buffered.Reader.Peek(buffered.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, err
	}
	// net/http reuses the buffer.
	return &Handover{Conn: conn, Buffered: append([]byte(nil), early...)}, nil
}
