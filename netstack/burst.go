package netstack

import (
	"net"
	"net/netip"
	"sync"

	"github.com/penstock-vpn/penstock/transport"
)

// maxDatagram is the largest UDP payload there is, over IPv6 (RFC 768; 65,507
// over IPv4).
const maxDatagram = 65527

// A burst is what arrived together on one socket of a UDP relay, so that it can be
// sent on together.
type burst struct {
	arena     [2 * maxDatagram]byte
	datagrams [transport.MaxRunSegments][]byte // in arena
	n, used   int                              // datagrams and bytes in it

	segments [transport.MaxRunSegments][]byte // scratch of runs
	runs     [transport.MaxRunSegments]transport.Run
}

// bursts lends bursts to sockets with datagrams to move, and only meanwhile: ten
// thousand silent flows hold none.
var bursts = sync.Pool{New: func() any { return new(burst) }}

func newBurst() *burst {
	b := bursts.Get().(*burst)
	b.n, b.used = 0, 0
	return b
}

// room is where the next datagram goes; nil when the burst is full.
func (b *burst) room() []byte {
	if b.n == len(b.datagrams) || len(b.arena)-b.used < maxDatagram {
		return nil
	}
	return b.arena[b.used:]
}

// add notes that the next datagram is in the first size bytes of room.
func (b *burst) add(size int) {
	b.datagrams[b.n] = b.arena[b.used : b.used+size : b.used+size]
	b.n++
	b.used += size
}

// toRuns groups the datagrams, in order, into runs to remote. They are valid as long
// as b is.
func (b *burst) toRuns(remote netip.AddrPort, local netip.Addr) []transport.Run {
	n, bytes := 0, 0
	ended := true // the last run takes no more
	for i, d := range b.datagrams[:b.n] {
		b.segments[i] = d
		if !ended {
			run := &b.runs[n-1]
			if size := len(run.Segments[0]); 0 < len(d) && len(d) <= size && bytes+len(d) <= transport.MaxRunBytes {
				run.Segments = b.segments[i-len(run.Segments) : i+1 : i+1]
				bytes += len(d)
				ended = len(d) < size
				continue
			}
		}
		b.runs[n] = transport.Run{Remote: remote, Local: local, Segments: b.segments[i : i+1 : i+1]}
		n++
		bytes = len(d)
		ended = len(d) == 0 // an empty datagram goes alone: segmentation would lose it
	}
	return b.runs[:n]
}

// burstReader returns a function that waits for datagrams on a connected socket
// and gives all that are there, one at least. The caller puts the burst back.
func burstReader(c net.Conn) func() (*burst, error) {
	if v, ok := c.(vpnBurster); ok {
		return v.readBurst
	}
	if receive := systemBurstReader(c); receive != nil {
		return receive
	}
	return func() (*burst, error) {
		b := newBurst()
		n, err := c.Read(b.room())
		if err != nil {
			bursts.Put(b)
			return nil, err
		}
		b.add(n)
		return b, nil
	}
}

// vpnBurster is a UDP socket inside the VPN.
type vpnBurster interface {
	readBurst() (*burst, error)
}
