package netstack

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// An association is what UDP ASSOCIATE makes (RFC 1928 7): a socket for the client, which
// puts a header with the destination before each datagram, and one inside the VPN.
//
//	client ── header, datagram ── outside │ inside ── datagram ── VPN
//
// It lives as long as the client's TCP connection, and no longer than it is used.
type association struct {
	proxy   *proxy
	outside *net.UDPConn
	inside  *UDPConn
	active  atomic.Bool // something was relayed since the last look

	host   netip.Addr // of the client; datagrams from others are dropped
	client atomic.Pointer[netip.AddrPort]

	mu    sync.Mutex
	known map[netip.Addr]bool // whom the client has sent to; others may not send to it
	names map[string]*socksLookup
}

// A socksLookup is a name that the client sends to.
type socksLookup struct {
	addr    netip.Addr // not valid while it is looked up, and when that has failed
	done    time.Time  // zero while it is looked up
	waiting []namedDatagram
}

// namedDatagram is a copy.
type namedDatagram struct {
	port    uint16
	payload []byte
}

// Bounds of one association.
const (
	maxKnown     = 1024             // addresses; beyond it all are forgotten
	maxNames     = 64               // names, looked up or being looked up
	maxNameQueue = 8                // datagrams to one name that is looked up
	nameLifetime = 30 * time.Second // then it is looked up again, which asks the cache first
)

// socksAssociate is the UDP ASSOCIATE command. from is where the client will send from, as far
// as it knows.
func (p *proxy) socksAssociate(c net.Conn, from socksAddr) error {
	defer p.associations.Add(-1)
	if p.associations.Add(1) > maxAssociations {
		writeSocksReply(c, socksFailure, netip.AddrPort{})
		return errSocksFull
	}
	a, err := p.newAssociation(c, from)
	if err != nil {
		writeSocksReply(c, socksFailure, netip.AddrPort{})
		return err
	}
	defer a.close()
	if err := writeSocksReply(c, socksSucceeded, addrPortOf(a.outside.LocalAddr())); err != nil {
		return err
	}
	if p.relay.spawn(a.fromClient) && p.relay.spawn(a.toClient) {
		a.watch(c)
	}
	return nil
}

func (p *proxy) newAssociation(c net.Conn, from socksAddr) (*association, error) {
	local, remote := addrPortOf(c.LocalAddr()), addrPortOf(c.RemoteAddr())
	if !local.IsValid() || !remote.IsValid() {
		return nil, errors.New("SOCKS5: UDP ASSOCIATE needs a TCP connection of the system")
	}
	inside, err := p.node.ListenPacket("udp", ":0")
	if err != nil {
		return nil, err
	}
	outside, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local.Addr(), 0)))
	if err != nil {
		inside.Close()
		return nil, err
	}
	a := &association{
		proxy: p, outside: outside, inside: inside.(*UDPConn), host: remote.Addr().WithZone(""),
		known: map[netip.Addr]bool{}, names: map[string]*socksLookup{},
	}
	// Some clients say here where they want to send to instead.
	if from.port != 0 && (from.ip == a.host || from.ip.IsValid() && from.ip.IsUnspecified()) {
		at := netip.AddrPortFrom(a.host, from.port)
		a.client.Store(&at)
	}
	return a, nil
}

func (a *association) close() {
	a.outside.Close()
	a.inside.Close()
}

// watch waits until the client's connection ends, or the association has been silent for too
// long. What the client sends on the connection means nothing.
func (a *association) watch(c net.Conn) {
	const looks = 4
	silent := 0
	b := make([]byte, 64)
	for silent < looks {
		c.SetDeadline(time.Now().Add(a.proxy.o.UDPIdle / looks))
		_, err := c.Read(b)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if silent++; a.active.Swap(false) {
				silent = 0
			}
		case err != nil:
			return
		}
	}
}

// fromClient relays outbound datagrams.
func (a *association) fromClient() {
	b := make([]byte, 64<<10)
	for {
		n, from, err := a.outside.ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || !a.isClient(from) || !a.outbound(b[:n]) {
			a.proxy.relay.count.dropped.Add(1)
		}
	}
}

// isClient tells whether from is the client, which the first datagram may decide.
func (a *association) isClient(from netip.AddrPort) bool {
	from = netip.AddrPortFrom(from.Addr().Unmap().WithZone(""), from.Port())
	if client := a.client.Load(); client != nil {
		return from == *client
	}
	if from.Addr() != a.host {
		return false
	}
	a.client.Store(&from)
	return true
}

