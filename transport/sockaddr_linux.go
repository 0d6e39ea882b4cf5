package transport

import (
	"net"
	"net/netip"
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
