package tunwrap

import (
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gaissmai/bart"
)

// A Filter decides which packets pass between this node and its peers. A packet that begins
// a flow is decided by the first rule that fits it, and refused when none does; what belongs
// to a flow that was allowed passes, both ways, without a look at the rules. Superpackets are
// decided whole. A packet refused is dropped silently, as [DropFilter].
//
// Addresses are those that the node itself uses: outbound packets are looked at before NAT,
// inbound ones after it. That a packet from a peer has a source that is the peer's is somebody
// else's to check, and taken for granted.
//
// What a flow is:
//   - TCP: the two addresses and ports. A SYN begins one, and so does a packet with ACK but neither SYN
//     nor RST, since a connection may be older than the filter.
//   - UDP: the two addresses and ports.
//   - Ping: the two addresses, the identifier and who asks. Only requests begin one.
//   - Everything else: the two addresses and the protocol.
//
// An ICMP error passes if it quotes a packet of a flow with the same peer; redirects never do. Of
// a datagram in fragments the first is decided like a whole packet, if it contains all of
// the transport header, and the others pass after it if they leave that header alone: one
// that overtakes the first is lost. Packets with a route in them (IPv4 source routing, an IPv6
// routing header with segments left) are refused.
//
// With [FilterOptions.Stateless] there are no flows: the rules decide about each packet by its addresses, replies,
// errors and fragments like any other.
//
// All its methods may be called from any goroutine. One Filter may serve several devices,
// which then share its flows.
type Filter struct {
	flowTable

	table     atomic.Pointer[filterTable]
	stateless bool
	rules     []FilterRule
	count     []directions // one for each rule
	other     [numRefusals]directions

	stranger *filterPeer // who has an address that is no peer's

	mu    sync.Mutex
	peers map[string]*filterPeer // of table
}

// Direction is the way a packet goes.
type Direction uint8

// The directions. Zero is both of them, in a rule.
const (
	Outbound Direction = 1 // from this node to a peer
	Inbound  Direction = 2
)

// PortRange is from First to Last, both included.
type PortRange struct{ First, Last uint16 }

// A FilterRule decides about the flows that fit all of its conditions.
type FilterRule struct {
	Deny bool // allow otherwise

	Direction Direction      // that of the flow's first packet; 0: both
	Peer      string         // ID of the FilterPeer at the other end; "": any
	Group     string         // Group of the FilterPeer at the other end; "": any
	Protocol  string         // "tcp", "udp" or "icmp", which is ping; "": every protocol
	Ports     []PortRange    // destination of the first packet; empty: any. Only of TCP and UDP.
	From, To  []netip.Prefix // its source and destination; empty: any
}

// A FilterPeer says which addresses are a peer's.
type FilterPeer struct {
	ID       string
	Group    string         // that rules can name; peers may share one
	Prefixes []netip.Prefix // the longest that contains an address decides
}

// FilterOptions are the rules and limits of a Filter.
type FilterOptions struct {
	Rules []FilterRule
	Peers []FilterPeer
	// Stateless makes each packet be decided by the rules alone, which then name no protocol and no ports. Nothing
	// is remembered, so nobody can use that up; what the rules let through one way needs one for the way back too.
	Stateless bool
	// Flows bounds what is remembered in all, and FlowsPerPeer what is for one peer, so that
	// none uses it up for the others. What begins a flow beyond it is refused. 0 means
	// DefaultFlows, and a quarter of Flows. A flow takes about 100 bytes.
	Flows, FlowsPerPeer int
	// TCPIdle and UDPIdle are the silence after which a connection, and a flow of UDP or anything
	// else but ping that was answered, are forgotten. 0 means the defaults.
	TCPIdle, UDPIdle time.Duration
}

const (
	// DefaultFlows is what Linux tracks on a machine of 4 GB and less (nf_conntrack_max).
	DefaultFlows = 65536

	// DefaultTCPIdle is the least that RFC 5382 5 allows: two hours, after which
	// keepalives are sent by default (RFC 9293 3.8.4), and their retries.
	DefaultTCPIdle = 2*time.Hour + 4*time.Minute
	// DefaultUDPIdle is the least that RFC 4787 4.3 allows.
	DefaultUDPIdle = 2 * time.Minute
)

// A filterTable is rules and peers made ready for packets. It never changes: other peers are
// another table, with another generation.
type filterTable struct {
	generation uint32
	rules      []filterRule
	peers      bart.Table[*filterPeer]
	stranger   *filterPeer
}

// A filterPeer is a peer and how many flows it has.
type filterPeer struct {
	group string // never changes
	flows atomic.Int64
}

// A filterRule is a FilterRule made ready. Pointers are nil where anything fits.
type filterRule struct {
	deny     bool
	never    bool // the peer is not there
	from     Direction
	class    packetClass // classNone: every
	peer     *filterPeer
	group    string
	ports    []PortRange
	src, dst *bart.Lite
}

