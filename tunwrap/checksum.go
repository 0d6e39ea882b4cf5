package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// The sums themselves are gVisor's (package checksum). Here is the arithmetic for
// changing a checksum that is already in a packet.
//
// A full checksum is the complement of the one's complement sum of everything it covers
// (RFC 1071). A partial checksum is the sum of the pseudo-header alone, not
// complemented: what Linux calls CHECKSUM_PARTIAL and virtio NEEDS_CSUM. The same
// change of an address therefore moves the two in opposite directions (RFC 1624 is
// about the first kind only), and mixing them up gives a tunnel in which data flows
// one way and the ACKs vanish.

// difference is what replacing the 16-bit word old by new adds to a sum.
func difference(old, new uint16) uint16 {
	return checksum.Combine(new, ^old)
}

// mend updates the full checksum at the start of field for a sum that has grown by diff.
func mend(field []byte, diff uint16) {
	c := binary.BigEndian.Uint16(field)
	binary.BigEndian.PutUint16(field, ^checksum.Combine(^c, diff))
}

// mendUDP is mend for the checksum of a UDP packet, in which 0 means that there is none
// and a computed 0 is written as 0xFFFF (RFC 768).
func mendUDP(field []byte, diff uint16) {
	c := binary.BigEndian.Uint16(field)
	if c == 0 {
		return
	}
	c = ^checksum.Combine(^c, diff)
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(field, c)
}

// mendPartial updates the partial checksum at the start of field for a sum that has
// grown by diff.
func mendPartial(field []byte, diff uint16) {
	c := binary.BigEndian.Uint16(field)
	binary.BigEndian.PutUint16(field, checksum.Combine(c, diff))
}

// sumOf is the one's complement sum of b, which starts at an even offset of whatever is
// being summed.
func sumOf(b []byte) uint16 { return checksum.Checksum(b, 0) }

// fold brings a sum of 16-bit words down to 16 bits, one's complement.
func fold(sum uint32) uint16 {
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum)
}

// pseudoSum is the folded sum of the pseudo-header of RFC 9293 3.1 and RFC 8200 8.1 for
// the packet b laid out as l: addresses, protocol and the length of the transport part
// in bytes. It is also the value of a partial checksum.
func pseudoSum(b []byte, l *layout, length int) uint16 {
	sum := uint32(checksum.Checksum(l.addresses(b), uint16(l.proto)))
	return fold(sum + uint32(length))
}
