package tunwrap

import "sync/atomic"

// A Drop is the reason why a packet was given up. It is also an index into [Drops].
type Drop uint8

// The reasons. Outbound ones first, then inbound, then those of both.
const (
	// DropNone is no drop. It is never counted.
	DropNone Drop = iota

	// DropGSO: the offload metadata of an outbound packet contradict its headers,
	// ask for a segment size of zero or name a kind that is not split here.
	DropGSO
	// DropOversize: an outbound packet or segment is longer than the buffer that
	// Read was given for it.
	DropOversize
	// DropTooBig: a packet does not fit its path, may not be fragmented, and
	// nobody could be told, or it was of a kind that must not be answered.
	DropTooBig
	// DropTooBigRate: the same, but the limit on messages about it was reached.
	DropTooBigRate

	// DropMalformed: the lengths or the version in the headers are wrong.
	DropMalformed
	// DropIPChecksum: the IPv4 header checksum is wrong.
	DropIPChecksum
	// DropTCPChecksum: the TCP checksum is wrong.
	DropTCPChecksum
	// DropUDPChecksum: the UDP checksum is wrong.
	DropUDPChecksum
	// DropUDPNoChecksum: UDP over IPv6 without a checksum (RFC 8200 8.1).
	DropUDPNoChecksum
	// DropICMPChecksum: the ICMP or ICMPv6 checksum is wrong.
	DropICMPChecksum

	// DropKernel: the kernel refused an inbound packet, mostly because the interface
	// is down.
	DropKernel

	// DropFilter: the Filter does not let the packet pass.
	DropFilter

	// DropClosed: the packet was in hand when the device was closed.
	DropClosed

	// NumDrops is the number of reasons, DropNone included.
	NumDrops
)

var dropNames = [NumDrops]string{
	DropNone:          "none",
	DropGSO:           "bad offload metadata",
	DropOversize:      "larger than the buffer",
	DropTooBig:        "too big for the path",
	DropTooBigRate:    "too big for the path, not reported again so soon",
	DropMalformed:     "malformed",
	DropIPChecksum:    "bad IPv4 header checksum",
	DropTCPChecksum:   "bad TCP checksum",
	DropUDPChecksum:   "bad UDP checksum",
	DropUDPNoChecksum: "UDP over IPv6 without checksum",
	DropICMPChecksum:  "bad ICMP checksum",
	DropKernel:        "refused by the kernel",
	DropFilter:        "refused by the packet filter",
	DropClosed:        "closed",
}

// String is a short phrase in lower case.
func (d Drop) String() string {
	if d >= NumDrops {
		return "unknown"
	}
	return dropNames[d]
}

// Drops is the number of packets given up for each reason.
type Drops [NumDrops]uint64

// Total is the sum over all reasons.
func (d *Drops) Total() uint64 {
	var n uint64
	for _, v := range d {
		n += v
	}
	return n
}

// dropCounters count drops. Any goroutine may add.
type dropCounters [NumDrops]atomic.Uint64

func (c *dropCounters) add(d Drop) { c[d].Add(1) }

func (c *dropCounters) addN(d Drop, n int) { c[d].Add(uint64(n)) }

func (c *dropCounters) load() (d Drops) {
	for i := range c {
		d[i] = c[i].Load()
	}
	return d
}
