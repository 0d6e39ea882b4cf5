package gateway

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math/bits"
	"net/netip"
	"strings"
)

// An AddressRange is from First to Last, both included and of one family.
type AddressRange struct{ First, Last netip.Addr }

// ParseRange reads "10.9.0.0/24", "10.9.0.10-10.9.0.99" or one address. A prefix leaves out the
// addresses that no host can have: network and broadcast of IPv4, and the first of IPv6, which is any
// router's (RFC 4291 2.6.1).
func ParseRange(s string) (AddressRange, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return RangeOf(p)
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, err := netip.ParseAddr(strings.TrimSpace(first))
	b, err2 := netip.ParseAddr(strings.TrimSpace(last))
	if err != nil || err2 != nil {
		return AddressRange{}, fmt.Errorf("%q is neither a prefix nor a range of addresses", s)
	}
	r := AddressRange{a, b}
	if problem := r.problem(); problem != "" {
		return AddressRange{}, fmt.Errorf("%q %s", s, problem)
	}
	return r, nil
}

// RangeOf is the addresses of a prefix that hosts can have.
func RangeOf(p netip.Prefix) (AddressRange, error) {
	p = p.Masked()
	r := AddressRange{p.Addr(), lastOf(p)}
	if host := p.Addr().BitLen() - p.Bits(); host >= 2 {
		r.First = r.First.Next()
		if p.Addr().Is4() {
			r.Last = r.Last.Prev()
		}
	}
	if problem := r.problem(); problem != "" {
		return AddressRange{}, fmt.Errorf("%v %s", p, problem)
	}
	return r, nil
}

func (r AddressRange) problem() string {
	switch {
	case !r.First.IsValid() || !r.Last.IsValid():
		return "is no range"
	case r.First.Is4() != r.Last.Is4():
		return "has two families"
	case r.First.Is4In6() || r.First.Zone() != "" || r.Last.Zone() != "":
		return "is not made of plain addresses"
	case r.Last.Less(r.First):
		return "ends before it begins"
	case r.First.IsUnspecified() || r.First.IsMulticast() || r.Last.IsMulticast() || r.First.IsLoopback() || r.Last.IsLoopback():
		return "has addresses that no client can have"
	}
	for _, a := range notForClients {
		if r.Contains(a) {
			return "has " + a.String() + " in it"
		}
	}
	return ""
}

// notForClients are parts of what no range may cover.
var notForClients = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.AddrFrom4([4]byte{224, 0, 0, 1}), netip.IPv6LinkLocalAllNodes()}

// String is as ParseRange reads it.
func (r AddressRange) String() string { return r.First.String() + "-" + r.Last.String() }

// Contains tells whether a is in it.
func (r AddressRange) Contains(a netip.Addr) bool {
	return a.Is4() == r.First.Is4() && !a.Less(r.First) && !r.Last.Less(a)
}

// size is how many addresses are in it, 2^62 at most: those beyond are never reached.
func (r AddressRange) size() uint64 {
	fh, fl := halves(r.First)
	lh, ll := halves(r.Last)
	low, borrow := bits.Sub64(ll, fl, 0)
	high, _ := bits.Sub64(lh, fh, borrow)
	const most = 1 << 62
	if high > 0 || low >= most {
		return most
	}
	return low + 1
}

// at is the n-th address.
func (r AddressRange) at(n uint64) netip.Addr {
	h, l := halves(r.First)
	l, carry := bits.Add64(l, n, 0)
	h += carry
	if r.First.Is4() {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], uint32(l))
		return netip.AddrFrom4(b)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], h)
	binary.BigEndian.PutUint64(b[8:], l)
	return netip.AddrFrom16(b)
}

func halves(a netip.Addr) (high, low uint64) {
	if a.Is4() {
		b := a.As4()
		return 0, uint64(binary.BigEndian.Uint32(b[:]))
	}
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := range b {
		switch host := 8*(i+1) - p.Bits(); {
		case host >= 8:
			b[i] = 0xff
		case host > 0:
			b[i] |= 1<<host - 1
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// A Pool is where clients' addresses come from.
type Pool []AddressRange

// family is the part of p that is IPv4, or IPv6.
func (p Pool) family(is4 bool) (ranges Pool) {
	for _, r := range p {
		if r.First.Is4() == is4 {
			ranges = append(ranges, r)
		}
	}
	return ranges
}

// contains tells whether a is in p.
func (p Pool) contains(a netip.Addr) bool {
	for _, r := range p {
		if r.Contains(a) {
			return true
		}
	}
	return false
}

// pick finds an address that is not taken. It begins at a place that depends on who asks, so that
// users tend to get the same address again, and asks about every address once at most.
func (p Pool) pick(who string, taken func(netip.Addr) bool) (netip.Addr, bool) {
	total := uint64(0)
	for _, r := range p {
		total = min(total+r.size(), 1<<62)
	}
	if total == 0 {
		return netip.Addr{}, false
	}
	h := fnv.New64a()
	h.Write([]byte(who)) // never an error
	start := h.Sum64() % total
	for i := range min(total, maxPick) {
		if a := p.nth((start + i) % total); !taken(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// maxPick bounds a search: no server has as many clients.
const maxPick = 1 << 20

func (p Pool) nth(n uint64) netip.Addr {
	for _, r := range p {
		if s := r.size(); n >= s {
			n -= s
			continue
		}
		return r.at(n)
	}
	return p[0].First // beyond 2^62, and as good as any
}
