package linkep

import (
	"encoding/binary"

	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// flowHash tells flows apart. A TCP connection has a random number of its own, which
// the stack puts on all its packets. Other packets go by addresses, protocol and,
// unless they are fragments, UDP ports. A UDP socket that mixes datagrams above and
// below the MTU may therefore see its fragments take another turn than the rest;
// everything else stays in order. It borrows pkt and allocates nothing.
func flowHash(pkt *stack.PacketBuffer) uint32 {
	if pkt.Hash != 0 {
		return pkt.Hash
	}
	h := uint32(fnvOffset)
	network := pkt.NetworkHeader().Slice()
	switch {
	case pkt.NetworkProtocolNumber == header.IPv4ProtocolNumber && len(network) >= header.IPv4MinimumSize:
		h = hashBytes(h, network[12:20]) // source and destination
	case pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber && len(network) >= header.IPv6MinimumSize:
		h = hashBytes(h, network[8:40])
	}
	h = (h ^ uint32(pkt.TransportProtocolNumber)) * fnvPrime
	if pkt.TransportProtocolNumber == header.UDPProtocolNumber {
		if t := pkt.TransportHeader().Slice(); len(t) >= header.UDPMinimumSize {
			h = hashBytes(h, t[:4]) // ports
		}
	}
	return h
}

// FNV-1a over 32-bit words, http://www.isthe.com/chongo/tech/comp/fnv/. Weaker than
// over bytes, but bucketOf mixes again.
const (
	fnvOffset = 2166136261
	fnvPrime  = 16777619
)

func hashBytes(h uint32, b []byte) uint32 {
	for ; len(b) >= 4; b = b[4:] {
		h = (h ^ binary.LittleEndian.Uint32(b)) * fnvPrime
	}
	return h
}

// bucketOf spreads hashes over the buckets: multiplication by 2^32 divided by the
// golden ratio carries every bit into the high ones (Knuth, TAOCP 6.4).
func bucketOf(hash uint32) int32 {
	return int32(hash * 2654435769 >> (32 - bucketBits))
}
