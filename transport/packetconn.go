package transport

import (
	"net/netip"
)

// PacketConn is a datagram socket that works in batches. The UDP sockets made
// by [ListenUDP] implement it with UDP_SEGMENT, UDP_GRO, sendmmsg and recvmmsg
// where the kernel has them; a test may put an in-memory wire in their place.
//
// One goroutine may be in ReadBatch; any number may be in WriteBatch.
type PacketConn interface {
	// ReadBatch waits for datagrams and fills batch from its start. It borrows
	// batch and the buffers in it until it returns n, the number of elements
	// filled, at least 1 when err is nil. Elements may have traded places, buffers
	// included. It returns [net.ErrClosed] after Close, and no other error ends the
	// socket: anything else is worth a retry. batch must not be empty.
	ReadBatch(batch []Inbound) (n int, err error)

	// WriteBatch sends the runs in order and returns how many of them were
	// handed to the network whole. It borrows the runs and their segments until
	// it returns. A run that cannot be sent is given up, never retried later: the
	// error says why ([ErrDatagramTooBig] feeds path MTU discovery), n counts the
	// runs before it, and the caller goes on with runs[n+1:].
	WriteBatch(runs []Run) (n int, err error)

	// LocalAddr is the address bound, with the port chosen by the system.
	LocalAddr() netip.AddrPort

	// Close wakes ReadBatch. It may be called twice and from any goroutine.
	Close() error
}

// A Run is one or more datagrams to one remote address, all of the same size
// but the last, which may be shorter: exactly what one sendmsg with UDP_SEGMENT
// can carry. The owner of the slices keeps them; see [PacketConn.WriteBatch].
type Run struct {
	Remote netip.AddrPort
	// Local is the address to send from: that of [Inbound.Local], so that a host
	// with several addresses answers from the one it was asked at. The zero Addr
	// leaves it to the routing table, and so does an address that the host no
	// longer has or of the wrong family.
	Local netip.Addr
	// Segments are the datagrams. len(Segments[0]) is the size of all but the
	// last. There are at most [MaxRunSegments] of them, of at most [MaxRunBytes]
	// bytes together; a socket splits what exceeds its own limits. Segments that
	// follow each other in memory without a gap are the cheapest to send.
	Segments [][]byte
}

// Inbound is one receive: a buffer that ReadBatch fills with one datagram, or
// with several of equal size that the kernel coalesced (UDP_GRO).
type Inbound struct {
	// Buf is the caller's; its capacity bounds a receive. 64 KiB never truncates;
	// what does not fit is dropped and counted.
	Buf []byte
	// N is the number of bytes received.
	N int
	// SegmentSize is the size of every datagram in Buf[:N] but the last. It is
	// never 0 when N is not: a lone datagram has SegmentSize == N.
	SegmentSize int
	// Remote is the sender. An IPv4-mapped IPv6 address is unmapped.
	Remote netip.AddrPort
	// Local is the address of this host that the datagrams were sent to; invalid
	// when the system does not tell.
	Local netip.Addr
}

const (
	// MaxRunSegments is the UDP_SEGMENT limit of Linux 4.18 to 6.8
	// (UDP_MAX_SEGMENTS, net/ipv4/udp.c). Later kernels take 128.
	MaxRunSegments = 64
	// MaxRunBytes bounds the UDP payload of one run. 65,507 would still be sent,
	// but above about 65,490 the receiver loses coalescing (measured on Linux 6.18).
	MaxRunBytes = 65400
)
