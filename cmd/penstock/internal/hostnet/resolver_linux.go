package hostnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Endpoints resolves the names of peers over the host's network, whatever the routes and the host's
// resolver say by then: where the tunnel is, its own packets cannot wait for it.
type Endpoints struct {
	mark    uint32
	servers []netip.AddrPort // of the host, as they were at first
	tunnel  []netip.AddrPort // those that Apply will set
}

// serverTimeout is for one server to answer.
const serverTimeout = 3 * time.Second

// NewEndpoints is to be called before Apply. mark is on what it sends; dns is what Apply will set.
func NewEndpoints(mark uint32, dns DNS) *Endpoints {
	e := &Endpoints{mark: mark}
	e.servers = e.uplinks() // all that the host has; a server of the tunnel's may be one of them, 1.1.1.1 for one
	e.tunnel = slices.Clone(dns.Servers)
	for _, s := range dns.Split {
		e.tunnel = append(e.tunnel, s.Servers...)
	}
	return e
}

// uplinks are the servers of the host's network, as far as they are known.
func (e *Endpoints) uplinks() []netip.AddrPort {
	// What systemd-resolved asks: all interfaces' servers, ours with them.
	for _, path := range []string{resolvedFolder + "/resolv.conf", resolvConfPath} {
		b, err := os.ReadFile(path)
		if err != nil || path == resolvConfPath && e.servers != nil {
			continue
		}
		servers := slices.DeleteFunc(nameservers(string(b)), func(a netip.AddrPort) bool { return slices.Contains(e.tunnel, a) })
		if len(servers) > 0 {
			return servers
		}
	}
	return e.servers
}

// Resolve turns "host:port" into addresses.
func (e *Endpoints) Resolve(endpoint string) ([]netip.AddrPort, error) {
	host, service, err := net.SplitHostPort(endpoint)
	if err != nil {
		return nil, err
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil {
		return nil, err
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a, uint16(port))}, nil
	}
	ips, err := e.lookup(host)
	var remotes []netip.AddrPort
	for _, ip := range ips {
		remotes = append(remotes, netip.AddrPortFrom(ip.Unmap(), uint16(port)))
	}
	return remotes, err
}

func (e *Endpoints) lookup(host string) (ips []netip.Addr, err error) {
	for _, server := range e.uplinks() {
		r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			d := net.Dialer{Control: e.setMark}
			return d.DialContext(ctx, network, server.String())
		}}
		ctx, cancel := context.WithTimeout(context.Background(), serverTimeout)
		ips, err = r.LookupNetIP(ctx, "ip", host)
		cancel()
		var none *net.DNSError
		if err == nil || errors.As(err, &none) && none.IsNotFound {
			return ips, err
		}
	}
	if err == nil { // no server is known
		ctx, cancel := context.WithTimeout(context.Background(), serverTimeout)
		defer cancel()
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}
	return nil, err
}

func (e *Endpoints) setMark(_, _ string, c syscall.RawConn) (err error) {
	if e.mark == 0 {
		return nil
	}
	if controlErr := c.Control(func(fd uintptr) {
		err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(int32(e.mark))))
	}); controlErr != nil {
		return controlErr
	}
	return err
}
