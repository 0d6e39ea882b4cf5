package transport

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sendControl holds the control messages of one send: UDP_SEGMENT and one of
// IP_PKTINFO and IPV6_PKTINFO, 64 bytes on 64-bit systems. Words, so that it is
// aligned as a cmsghdr.
type sendControl [8]uint64

// put appends a control message with room for n bytes of data at offset at, and
// returns the data and the next offset.
func (c *sendControl) put(at int, level, typ int32, n int) (unsafe.Pointer, int) {
	bytes := (*[unsafe.Sizeof(*c)]byte)(unsafe.Pointer(c))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&bytes[at]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(n))
	return unsafe.Pointer(&bytes[at+unix.CmsgLen(0)]), at + unix.CmsgSpace(n)
}

// putSegmentSize asks for segmentation into datagrams of size bytes (a __u16,
// __udp_cmsg_send in net/ipv4/udp.c).
func (c *sendControl) putSegmentSize(at, size int) int {
	data, at := c.put(at, unix.SOL_UDP, unix.UDP_SEGMENT, 2)
	*(*uint16)(data) = uint16(size)
	return at
}

// putSource asks for a source address, and tells whether it did: not when local
// is no address of the remote's family. An IPv4 source goes as IP_PKTINFO on
// AF_INET6 sockets too (ip_cmsg_send).
func (c *sendControl) putSource(at int, local netip.Addr, is4 bool, zones *zoneCache) (int, bool) {
	local = local.Unmap()
	switch {
	case !local.IsValid() || local.IsUnspecified() || local.Is4() != is4:
		return at, false
	case is4:
		data, at := c.put(at, unix.SOL_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
		*(*unix.Inet4Pktinfo)(data) = unix.Inet4Pktinfo{Spec_dst: local.As4()}
		return at, true
	}
	var index uint32
	if zone := local.Zone(); zone != "" {
		var err error
		if index, err = zones.index(zone); err != nil {
			return at, false
		}
	}
	data, at := c.put(at, unix.SOL_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
	*(*unix.Inet6Pktinfo)(data) = unix.Inet6Pktinfo{Addr: local.As16(), Ifindex: index}
	return at, true
}

// receiveControlSize has room for UDP_GRO, SO_RXQ_OVFL and both PKTINFOs: 120
// bytes on 64-bit systems.
const receiveControlSize = 128

// receiveControl is what the kernel tells along with a receive.
type receiveControl struct {
	segment  int        // UDP_GRO; 0 when absent or senseless
	local    netip.Addr // without zone; invalid when absent
	index    uint32     // the interface it came in by, 0 when absent
	overflow uint32     // SO_RXQ_OVFL: datagrams lost since the socket was made, modulo 2^32
	overflew bool       // overflow is present
}

// parseControl reads control messages in any order among any others; b is
// aligned as a cmsghdr. What is malformed ends it: the kernel writes no such. It
// borrows b.
func parseControl(b []byte) (c receiveControl) {
	for len(b) >= unix.SizeofCmsghdr {
		h := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(b)))
		if uint64(h.Len) < unix.SizeofCmsghdr || uint64(h.Len) > uint64(len(b)) {
			return c
		}
		c.take(h.Level, h.Type, b[unix.CmsgLen(0):h.Len])
		// The last message may come without its padding.
		b = b[min(unix.CmsgSpace(int(h.Len)-unix.CmsgLen(0)), len(b)):]
	}
	return c
}

func (c *receiveControl) take(level, typ int32, data []byte) {
	switch {
	case level == unix.SOL_UDP && typ == unix.UDP_GRO && len(data) >= 4:
		if n := int32(binary.NativeEndian.Uint32(data)); n > 0 { // an int, udp_cmsg_recv
			c.segment = int(n)
		}
	case level == unix.SOL_IP && typ == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
		// Ifindex, spec_dst, addr. spec_dst is what to answer from: the destination, or
		// an address of the interface when that is a broadcast.
		c.index = binary.NativeEndian.Uint32(data)
		c.local = netip.AddrFrom4([4]byte(data[4:8]))
	case level == unix.SOL_IPV6 && typ == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
		c.local = netip.AddrFrom16([16]byte(data[:16])).Unmap()
		c.index = binary.NativeEndian.Uint32(data[16:])
	case level == unix.SOL_SOCKET && typ == unix.SO_RXQ_OVFL && len(data) >= 4:
		c.overflow, c.overflew = binary.NativeEndian.Uint32(data), true
	}
}
