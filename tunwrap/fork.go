package tunwrap

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/gaissmai/bart"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// StackPorts is the first of the ports that a [Fork] gives to the stack without being asked, up
// to 65535: those from which the stack makes its connections. Linux makes its own from
// 32768 to 60999 (net.ipv4.ip_local_port_range), other systems from 49152 on, so there a
// part of their range is lost to connections of the host through the VPN.
const StackPorts = 61000

// An InboundWriter takes inbound packets as the Write of a wireguard tun.Device does.
type InboundWriter interface {
	// Write takes the packets bufs[i][offset:] in order and returns how many it
	// accepted. It borrows them and may overwrite them.
	Write(bufs [][]byte, offset int) (n int, err error)
}

// A Fork divides the inbound packets of a node that has two stacks, its own and the kernel's
// behind a TUN device, which share the node's addresses:
//
//	transport ── Fork ┬ Wrapper ── the stack
//	                  └ TUN ────── the kernel
//
// The stack gets, of the packets to an own address,
//   - TCP and UDP to a claimed port, and to StackPorts and above,
//   - echo replies with a claimed identifier,
//   - ICMP errors about packets that came from such a port or identifier,
//
// and the kernel everything else. A packet to any other address goes to the side that Options
// name. Fragments that follow go where the first one went; one that comes before the first is
// given to both, and the side that never sees the first forgets it.
//
// The packets are not verified yet: each side does that with what it gets.
type Fork struct {
	stack, kernel InboundWriter
	others        side
	own           []*ownAddress
	known         atomic.Pointer[[]knownAddress]
	first         uint16

	scratch sync.Pool // of *division
	frags   fragmentTable

	toStack, toKernel atomic.Uint64

	mu     sync.Mutex
	claims map[claim]int // references
}

// ForkOptions describe a [Fork].
type ForkOptions struct {
	Stack, Kernel InboundWriter
	// Addresses are the node's own.
	Addresses []netip.Addr
	// OthersToStack: packets to other addresses go to the stack, for a router is there;
	// else the kernel forwards them or not.
	OthersToStack bool
}

// ForkStats count packets.
type ForkStats struct {
	ToStack, ToKernel uint64 // a fragment that was given to both counts twice
}

type side uint8

const (
	toKernel side = iota
	toStack
	toBoth
)

// An ownAddress is an address of the node and what of it belongs to the stack.
type ownAddress struct {
	addr  netip.Addr
	bytes []byte
	ports [3]portSet // by Claimed
}

// A knownAddress is what some peers call one of the node's addresses (source NAT).
type knownAddress struct {
	outside []byte
	inside  *ownAddress
	peers   *bart.Lite
}

// NewFork makes a Fork.
func NewFork(o ForkOptions) *Fork {
	f := &Fork{stack: o.Stack, kernel: o.Kernel, first: StackPorts, claims: make(map[claim]int)}
	if o.OthersToStack {
		f.others = toStack
	}
	for _, a := range o.Addresses {
		a = a.Unmap().WithZone("")
		f.own = append(f.own, &ownAddress{addr: a, bytes: a.AsSlice()})
	}
	f.known.Store(new([]knownAddress))
	f.frags.init()
	f.scratch.New = func() any { return new(division) }
	return f
}

// SetNAT tells the Fork what peers call the node: it sees their packets before NAT is
// reversed. The rules have been accepted by both sides.
func (f *Fork) SetNAT(rules []NATRule) {
	var known []knownAddress
	for _, r := range rules {
		k := knownAddress{outside: r.Outside.Unmap().AsSlice(), peers: new(bart.Lite)}
		for _, a := range f.own {
			if a.addr == r.Inside.Unmap() {
				k.inside = a
			}
		}
		if k.inside == nil {
			continue
		}
		for _, p := range r.Peer {
			k.peers.Insert(p.Masked())
		}
		known = append(known, k)
	}
	f.known.Store(&known)
}

