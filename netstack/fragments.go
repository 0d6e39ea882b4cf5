package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// udpProtocol is the stack's UDP, which also verifies datagrams put together from fragments. The wrapper cannot: it has
// one fragment at a time, and the stack believes of them what it believes of whole packets. The checksum
// is all that tells fragments of two datagrams from those of one, as IPv4's numbers for them come again within
// seconds at high rates (RFC 4963).
type udpProtocol struct{ stack.TransportProtocol }

func newUDPProtocol(s *stack.Stack) stack.TransportProtocol { return udpProtocol{udp.NewProtocol(s)} }

// Parse implements [stack.TransportProtocol].
func (p udpProtocol) Parse(pkt *stack.PacketBuffer) bool {
	if !p.TransportProtocol.Parse(pkt) {
		return false
	}
	if reassembled(pkt) {
		pkt.RXChecksumValidated = false
	}
	return true
}

// reassembled tells whether pkt may have come in fragments. The stack keeps the header of the first: over IPv6 with the
// extension that says so, over IPv4 with another length and without the flag, but with the old checksum; which fits
// again only if the rest has 8192 bytes.
func reassembled(pkt *stack.PacketBuffer) bool {
	b := pkt.NetworkHeader().Slice()
	if pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber {
		return len(b) > header.IPv6MinimumSize
	}
	return pkt.Size() > 8192 || !header.IPv4(b).IsChecksumValid()
}

// validUDP verifies the datagram in pkt unless that has been done.
func validUDP(pkt *stack.PacketBuffer) bool {
	if pkt.RXChecksumValidated {
		return true
	}
	n := pkt.Network()
	length, sum := header.UDPValid(pkt.TransportHeader().Slice(), func() uint16 { return pkt.Data().Checksum() },
		uint16(pkt.Data().Size()), pkt.NetworkProtocolNumber, n.SourceAddress(), n.DestinationAddress(), false)
	return length && sum
}
