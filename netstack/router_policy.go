package netstack

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/gaissmai/bart"
)

// A routerPolicy is the rules of a RouterConfig.
type routerPolicy struct {
	rules []RouterRule   // with Allow as the last
	ever  bart.Lite      // what any rule may allow: everything else is refused without a look
	hosts *hostAddrs     // of this host
	extra []netip.Prefix // more addresses of the router itself: the node's own
}

// A verdict is what the policy says of one flow.
type verdict struct {
	refusal refusal // notRefused: allowed
	// onRouter: the target may be this host, because the rule names it.
	onRouter bool
}

func newRouterPolicy(c *RouterConfig, own []netip.Prefix) *routerPolicy {
	p := &routerPolicy{rules: append([]RouterRule(nil), c.Rules...), hosts: new(hostAddrs), extra: own}
	if len(c.Allow) > 0 {
		p.rules = append(p.rules, RouterRule{To: c.Allow})
	}
	if len(p.rules) == 0 && c.Flow != nil {
		p.rules = []RouterRule{{}} // the hook decides
	}
	for i := range p.rules {
		switch r := &p.rules[i]; {
		case r.Deny:
		case len(r.To) == 0:
			p.ever.Insert(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
			p.ever.Insert(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
		default:
			for _, to := range r.To {
				p.ever.Insert(to)
			}
		}
	}
	return p
}

// decide asks the rules about a flow of peer to dst; protocol is "tcp", "udp" or
// "icmp".
func (p *routerPolicy) decide(peer PublicKey, protocol string, dst netip.AddrPort) verdict {
	special := p.special(dst.Addr())
	if special == neverTarget {
		return verdict{refusal: refusedAddress}
	}
	hidden := false
	for i := range p.rules {
		r := &p.rules[i]
		if !r.Peer.IsZero() && r.Peer != peer || r.Protocol != "" && r.Protocol != protocol || !r.hasPort(protocol, dst.Port()) {
			continue
		}
		fits, names := r.reaches(dst.Addr(), special)
		switch {
		case !fits:
		case r.Deny:
			return verdict{refusal: refusedByRule}
		case special != ordinaryTarget && !names:
			hidden = true // too broad for this target; a later rule may name it
		default:
			return verdict{onRouter: special != ordinaryTarget}
		}
	}
	if hidden {
		return verdict{refusal: refusedRouterItself}
	}
	return verdict{refusal: refusedByRule}
}

func (r *RouterRule) hasPort(protocol string, port uint16) bool {
	if len(r.Ports) == 0 {
		return true
	}
	if protocol == "icmp" {
		return false
	}
	for _, p := range r.Ports {
		if p.First <= port && port <= p.Last {
			return true
		}
	}
	return false
}

// reaches tells whether a is among the targets of r, and whether by name.
func (r *RouterRule) reaches(a netip.Addr, s specialTarget) (fits, names bool) {
	if len(r.To) == 0 {
		return true, false
	}
	for _, to := range r.To {
		if to.Contains(a) {
			fits = true
			if s.namedBy(to, a) {
				return true, true
			}
		}
	}
	return fits, false
}

// specialTarget says in which way an address is the router itself.
type specialTarget uint8

const (
	ordinaryTarget  specialTarget = iota
	neverTarget                   // no rule reaches it
	loopbackTarget                // named by a prefix within 127.0.0.0/8, or ::1/128
	linkLocalTarget               // named by a prefix within 169.254.0.0/16 or fe80::/10
	singleTarget                  // the host's own, metadata: named by the address alone
)

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8") // Linux takes all of it for itself on connect
	linkLocal4  = netip.MustParsePrefix("169.254.0.0/16")
	linkLocal6  = netip.MustParsePrefix("fe80::/10")
	classE      = netip.MustParsePrefix("240.0.0.0/4")
	broadcast4  = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	// What cloud machines ask for their secrets.
	metadata = map[netip.Addr]bool{
		netip.MustParseAddr("169.254.169.254"): true,
		netip.MustParseAddr("fd00:ec2::254"):   true,
	}
)

// namedBy tells whether the prefix p, which contains a, names it.
func (s specialTarget) namedBy(p netip.Prefix, a netip.Addr) bool {
	switch s {
	case loopbackTarget:
		return p.Bits() >= 8 && a.Is4() || p.IsSingleIP()
	case linkLocalTarget:
		return p.Bits() >= 16 && a.Is4() || p.Bits() >= 10 && a.Is6()
	case singleTarget:
		return p.IsSingleIP()
	}
	return false
}

func (p *routerPolicy) special(a netip.Addr) specialTarget {
	switch {
	case !a.IsValid(), a.Is4In6(), a.IsUnspecified(), a.IsMulticast(), thisNetwork.Contains(a), classE.Contains(a):
		return neverTarget // classE has the limited broadcast address in it
	case metadata[a]:
		return singleTarget
	case a.IsLoopback():
		return loopbackTarget
	}
	for _, own := range p.extra {
		if own.Addr() == a {
			return singleTarget
		}
	}
	own, broadcast := p.hosts.look(a)
	switch {
	case broadcast:
		return neverTarget
	case own:
		return singleTarget
	case linkLocal4.Contains(a), linkLocal6.Contains(a):
		return linkLocalTarget
	}
	return ordinaryTarget
}

// hostAddrs knows the addresses of this host's interfaces, which come and go.
type hostAddrs struct {
	mu        sync.Mutex
	read      time.Time
	own       map[netip.Addr]bool
	broadcast map[netip.Addr]bool
}

// hostAddrsAge is how old the addresses may be. A connection to one that is newer is
// still found out, by its own address; see onThisHost.
const hostAddrsAge = 5 * time.Second

// look tells whether a is an address of this host, or the broadcast address of one of
// its networks.
func (h *hostAddrs) look(a netip.Addr) (own, broadcast bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now := time.Now(); h.own == nil || now.Sub(h.read) > hostAddrsAge {
		if addrs, err := net.InterfaceAddrs(); err == nil || h.own == nil {
			h.set(addrs)
		}
		h.read = now
	}
	return h.own[a], h.broadcast[a]
}

func (h *hostAddrs) set(addrs []net.Addr) {
	h.own, h.broadcast = map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, a := range addrs {
		ipnet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(ipnet.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		h.own[ip] = true
		ones, bits := ipnet.Mask.Size()
		// A network of two addresses, RFC 3021, has no broadcast address.
		if bits == 32 && ones < 31 && ip.Is4() {
			b := ip.As4()
			for i := range b {
				b[i] |= ^ipnet.Mask[i]
			}
			h.broadcast[netip.AddrFrom4(b)] = true
		}
	}
}

// onThisHost tells whether conn has ended where it began, so on this host, whatever
// the target's address looked like.
func onThisHost(conn net.Conn) bool {
	ip := func(a net.Addr) (netip.Addr, bool) {
		switch a := a.(type) {
		case *net.TCPAddr:
			return a.AddrPort().Addr().Unmap(), true
		case *net.UDPAddr:
			return a.AddrPort().Addr().Unmap(), true
		}
		return netip.Addr{}, false
	}
	l, ok := ip(conn.LocalAddr())
	r, ok2 := ip(conn.RemoteAddr())
	return ok && ok2 && l == r
}
