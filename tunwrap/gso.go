package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A GSOType is the kind of a superpacket, with the values of virtio_net_hdr.gso_type
// (linux/virtio_net.h).
type GSOType uint8

// The kinds that exist. UFO (3), the fragmenting of UDP, is never negotiated.
const (
	GSONone  GSOType = 0 // not a superpacket
	GSOTCPv4 GSOType = 1
	GSOTCPv6 GSOType = 4
	GSOUDPL4 GSOType = 5 // one UDP socket's datagrams of equal size, Linux 6.2

	// GSOECN is a flag on top of the TCP kinds: the superpacket has CWR set.
	GSOECN GSOType = 0x80
)

// GSO is the offload metadata of one packet in the terms of virtio_net_hdr. All
// numbers are bytes.
type GSO struct {
	Type GSOType
	// HdrLen is the length of all headers. It is never believed, only computed: a
	// kernel puts the length of the linear part of the buffer there.
	HdrLen uint16
	// GSOSize is the payload of every segment but the last.
	GSOSize uint16
	// CsumStart is the offset at which the checksummed part begins, CsumOffset that
	// of the checksum from there. Zero as CsumStart means: where the transport
	// header is.
	CsumStart, CsumOffset uint16
	// NeedsCsum: the packet carries a partial checksum.
	NeedsCsum bool
}

// FromStack translates what a stack says about pkt. HdrLen and CsumStart stay zero,
// because the stack's L3HdrLen leaves out options and extension headers; they are
// computed from the headers later. It borrows pkt.
func FromStack(pkt *stack.PacketBuffer) GSO {
	o := &pkt.GSOOptions
	g := GSO{NeedsCsum: o.NeedsCsum, CsumOffset: o.CsumOffset}
	switch o.Type {
	case stack.GSONone:
		// The fields above mean nothing then.
		return GSO{}
	case stack.GSOTCPv4:
		g.Type = GSOTCPv4
	case stack.GSOTCPv6:
		g.Type = GSOTCPv6
	default:
		// GSOGvisor: the stack has split the packet itself.
		return GSO{}
	}
	g.GSOSize = o.MSS
	return g
}

// kind is the type without the ECN flag.
func (g *GSO) kind() GSOType { return g.Type &^ GSOECN }

// complete fills HdrLen and CsumStart of a superpacket from its headers and checks
// everything else against them. head is the start of the packet, as much of it as is
// contiguous; size is the length of the whole. It borrows head. After DropNone, HdrLen <=
// len(head), HdrLen <= size and GSOSize > 0 hold, and the checksum lies within the
// headers.
func (g *GSO) complete(head []byte, size int) (layout, Drop) {
	l, d := locate(head, size)
	if d != DropNone {
		return l, d
	}
	if g.GSOSize == 0 || l.total != size || l.fragment || l.atomic {
		return l, DropGSO
	}
	var hdrLen, csumOffset int
	switch {
	case g.kind() == GSOTCPv4 && l.version == 4 && l.proto == protoTCP,
		g.kind() == GSOTCPv6 && l.version == 6 && l.proto == protoTCP:
		if l.l4+header.TCPMinimumSize > len(head) {
			return l, DropMalformed
		}
		dataOff := int(head[l.l4+tcpDataOff]>>4) * 4
		if dataOff < header.TCPMinimumSize {
			return l, DropMalformed
		}
		hdrLen, csumOffset = l.l4+dataOff, tcpChecksum
	case g.Type == GSOUDPL4 && l.proto == protoUDP:
		hdrLen, csumOffset = l.l4+header.UDPMinimumSize, udpChecksum
	default:
		return l, DropGSO
	}
	if hdrLen > len(head) || hdrLen > size {
		return l, DropMalformed
	}
	if g.CsumStart != 0 && int(g.CsumStart) != l.l4 || int(g.CsumOffset) != csumOffset {
		return l, DropGSO
	}
	g.HdrLen, g.CsumStart = uint16(hdrLen), uint16(l.l4)
	return l, DropNone
}

// finishChecksum turns the partial checksum in the whole packet b into a full one.
// CsumStart must be set. It reports DropGSO if the checksum would lie outside b.
func (g *GSO) finishChecksum(b []byte) Drop {
	start, at := int(g.CsumStart), int(g.CsumStart)+int(g.CsumOffset)
	if at+2 > len(b) {
		return DropGSO
	}
	c := ^sumOf(b[start:])
	if c == 0 && g.CsumOffset == udpChecksum {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b[at:], c)
	return DropNone
}
