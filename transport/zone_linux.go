package transport

import (
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// zoneCache turns the zone of a link-local address (an interface name, or a
// number when it has none) into its scope id and back. Looking up costs system
// calls, so a pair is kept until a send through it fails. A pair that went stale
// because of a renamed interface still sends to the right one.
//
// It asks the socket, not the net package: the goroutine may sit on a thread of
// another network namespace than the socket was made in.
type zoneCache struct {
	raw syscall.RawConn

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
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = c.ioctl(unix.SIOCGIFINDEX, ifr)
	}
	if err == nil {
		c.keep(ifr.Uint32(), name)
		return ifr.Uint32(), nil
	}
	n, numeric := strconv.ParseUint(name, 10, 32)
	if numeric != nil || n == 0 {
		return 0, err
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
	if ifr, err := unix.NewIfreq(""); err == nil {
		ifr.SetUint32(index)
		if c.ioctl(unix.SIOCGIFNAME, ifr) == nil {
			name = ifr.Name()
		}
	}
	c.keep(index, name)
	return name
}

func (c *zoneCache) ioctl(request uint, ifr *unix.Ifreq) (err error) {
	if closed := c.raw.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), request, ifr) }); closed != nil {
		return closed
	}
	return err
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