// Stats is what has been divided so far.
func (f *Fork) Stats() ForkStats {
	return ForkStats{ToStack: f.toStack.Load(), ToKernel: f.toKernel.Load()}
}

// A division is the scratch of one Write. It borrows the packets.
type division struct{ stack, kernel [][]byte }

// Write divides the inbound packets bufs[i][offset:] and hands each side its own, in order. It
// borrows bufs, which may be overwritten. Any number of goroutines may be in it.
func (f *Fork) Write(bufs [][]byte, offset int) (n int, err error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	// Mostly a batch is one flow's, and goes on as it is.
	first := f.sideOf(bufs[0][offset:])
	same := 1
	next := first
	for same < len(bufs) {
		if next = f.sideOf(bufs[same][offset:]); next != first {
			break
		}
		same++
	}
	if same == len(bufs) && first != toBoth {
		return f.pass(first, bufs, offset)
	}
	d := f.scratch.Get().(*division)
	for _, b := range bufs[:same] {
		d.add(first, b)
	}
	for i := same; i < len(bufs); i++ {
		if i > same {
			next = f.sideOf(bufs[i][offset:])
		}
		d.add(next, bufs[i])
	}
	_, err = f.pass(toKernel, d.kernel, offset)
	if _, serr := f.pass(toStack, d.stack, offset); err == nil {
		err = serr
	}
	clear(d.stack)
	clear(d.kernel)
	d.stack, d.kernel = d.stack[:0], d.kernel[:0]
	f.scratch.Put(d)
	return len(bufs), err
}

func (d *division) add(s side, b []byte) {
	switch s {
	case toStack:
		d.stack = append(d.stack, b)
	case toKernel:
		d.kernel = append(d.kernel, b)
	case toBoth:
		d.kernel = append(d.kernel, b)
		d.stack = append(d.stack, append([]byte(nil), b...)) // either may overwrite its own
	}
}

func (f *Fork) pass(s side, bufs [][]byte, offset int) (int, error) {
	if len(bufs) == 0 {
		return 0, nil
	}
	if s == toStack {
		f.toStack.Add(uint64(len(bufs)))
		return f.stack.Write(bufs, offset)
	}
	f.toKernel.Add(uint64(len(bufs)))
	return f.kernel.Write(bufs, offset)
}

// sideOf decides where the inbound packet b goes, with one look at the usual ones.
func (f *Fork) sideOf(b []byte) side {
	if len(b) < header.IPv4MinimumSize {
		return toStack // the wrapper counts what is malformed
	}
	var dst []byte
	var l4 int
	var proto uint8
	switch {
	case b[0]>>4 == 4:
		dst = b[ip4Dst : ip4Dst+4]
		if b[0] == 4<<4|5 && binary.BigEndian.Uint16(b[ip4FragOff:])&(ip4FlagMF|ip4Offset) == 0 {
			l4, proto = header.IPv4MinimumSize, b[ip4Proto]
		}
	case b[0]>>4 == 6 && len(b) >= header.IPv6MinimumSize:
		dst = b[ip6Dst : ip6Dst+16]
		l4, proto = header.IPv6MinimumSize, b[ip6NextHeader]
	default:
		return toStack
	}
	o := f.ownOf(dst)
	if o == nil && len(*f.known.Load()) == 0 {
		return f.others
	}
	if o != nil && (proto == protoTCP || proto == protoUDP) && l4+4 <= len(b) {
		return f.ofPort(o, proto, binary.BigEndian.Uint16(b[l4+2:]))
	}
	return f.slow(b)
}

// slow decides about everything but a plain TCP or UDP packet to an own address.
func (f *Fork) slow(b []byte) side {
	l, d := locate(b, len(b))
	if d != DropNone {
		return toStack
	}
	a := l.addresses(b)
	n := len(a) / 2
	o := f.ownOf(a[n:])
	if o == nil {
		if o = f.knownOf(a[n:], a[:n]); o == nil {
			return f.others
		}
	}
	if !l.fragment {
		return f.ofHeaders(o, b, &l)
	}
	key := fragmentKeyOf(b, &l)
	if l.later {
		return f.frags.lookup(&key)
	}
	s := f.ofHeaders(o, b, &l)
	f.frags.store(&key, s)
	return s
}