// NewFilter makes a Filter. Its errors wrap [ErrFilterRule]. It copies o.
func NewFilter(o FilterOptions) (*Filter, error) {
	if o.Flows <= 0 {
		o.Flows = DefaultFlows
	}
	if o.FlowsPerPeer <= 0 {
		o.FlowsPerPeer = (o.Flows + 3) / 4
	}
	if o.TCPIdle <= 0 {
		o.TCPIdle = DefaultTCPIdle
	}
	if o.UDPIdle <= 0 {
		o.UDPIdle = DefaultUDPIdle
	}
	f := &Filter{
		rules:    append([]FilterRule(nil), o.Rules...),
		count:    make([]directions, len(o.Rules)),
		stranger: new(filterPeer),
	}
	f.stateless = o.Stateless
	f.flowTable.init(&o)
	for i := range f.rules {
		if err := f.rules[i].validate(); err != nil {
			return nil, err
		}
		if r := &f.rules[i]; f.stateless && (r.Protocol != "" || len(r.Ports) > 0) {
			return nil, fmt.Errorf("%w: without flows it cannot name a protocol or ports", ErrFilterRule)
		}
	}
	return f, f.SetPeers(o.Peers)
}

func (r *FilterRule) validate() error {
	switch r.Protocol {
	case "", "tcp", "udp":
	case "icmp":
		if len(r.Ports) > 0 {
			return fmt.Errorf("%w: icmp has no ports", ErrFilterRule)
		}
	default:
		return fmt.Errorf("%w: protocol %q", ErrFilterRule, r.Protocol)
	}
	if r.Direction > Inbound {
		return fmt.Errorf("%w: direction %d", ErrFilterRule, r.Direction)
	}
	for _, p := range r.Ports {
		if p.Last < p.First {
			return fmt.Errorf("%w: ports %d to %d", ErrFilterRule, p.First, p.Last)
		}
	}
	for _, ps := range [][]netip.Prefix{r.From, r.To} {
		for _, p := range ps {
			if !p.IsValid() || p.Addr().Is4In6() {
				return fmt.Errorf("%w: prefix %v", ErrFilterRule, p)
			}
		}
	}
	return nil
}

// SetPeers replaces the peers, and ends every flow whose address belongs to another peer now, or which
// the rules would not let begin any more. On an error, which wraps [ErrFilterRule], everything stays.
func (f *Filter) SetPeers(peers []FilterPeer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := &filterTable{stranger: f.stranger}
	if old := f.table.Load(); old != nil {
		t.generation = old.generation + 1
	}
	known := make(map[string]*filterPeer, len(peers))
	for _, p := range peers {
		if p.ID == "" || known[p.ID] != nil {
			return fmt.Errorf("%w: peer %q has no ID of its own", ErrFilterRule, p.ID)
		}
		x := f.peers[p.ID]
		if x == nil || x.group != p.Group {
			x = &filterPeer{group: p.Group}
		}
		known[p.ID] = x
		for _, prefix := range p.Prefixes {
			if !prefix.IsValid() || prefix.Addr().Is4In6() {
				return fmt.Errorf("%w: prefix %v of peer %q", ErrFilterRule, prefix, p.ID)
			}
			t.peers.Insert(prefix.Masked(), x)
		}
	}
	for i := range f.rules {
		t.rules = append(t.rules, f.rules[i].prepare(known))
	}
	f.peers = known
	f.table.Store(t)
	f.revalidateAll(t)
	return nil
}

// prepare makes r ready for packets.
func (r *FilterRule) prepare(peers map[string]*filterPeer) filterRule {
	p := filterRule{deny: r.Deny, from: r.Direction, group: r.Group, ports: r.Ports, src: set(r.From), dst: set(r.To)}
	if r.Peer != "" {
		p.peer = peers[r.Peer]
		p.never = p.peer == nil
	}
	switch r.Protocol {
	case "tcp":
		p.class = classTCP
	case "udp":
		p.class = classUDP
	case "icmp":
		p.class = classEcho
	}
	return p
}

// set is the prefixes as a set, nil if there are none.
func set(prefixes []netip.Prefix) *bart.Lite {
	if len(prefixes) == 0 {
		return nil
	}
	l := new(bart.Lite)
	for _, p := range prefixes {
		l.Insert(p.Masked())
	}
	return l
}

// peerOf is who has the address a.
func (t *filterTable) peerOf(a netip.Addr) *filterPeer {
	if p, ok := t.peers.Lookup(a); ok {
		return p
	}
	return t.stranger
}

// noRule is the index of the rule when none fits.
const noRule = -1