// outbound sends a client's datagram on, or keeps it until its name is known. It borrows b.
func (a *association) outbound(b []byte) bool {
	// Two reserved bytes, then the number of the fragment: RFC 1928 7 lets those be dropped.
	if len(b) < 3 || b[2] != 0 {
		return false
	}
	to, size, err := parseSocksAddr(b[3:])
	if err != nil {
		return false
	}
	a.active.Store(true)
	payload := b[3+size:]
	if to.ip.IsValid() {
		return a.send(netip.AddrPortFrom(to.ip, to.port), payload)
	}
	return a.sendNamed(to, payload)
}

func (a *association) send(to netip.AddrPort, payload []byte) bool {
	a.mu.Lock()
	if !a.known[to.Addr()] {
		if len(a.known) >= maxKnown {
			clear(a.known)
		}
		a.known[to.Addr()] = true
	}
	a.mu.Unlock()
	if _, err := a.inside.WriteToUDPAddrPort(payload, to); err != nil {
		return false
	}
	a.proxy.relay.count.datagramsToService.Add(1)
	a.proxy.relay.count.bytesToService.Add(uint64(len(payload)))
	return true
}

// sendNamed copies payload if the name is not known yet.
func (a *association) sendNamed(to socksAddr, payload []byte) bool {
	a.mu.Lock()
	l := a.names[to.name]
	if l != nil && !l.done.IsZero() {
		if time.Since(l.done) < nameLifetime {
			a.mu.Unlock()
			return l.addr.IsValid() && a.send(netip.AddrPortFrom(l.addr, to.port), payload)
		}
		delete(a.names, to.name)
		l = nil
	}
	defer a.mu.Unlock()
	if l == nil {
		if len(a.names) >= maxNames && !a.forgetName() {
			return false
		}
		l = &socksLookup{}
		if !a.proxy.relay.spawn(func() { a.lookup(to.name, l) }) {
			return false
		}
		a.names[to.name] = l
	}
	if len(l.waiting) >= maxNameQueue {
		return false
	}
	l.waiting = append(l.waiting, namedDatagram{to.port, append([]byte(nil), payload...)})
	return true
}

// forgetName makes room among the names, unless all are being looked up. a.mu is held.
func (a *association) forgetName() bool {
	for name, l := range a.names {
		if !l.done.IsZero() {
			delete(a.names, name)
			return true
		}
	}
	return false
}

// lookup resolves a name and sends what waits for it.
func (a *association) lookup(name string, l *socksLookup) {
	addrs, err := a.proxy.node.LookupNetIP(a.proxy.relay.ctx, "ip", name)
	if err != nil {
		a.proxy.failed(err)
	}
	var addr netip.Addr
	for _, candidate := range addrs {
		if a.proxy.node.reachable(candidate) == nil {
			addr = candidate.Unmap()
			break
		}
	}
	a.mu.Lock()
	waiting := l.waiting
	l.waiting, l.addr, l.done = nil, addr, time.Now()
	a.mu.Unlock()
	for _, d := range waiting {
		if !addr.IsValid() || !a.send(netip.AddrPortFrom(addr, d.port), d.payload) {
			a.proxy.relay.count.dropped.Add(1)
		}
	}
}

// maxSocksHeader is that of an IPv6 address.
const maxSocksHeader = 3 + 1 + 16 + 2

// toClient relays inbound datagrams. It takes a block only while there is something to relay.
func (a *association) toClient() {
	for {
		if err := a.inside.waitReadable(); err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		b := blocks.Get().(*block)
		err := a.inbound(b)
		blocks.Put(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.proxy.relay.count.dropped.Add(1)
		}
	}
}

var errNotAsked = errors.New("a datagram from an address that the client has not sent to")

func (a *association) inbound(b *block) error {
	n, from, err := a.inside.ReadFromUDPAddrPort(b[maxSocksHeader:])
	if err != nil {
		return err
	}
	client := a.client.Load()
	a.mu.Lock()
	known := a.known[from.Addr()]
	a.mu.Unlock()
	if client == nil || !known {
		return errNotAsked
	}
	var header [maxSocksHeader]byte
	h := appendSocksAddr(header[:3], from)
	datagram := b[maxSocksHeader-len(h) : maxSocksHeader+n]
	copy(datagram, h)
	a.active.Store(true)
	if _, err := a.outside.WriteToUDPAddrPort(datagram, *client); err != nil {
		if errors.Is(err, net.ErrClosed) {
			return err
		}
		return io.ErrShortWrite
	}
	a.proxy.relay.count.datagramsToClient.Add(1)
	a.proxy.relay.count.bytesToClient.Add(uint64(n))
	return nil
}