// ofHeaders decides about the packet b, or the first fragment of one, to o.
func (f *Fork) ofHeaders(o *ownAddress, b []byte, l *layout) side {
	if l.l4+8 > l.total { // every header looked at here has at least that
		return toKernel
	}
	switch l.proto {
	case protoTCP, protoUDP:
		return f.ofPort(o, l.proto, binary.BigEndian.Uint16(b[l.l4+2:]))
	case protoICMP, protoICMPv6:
		if id, ok := echoID(b, l, header.ICMPv4EchoReply, header.ICMPv6EchoReply); ok {
			return o.claimedBy(ClaimEcho, id)
		}
		if inner, il, ok := quoted(b, l); ok {
			return f.sender(o, inner, &il)
		}
	}
	return toKernel
}

// sender is the side from which the packet b came, perhaps cut short, of which o is the
// source.
func (f *Fork) sender(o *ownAddress, b []byte, l *layout) side {
	if l.later || l.l4+6 > len(b) {
		return toKernel
	}
	switch l.proto {
	case protoTCP, protoUDP:
		return f.ofPort(o, l.proto, binary.BigEndian.Uint16(b[l.l4:]))
	case protoICMP, protoICMPv6:
		if id, ok := echoID(b, l, header.ICMPv4Echo, header.ICMPv6EchoRequest); ok {
			return o.claimedBy(ClaimEcho, id)
		}
	}
	return toKernel
}

// FromStack tells whether the outbound packet b, NATed already, came from the stack: by
// the port that it was sent from, so for a packet without ports, and a fragment but the first, it says
// no. It borrows b.
func (f *Fork) FromStack(b []byte) bool {
	l, d := locate(b, len(b))
	if d != DropNone {
		return true
	}
	a := l.addresses(b)
	n := len(a) / 2
	o := f.ownOf(a[:n])
	if o == nil {
		if o = f.knownOf(a[:n], a[n:]); o == nil {
			return f.others == toStack
		}
	}
	return f.sender(o, b, &l) == toStack
}

// echoID is the identifier of an echo request or reply.
func echoID(b []byte, l *layout, t4 header.ICMPv4Type, t6 header.ICMPv6Type) (uint16, bool) {
	if l.version == 4 && l.proto == protoICMP && b[l.l4] == uint8(t4) ||
		l.version == 6 && l.proto == protoICMPv6 && b[l.l4] == uint8(t6) {
		return binary.BigEndian.Uint16(b[l.l4+4:]), true
	}
	return 0, false
}

func (f *Fork) ofPort(o *ownAddress, proto uint8, port uint16) side {
	if port >= f.first {
		return toStack
	}
	if proto == protoTCP {
		return o.claimedBy(ClaimTCP, port)
	}
	return o.claimedBy(ClaimUDP, port)
}

func (o *ownAddress) claimedBy(c Claimed, n uint16) side {
	if o.ports[c].has(n) {
		return toStack
	}
	return toKernel
}

// ownOf finds an address of 4 or 16 bytes among the node's own, of which there are few.
func (f *Fork) ownOf(addr []byte) *ownAddress {
	for _, o := range f.own {
		if string(o.bytes) == string(addr) {
			return o
		}
	}
	return nil
}

// knownOf finds the address that the peer at remote means by addr.
func (f *Fork) knownOf(addr, remote []byte) *ownAddress {
	for _, k := range *f.known.Load() {
		if string(k.outside) == string(addr) {
			if a, ok := netip.AddrFromSlice(remote); ok && k.peers.Contains(a) {
				return k.inside
			}
		}
	}
	return nil
}
