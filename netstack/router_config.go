package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"
)

// RouterConfig makes a node a subnet router: its peers reach, through sockets of
// the system and so without privileges, what the node's own host reaches. Nothing
// is reached that is not allowed.
//
// The targets see connections from this host: the peers' addresses are not theirs
// to see, as behind any NAT.
type RouterConfig struct {
	// Allow are the prefixes that every peer reaches by TCP, UDP and ping; 0.0.0.0/0
	// and ::/0 make an exit node. It is asked after Rules.
	Allow []netip.Prefix
	// Rules are asked in order, and the first that fits a flow decides.
	//
	// An allowing rule (and Allow) reaches a target on the router itself only if it
	// names it. 127.0.0.0/8, ::1, 169.254.0.0/16 and fe80::/10 are named by a prefix
	// within them; the host's own addresses, and the metadata services at 169.254.169.254
	// and fd00:ec2::254, by a prefix of that one address. Multicast, broadcast and
	// unspecified addresses and IPv4 addresses written as IPv6 are not to be had.
	Rules []RouterRule

	// Flow, if not nil, is asked about every TCP connection and UDP flow that the rules
	// allow (every one at all, when there are neither Rules nor Allow). It returns the
	// connection to splice with, a connected datagram socket for UDP, and the router
	// takes it. nil and no error dials Flow.Dst from the system as if there were no
	// hook. An error refuses: see [ErrRefuse]. It runs on a goroutine of its own and
	// is to honour ctx. Echo requests are not asked about; they follow the rules.
	Flow func(ctx context.Context, f Flow) (net.Conn, error)

	Limits   RouterLimits
	Timeouts RouterTimeouts
}

// Flow is one TCP connection or UDP flow from a peer through the router.
type Flow struct {
	Peer     PublicKey
	PeerName string
	Network  string         // "tcp" or "udp"
	Src      netip.AddrPort // inside the VPN
	Dst      netip.AddrPort // the target
}

// ErrRefuse is for the hook RouterConfig.Flow: the client gets a TCP reset, or port
// unreachable for UDP. The system's ENETUNREACH, EHOSTUNREACH and EACCES tell the
// client just that; any other error is like ErrRefuse.
var ErrRefuse = errors.New("refused")

// RouterRule decides about the flows that fit all of its conditions.
type RouterRule struct {
	Deny bool // allow otherwise

	Peer     PublicKey      // zero: any
	Protocol string         // "tcp", "udp" or "icmp", which is ping; empty: any of them
	Ports    []PortRange    // of the target; empty: any. Not for icmp.
	To       []netip.Prefix // the target; empty: any
}

// PortRange is from First to Last, both included.
type PortRange struct{ First, Last uint16 }

// RouterLimits bound what peers can make the router hold. 0 is a default. A UDP or
// ICMP flow beyond its limit takes the place of the one that was silent longest; a
// TCP connection is refused, since the old ones are somebody's work.
type RouterLimits struct {
	TCP, TCPPerPeer int
	// HalfOpen are the targets being dialled. When there are too many the oldest of the peer with most gives
	// way: a target that lives answers soon, so the dead never starve the living, nor one peer the others.
	HalfOpen, HalfOpenPerPeer, HalfOpenPerTarget int
	UDP, UDPPerPeer                              int
	ICMP, ICMPPerPeer                            int
}

// RouterTimeouts are how long the router waits; 0 is a default.
type RouterTimeouts struct {
	Dial     time.Duration // for a target to accept a connection
	UDPIdle  time.Duration // silence after which a UDP flow is forgotten
	DNSIdle  time.Duration // the same for port 53
	ICMPIdle time.Duration // the same for ping
}

