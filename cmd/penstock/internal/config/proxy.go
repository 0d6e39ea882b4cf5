package config

import (
	"fmt"
	"net/netip"
	"strings"
)

// Proxy is the [proxy] table.
type Proxy struct {
	SOCKS5, HTTP   string // "host:port" to listen on; empty: no such proxy. The same: one port for both
	User, Password string // both empty: nobody is asked
}

const (
	wantProxyListen = `an address and a port of this machine, such as "127.0.0.1:1080"`
	wantCredential  = "at most 255 bytes" // RFC 1929 2
)

func (r *reader) proxy(raw *rawProxy) (p Proxy) {
	p.SOCKS5 = r.proxyListen("proxy.socks5", raw.SOCKS5)
	p.HTTP = r.proxyListen("proxy.http", raw.HTTP)
	p.User = r.credential("proxy.user", raw.User)
	p.Password = r.credential("proxy.password", raw.Password)
	if strings.Contains(p.User, ":") {
		r.wrong("proxy.user", "has a colon in it", "a name without one (RFC 7617 2)")
	}
	if (raw.User == nil) != (raw.Password == nil) {
		key, other := "proxy.password", "proxy.user"
		if raw.User == nil {
			key, other = other, key
		}
		r.wrongAt(other, key, "is missing", "user and password, or neither")
	}
	return p
}

func (r *reader) proxyListen(path string, v any) string {
	s, ok := r.text(path, v, wantProxyListen)
	if !ok {
		return ""
	}
	if problem := checkHostPort(s, true, true); problem != "" {
		r.wrong(path, quoted(s)+" "+problem, wantProxyListen)
		return ""
	}
	if problem := checkListen(Port{Network: "tcp", Listen: s}); problem != "" {
		r.wrong(path, quoted(s)+" "+problem, wantProxyListen)
		return ""
	}
	return s
}

// credential reads a user or password. No message shows it.
func (r *reader) credential(path string, v any) string {
	s, ok := r.text(path, v, wantCredential)
	if ok && len(s) > 255 {
		r.wrong(path, fmt.Sprintf("is %d bytes long", len(s)), wantCredential)
	}
	return s
}

// proxyTogether warns of a proxy that strangers can use.
func (r *reader) proxyTogether(p *Proxy) {
	if p.User != "" || p.Password != "" {
		return
	}
	for path, listen := range map[string]string{"proxy.socks5": p.SOCKS5, "proxy.http": p.HTTP} {
		host := listen[:strings.LastIndexByte(listen, ':')+1]
		if listen == "" || host == "localhost:" {
			continue
		}
		if a := hostAddr(listen); !a.IsLoopback() || a == (netip.Addr{}) {
			r.warn(path, quoted(listen)+" can be used by everybody who reaches this machine", "an address of loopback, or user and password")
		}
	}
}
