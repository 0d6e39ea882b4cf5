package tunwrap

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// verify checks an inbound packet as the stack would: version, lengths, the IPv4 header
// checksum and the checksum of TCP, UDP, ICMP and ICMPv6. The stack itself does not, because
// the link declares RXChecksumOffload, which is all or nothing.
//
// Two kinds of packet pass without a look at their transport checksum. A fragment
// has none of its own, and after reassembly the stack does not check either: the
// record that carried each fragment has been authenticated, which is stronger
// than a 16-bit sum but vouches only for the way from the peer, not for the sender
// behind it. And protocols that are not listed above are left to whoever opens a raw
// socket for them.
//
// It borrows b and returns the packet proper: b without what follows the length in the IP
// header. UDP may be shorter still (RFC 768); the stack sees to that by itself.
func verify(b []byte) ([]byte, layout, Drop) {
	l, d := locate(b, len(b))
	if d != DropNone {
		return nil, l, d
	}
	b = b[:l.total]
	if d := verifyLocated(b, &l); d != DropNone {
		return nil, l, d
	}
	return b, l, DropNone
}

// verifyLocated is verify for the packet b that has been laid out as l and cut to its length.
func verifyLocated(b []byte, l *layout) Drop {
	if l.version == 4 && sumOf(b[:4*int(b[0]&0x0f)]) != 0xffff {
		return DropIPChecksum
	}
	if l.fragment {
		return DropNone
	}
	t := b[l.l4:]
	switch l.proto {
	case protoTCP:
		if len(t) < header.TCPMinimumSize {
			return DropMalformed
		}
		if n := int(t[tcpDataOff]>>4) * 4; n < header.TCPMinimumSize || n > len(t) {
			return DropMalformed
		}
		if !sumsUp(b, l, t) {
			return DropTCPChecksum
		}
	case protoUDP:
		if d := verifyUDP(b, l, t); d != DropNone {
			return d
		}
	case protoICMP:
		if l.version == 4 {
			if len(t) < header.ICMPv4MinimumSize {
				return DropMalformed
			}
			if sumOf(t) != 0xffff {
				return DropICMPChecksum
			}
		}
	case protoICMPv6:
		if l.version == 6 {
			if len(t) < header.ICMPv6MinimumSize {
				return DropMalformed
			}
			if !sumsUp(b, l, t) {
				return DropICMPChecksum
			}
		}
	}
	return DropNone
}

func verifyUDP(b []byte, l *layout, t []byte) Drop {
	if len(t) < header.UDPMinimumSize {
		return DropMalformed
	}
	n := int(binary.BigEndian.Uint16(t[udpLen:]))
	if n < header.UDPMinimumSize || n > len(t) {
		return DropMalformed
	}
	if binary.BigEndian.Uint16(t[udpChecksum:]) == 0 {
		if l.version == 6 {
			return DropUDPNoChecksum
		}
		return DropNone
	}
	if !sumsUp(b, l, t[:n]) {
		return DropUDPChecksum
	}
	return DropNone
}

// sumsUp reports whether the checksum in the transport part t of the packet b is right.
func sumsUp(b []byte, l *layout, t []byte) bool {
	return fold(uint32(pseudoSum(b, l, len(t)))+uint32(sumOf(t))) == 0xffff
}