// decide finds the rule for what begins a flow.
func (t *filterTable) decide(o *opening) (rule int32, allowed bool) {
	for i := range t.rules {
		if r := &t.rules[i]; r.fits(o) {
			return int32(i), !r.deny
		}
	}
	return noRule, false
}

func (r *filterRule) fits(o *opening) bool {
	switch {
	case r.never, r.from != 0 && r.from != o.direction, r.class != classNone && r.class != o.class,
		r.peer != nil && r.peer != o.peer, r.group != "" && r.group != o.peer.group, len(r.ports) > 0 && !r.hasPort(o),
		r.src != nil && !r.src.Contains(o.src), r.dst != nil && !r.dst.Contains(o.dst):
		return false
	}
	return true
}

func (r *filterRule) hasPort(o *opening) bool {
	if o.class != classTCP && o.class != classUDP {
		return false
	}
	for _, p := range r.ports {
		if p.First <= o.port && o.port <= p.Last {
			return true
		}
	}
	return false
}

// An opening is what the rules are asked about: the first packet of a flow.
type opening struct {
	direction Direction
	class     packetClass
	peer      *filterPeer
	src, dst  netip.Addr
	port      uint16 // destination
}

// outbound decides about the packet b on its way to a peer, or about the superpacket of which b is
// the headers, of size bytes, laid out as l. now is what Filter.now said lately. It borrows b.
func (f *Filter) outbound(b []byte, l *layout, size int, now int64) Drop {
	return f.judge(b, l, size, Outbound, now)
}

// inbound is outbound for a packet from a peer.
func (f *Filter) inbound(b []byte, l *layout, size int, now int64) Drop {
	return f.judge(b, l, size, Inbound, now)
}

func (f *Filter) judge(b []byte, l *layout, size int, d Direction, now int64) Drop {
	t := f.table.Load()
	if f.stateless {
		return f.glance(t, b, l, size, d)
	}
	f.sweepSome(now)
	var p filterPacket
	p.read(b, l, d)
	p.size = size
	switch p.class {
	case classRefused:
		return f.refuse(refusedUnknown, &p)
	case classError:
		return f.known(t, &p, now)
	case classLater:
		return f.later(t, &p, now)
	}
	rule, r := f.admit(t, &p, now)
	if r == notRefused && p.fragment {
		r = f.rememberFragment(t, &p, rule, now)
	}
	if r != notRefused {
		return f.refuse(r, &p)
	}
	return DropNone
}

// glance decides by the addresses of a packet alone.
func (f *Filter) glance(t *filterTable, b []byte, l *layout, size int, d Direction) Drop {
	p := filterPacket{direction: d, version: l.version, size: size}
	if hasRoute(b, l) {
		return f.refuse(refusedUnknown, &p)
	}
	p.addresses(b, l, d)
	o := p.opening(t)
	rule, allowed := t.decide(&o)
	if rule == noRule {
		return f.refuse(refusedNoRule, &p)
	}
	f.count[rule].add(&p)
	if !allowed {
		return DropFilter
	}
	return DropNone
}

// admit decides about a packet that has a transport header or needs none.
func (f *Filter) admit(t *filterTable, p *filterPacket, now int64) (rule int32, r refusal) {
	h := f.hash(&p.key)
	s := f.shard(h)
	s.mu.Lock()
	if e := f.live(s, h, &p.key, t, now); e != nil && e.continues(p) {
		rule = e.rule
		e.pass(p)
		e.deadline = now + f.patience(e)
		s.mu.Unlock()
		f.count[rule].add(p)
		return rule, notRefused
	}
	s.mu.Unlock()
	if !p.begins() {
		return noRule, refusedUnknown
	}

	o := p.opening(t)
	rule, allowed := t.decide(&o)
	if !allowed {
		if rule == noRule {
			return rule, refusedNoRule
		}
		f.count[rule].add(p)
		return rule, refusedByRule
	}
	s.mu.Lock()
	e := f.live(s, h, &p.key, t, now) // another goroutine may have been faster
	if e == nil {
		if e = f.insert(s, h, &p.key, o.peer); e == nil {
			s.mu.Unlock()
			return rule, refusedFull
		}
	}
	e.begin(p, rule, t.generation)
	e.deadline = now + f.patience(e)
	s.mu.Unlock()
	f.count[rule].addFirst(p)
	return rule, notRefused
}

// known decides about an ICMP error, by the flow of the packet that it quotes.
func (f *Filter) known(t *filterTable, p *filterPacket, now int64) Drop {
	h := f.hash(&p.key)
	s := f.shard(h)
	s.mu.Lock()
	e := f.live(s, h, &p.key, t, now)
	if e == nil || e.peer != t.peerOf(p.farAddr()) {
		s.mu.Unlock()
		return f.refuse(refusedUnknown, p)
	}
	rule := e.rule
	s.mu.Unlock()
	f.count[rule].add(p)
	return DropNone
}