// Defaults. A TCP flow takes one file descriptor, two while it is half open at most,
// and a UDP or ICMP flow one; Go raises the soft limit of descriptors to the hard one,
// half a million on current systems.
var (
	defaultRouterLimits = RouterLimits{
		TCP: 32768, TCPPerPeer: 16384,
		HalfOpen: 2048, HalfOpenPerPeer: 512, HalfOpenPerTarget: 128,
		UDP: 16384, UDPPerPeer: 4096,
		ICMP: 1024, ICMPPerPeer: 256,
	}
	// Dial is what Linux needs for four SYNs. RFC 4787 4.3 asks for two minutes for
	// UDP, and allows less for a port whose use is known. Ping has 60 s in RFC 5508 3.2
	// for NATs that hold an external address; here a flow holds one only while it lasts,
	// and the next request makes a new one.
	defaultRouterTimeouts = RouterTimeouts{
		Dial: 10 * time.Second, UDPIdle: 2 * time.Minute, DNSIdle: dnsIdle, ICMPIdle: 20 * time.Second,
	}
)

func (l RouterLimits) orDefaults() RouterLimits {
	d := &defaultRouterLimits
	for _, f := range []struct {
		v *int
		d int
	}{
		{&l.TCP, d.TCP}, {&l.TCPPerPeer, d.TCPPerPeer}, {&l.HalfOpen, d.HalfOpen},
		{&l.HalfOpenPerPeer, d.HalfOpenPerPeer}, {&l.HalfOpenPerTarget, d.HalfOpenPerTarget},
		{&l.UDP, d.UDP}, {&l.UDPPerPeer, d.UDPPerPeer}, {&l.ICMP, d.ICMP}, {&l.ICMPPerPeer, d.ICMPPerPeer},
	} {
		if *f.v == 0 {
			*f.v = f.d
		}
	}
	return l
}

func (t RouterTimeouts) orDefaults() RouterTimeouts {
	or := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	d := &defaultRouterTimeouts
	or(&t.Dial, d.Dial)
	or(&t.UDPIdle, d.UDPIdle)
	or(&t.DNSIdle, min(d.DNSIdle, t.UDPIdle))
	or(&t.ICMPIdle, d.ICMPIdle)
	return t
}

// validate reports what is wrong with c.
func (c *RouterConfig) validate(bad complain) {
	checkPrefixes := func(key string, ps []netip.Prefix) {
		for i, p := range ps {
			if !p.IsValid() || p.Addr().Is4In6() || p != p.Masked() || p.Addr().IsMulticast() {
				bad(index(key, i), p.String(), "a prefix such as 192.168.1.0/24 or 2001:db8:1::/48")
			}
		}
	}
	checkPrefixes("Router.Allow", c.Allow)
	for i := range c.Rules {
		r, key := &c.Rules[i], index("Router.Rules", i)
		checkPrefixes(key+".To", r.To)
		switch r.Protocol {
		case "", "tcp", "udp":
		case "icmp":
			if len(r.Ports) > 0 {
				bad(key+".Ports", "", "nothing with the protocol icmp")
			}
		default:
			bad(key+".Protocol", strconv.Quote(r.Protocol), `"tcp", "udp", "icmp" or ""`)
		}
		for j, p := range r.Ports {
			if p.First == 0 || p.Last < p.First {
				bad(index(key+".Ports", j), fmt.Sprintf("%d-%d", p.First, p.Last), "a range such as 80-90, from 1 on")
			}
		}
	}
	l, d := &c.Limits, &c.Timeouts
	for _, v := range []struct {
		key string
		n   int
	}{
		{"TCP", l.TCP}, {"TCPPerPeer", l.TCPPerPeer}, {"HalfOpen", l.HalfOpen}, {"HalfOpenPerPeer", l.HalfOpenPerPeer},
		{"HalfOpenPerTarget", l.HalfOpenPerTarget}, {"UDP", l.UDP}, {"UDPPerPeer", l.UDPPerPeer},
		{"ICMP", l.ICMP}, {"ICMPPerPeer", l.ICMPPerPeer},
	} {
		if v.n < 0 {
			bad("Router.Limits."+v.key, strconv.Itoa(v.n), "a number above 0, or 0 for the default")
		}
	}
	for _, v := range []struct {
		key string
		d   time.Duration
	}{{"Dial", d.Dial}, {"UDPIdle", d.UDPIdle}, {"DNSIdle", d.DNSIdle}, {"ICMPIdle", d.ICMPIdle}} {
		if v.d < 0 {
			bad("Router.Timeouts."+v.key, v.d.String(), "a time above 0, or 0 for the default")
		}
	}
}
