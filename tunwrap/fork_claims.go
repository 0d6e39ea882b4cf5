package tunwrap

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Claimed is what a claim is about.
type Claimed uint8

// The kinds of claims.
const (
	ClaimTCP  Claimed = iota // a TCP port
	ClaimUDP                 // a UDP port
	ClaimEcho                // an identifier of ICMP echo requests
)

// A portSet is a set of 16-bit numbers. Readers take no lock.
type portSet [1 << 16 / 64]atomic.Uint64

func (s *portSet) has(n uint16) bool { return s[n/64].Load()&(1<<(n%64)) != 0 }
func (s *portSet) add(n uint16)      { s[n/64].Or(1 << (n % 64)) }
func (s *portSet) remove(n uint16)   { s[n/64].And(^uint64(1 << (n % 64))) }

type claim struct {
	what Claimed
	addr netip.Addr
	n    uint16
}

// Claim gives a port or identifier at addrs, addresses of the node, to the stack until release is
// called. Claims add up: the last release counts.
func (f *Fork) Claim(what Claimed, n uint16, addrs ...netip.Addr) (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var made []claim
	for _, o := range f.own {
		for _, a := range addrs {
			if o.addr != a {
				continue
			}
			c := claim{what, a, n}
			if f.claims[c]++; f.claims[c] == 1 {
				o.ports[what].add(n)
			}
			made = append(made, c)
		}
	}
	return sync.OnceFunc(func() { f.release(made) })
}

func (f *Fork) release(made []claim) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range made {
		if f.claims[c]--; f.claims[c] > 0 {
			continue
		}
		delete(f.claims, c)
		for _, o := range f.own {
			if o.addr == c.addr {
				o.ports[c.what].remove(c.n)
			}
		}
	}
}

// fragmentSlots is how many packets in fragments a Fork tells apart. When more are under way at
// once, fragments of the displaced ones are given to both sides.
const fragmentSlots = 256

// A fragmentTable remembers where the first fragments of packets went. Fragments are rare, so a
// lock does.
type fragmentTable struct {
	seed maphash.Seed

	mu    sync.Mutex
	slots [fragmentSlots]struct {
		key  fragmentKey
		side side
	}
}

// A fragmentKey names a packet in fragments (RFC 791 3.2, RFC 8200 4.5).
type fragmentKey struct {
	addrs [32]byte
	id    uint32
	proto uint8
	used  bool
}

func (t *fragmentTable) init() { t.seed = maphash.MakeSeed() }

// fragmentKeyOf is the key of the fragment b.
func fragmentKeyOf(b []byte, l *layout) fragmentKey {
	k := fragmentKey{used: true}
	copy(k.addrs[:], l.addresses(b))
	if l.version == 4 {
		k.id, k.proto = uint32(b[ip4ID])<<8|uint32(b[ip4ID+1]), b[ip4Proto]
		return k
	}
	// locate has found a fragment header, and every length before it right.
	next, at := b[ip6NextHeader], header.IPv6MinimumSize
	for header.IPv6ExtensionHeaderIdentifier(next) != header.IPv6FragmentExtHdrIdentifier {
		length := (int(b[at+1]) + 1) * 8
		if header.IPv6ExtensionHeaderIdentifier(next) == header.IPv6ExperimentExtHdrIdentifier {
			length = 8
		}
		next, at = b[at], at+length
	}
	k.id = binary.BigEndian.Uint32(b[at+4:])
	return k
}

func (t *fragmentTable) slot(k *fragmentKey) int {
	return int(maphash.Comparable(t.seed, *k) % fragmentSlots)
}

func (t *fragmentTable) store(k *fragmentKey, s side) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := &t.slots[t.slot(k)]
	e.key, e.side = *k, s
}

func (t *fragmentTable) lookup(k *fragmentKey) side {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := &t.slots[t.slot(k)]; e.key == *k {
		return e.side
	}
	return toBoth
}
