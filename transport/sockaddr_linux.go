package transport

import (
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr is a socket address as the kernel takes and gives it. IPv4 addresses
// are mapped on an AF_INET6 socket.
type sockaddr struct {
	raw  unix.RawSockaddrInet6 // or a RawSockaddrInet4 in its place
	size uint32
	is4  bool // IPv4, mapped or not
}

func (a *sockaddr) pointer() *byte { return (*byte)(unsafe.Pointer(&a.raw)) }

// set encodes remote. The error is of an address that the socket cannot send to.
func (a *sockaddr) set(remote netip.AddrPort, inet6 bool, zones *zoneCache) error {
	addr := remote.Addr()
	a.is4 = addr.Is4() || addr.Is4In6()
	if !inet6 {
		if !a.is4 {
			return &net.AddrError{Err: "an IPv4 socket does not reach it", Addr: remote.String()}
		}
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		*sa = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: bigEndian(remote.Port()), Addr: addr.Unmap().As4()}
		a.size = unix.SizeofSockaddrInet4
		return nil
	}
	if !addr.IsValid() {
		return &net.AddrError{Err: "not an address", Addr: remote.String()}
	}
	a.raw = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: bigEndian(remote.Port()), Addr: addr.As16()}
	a.size = unix.SizeofSockaddrInet6
	if zone := addr.Zone(); zone != "" {
		index, err := zones.index(zone)
		if err != nil {
			return &net.AddrError{Err: err.Error(), Addr: remote.String()}
		}
		a.raw.Scope_id = index
	}
	return nil
}

// addrPort decodes what the kernel wrote, unmapped.
func (a *sockaddr) addrPort(zones *zoneCache) netip.AddrPort {
	switch a.raw.Family {
	case unix.AF_INET:
		sa := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), bigEndian(sa.Port))
	case unix.AF_INET6:
		addr := netip.AddrFrom16(a.raw.Addr).Unmap()
		if a.raw.Scope_id != 0 {
			addr = addr.WithZone(zones.name(a.raw.Scope_id))
		}
		return netip.AddrPortFrom(addr, bigEndian(a.raw.Port))
	}
	return netip.AddrPort{}
}

// bigEndian converts a port between network and host order, either way.
func bigEndian(port uint16) uint16 {
	b := (*[2]byte)(unsafe.Pointer(&port))
	return uint16(b[0])<<8 | uint16(b[1])
}

// zoneCache turns the zone of a link-local address (an interface name, or a
// number when it has none) into its scope id and back. Looking up costs system
// calls, so a pair is kept until a send through it fails. A pair that went stale
// because of a renamed interface still sends to the right one.
type zoneCache struct {
	pairs atomic.Pointer[[]zonePair] // replaced whole, never changed
	mu    sync.Mutex                 // held by who replaces it
}

type zonePair struct {
	index uint32
	name  string
	held  netip.Addr // keeps netip's interned zone alive, so that WithZone does not allocate
}

// maxZones bounds the cache on hosts whose interfaces come and go.
const maxZones = 64

func (c *zoneCache) load() []zonePair {
	if p := c.pairs.Load(); p != nil {
		return *p
	}
	return nil
}

// index is the scope id of a zone.
func (c *zoneCache) index(name string) (uint32, error) {
	for _, p := range c.load() {
		if p.name == name {
			return p.index, nil
		}
	}
	if ifi, err := net.InterfaceByName(name); err == nil {
		c.keep(uint32(ifi.Index), name)
		return uint32(ifi.Index), nil
	}
	n, err := strconv.ParseUint(name, 10, 32)
	if err != nil || n == 0 {
		return 0, unix.ENODEV
	}
	c.keep(uint32(n), name)
	return uint32(n), nil
}

// name is the zone of a scope id other than 0.
func (c *zoneCache) name(index uint32) string {
	for _, p := range c.load() {
		if p.index == index {
			return p.name
		}
	}
	name := strconv.FormatUint(uint64(index), 10)
	if ifi, err := net.InterfaceByIndex(int(index)); err == nil {
		name = ifi.Name
	}
	c.keep(index, name)
	return name
}

// keep adds a pair, in place of an older one with either half.
func (c *zoneCache) keep(index uint32, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pairs := []zonePair{{index, name, netip.IPv6LinkLocalAllNodes().WithZone(name)}}
	for _, p := range c.load() {
		if p.index != index && p.name != name && len(pairs) < maxZones {
			pairs = append(pairs, p)
		}
	}
	c.pairs.Store(&pairs)
}

// forget empties the cache.
func (c *zoneCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pairs.Store(nil)
}
