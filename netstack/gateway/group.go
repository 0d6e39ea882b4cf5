package gateway

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A Profile is what clients get and are told. In a [Group] what is zero is as in [Config.Profile].
type Profile struct {
	Pool Pool // where addresses come from; empty for a family: none of it

	// Routes are the networks behind the server, all if there are none; NoRoutes are parts of them that are
	// not to be sent to it. They are what clients are told; what they reach the router decides, or the kernel.
	Routes, NoRoutes []netip.Prefix
	// OnlyRoutes makes them more than words: what a client sends to anything else but the server's own addresses and DNS is dropped, whatever
	// the router allows.
	OnlyRoutes bool

	DNS      []netip.Addr
	Search   []string // domains that complete names
	SplitDNS []string // domains that DNS answers for; none: all
	AllDNS   bool     // all questions go through the tunnel, also when few routes do
	Banner   string

	MTU       int           // of packets inside; 0: from the path
	DPD       time.Duration // silence after which the other side is asked; 0: 30 s
	Keepalive time.Duration // after which something is sent for the sake of NATs; 0: 25 s
	Rekey     time.Duration // age at which a client makes a new tunnel; 0: 24 h, negative: never
	NoUDP     bool          // everything goes over TLS

	IdleTimeout         time.Duration // without packets; 0: never
	SessionTimeout      time.Duration // after sign-in; 0: never
	DisconnectedTimeout time.Duration // for which a session waits for a client that is gone; 0: 5 minutes
}

// Defaults of a Profile. Stock servers have 90 s for DPD; a client behind UDP that is blocked of a sudden waits as long.
const (
	defaultDPD          = 30 * time.Second
	defaultKeepalive    = 25 * time.Second
	defaultRekey        = 24 * time.Hour
	defaultDisconnected = 5 * time.Minute
)

// over is p where it says something, and base elsewhere.
func (p Profile) over(base Profile) Profile {
	for _, is4 := range []bool{true, false} {
		if len(p.Pool.family(is4)) == 0 {
			p.Pool = append(slices.Clip(p.Pool), base.Pool.family(is4)...)
		}
	}
	orList(&p.Routes, base.Routes)
	orList(&p.NoRoutes, base.NoRoutes)
	orList(&p.DNS, base.DNS)
	orList(&p.Search, base.Search)
	orList(&p.SplitDNS, base.SplitDNS)
	p.OnlyRoutes = p.OnlyRoutes || base.OnlyRoutes
	p.AllDNS = p.AllDNS || base.AllDNS
	p.NoUDP = p.NoUDP || base.NoUDP
	or(&p.Banner, base.Banner)
	or(&p.MTU, base.MTU)
	or(&p.DPD, base.DPD)
	or(&p.Keepalive, base.Keepalive)
	or(&p.Rekey, base.Rekey)
	or(&p.IdleTimeout, base.IdleTimeout)
	or(&p.SessionTimeout, base.SessionTimeout)
	or(&p.DisconnectedTimeout, base.DisconnectedTimeout)
	return p
}

func orList[T any](v *[]T, base []T) {
	if *v == nil {
		*v = base
	}
}

func or[T comparable](v *T, base T) {
	var zero T
	if *v == zero {
		*v = base
	}
}

func (p Profile) orDefaults() Profile {
	or(&p.DPD, defaultDPD)
	or(&p.Keepalive, defaultKeepalive)
	or(&p.Rekey, defaultRekey)
	or(&p.DisconnectedTimeout, defaultDisconnected)
	return p
}

// A Group is a choice that users have when they sign in.
type Group struct {
	Name  string
	Label string // what users see; empty: Name
	// Open groups are for every user. Any other is for those that have it in User.Groups.
	Open bool
	Profile
}

// groups are those of the configuration, with their profiles complete.
type groups struct {
	list   []Group
	common Profile // of those who are in none
}

func newGroups(common Profile, list []Group) *groups {
	g := &groups{common: common.orDefaults()}
	for _, group := range list {
		group.Profile = group.Profile.over(g.common)
		g.list = append(g.list, group)
	}
	return g
}

// DefaultGroup is what the form calls not to choose: the first of the user's groups, or none. No group can
// have that name.
const DefaultGroup = "default"

// fenceOf is what the packet filter calls a group of that name, "" included.
func fenceOf(group string) string {
	if group == "" {
		return DefaultGroup
	}
	return group
}

// fence is rules with those that keep clients to their routes: before the last of rules if that allows everything, as what they lack is
// then allowed. own are the server's addresses.
func (g *groups) fence(rules []netstack.ACLRule, own []netip.Prefix) []netstack.ACLRule {
	var fences []netstack.ACLRule
	fences = g.common.fence(fences, fenceOf(""), own)
	for i := range g.list {
		fences = g.list[i].fence(fences, g.list[i].Name, own)
	}
	if len(fences) == 0 {
		return rules
	}
	rest := []netstack.ACLRule{{}}
	if n := len(rules); n > 0 {
		if !reflect.ValueOf(rules[n-1]).IsZero() {
			return append(slices.Clip(rules), fences...)
		}
		rules = rules[:n-1]
	}
	return slices.Concat(rules, fences, rest)
}

// fence appends the rules for clients of a group with p. They need no flows, so clients cannot use up what there is room for.
func (p *Profile) fence(rules []netstack.ACLRule, group string, own []netip.Prefix) []netstack.ACLRule {
	if !p.OnlyRoutes {
		return rules
	}
	hosts := func(addrs []netip.Addr) (list []netip.Prefix) {
		for _, a := range addrs {
			list = append(list, netip.PrefixFrom(a, a.BitLen()))
		}
		return list
	}
	from := netstack.ACLRule{Direction: "in", Group: group}
	add := func(r netstack.ACLRule) { rules = append(rules, r) }
	var here []netip.Addr
	for _, a := range own {
		here = append(here, a.Addr())
	}
	r := from
	r.To = hosts(append(here, p.DNS...))
	add(r)
	if len(p.NoRoutes) > 0 {
		r := from
		r.Deny, r.To = true, p.NoRoutes
		add(r)
	}
	r = from
	r.To = p.Routes // none: everything
	add(r)
	r = from
	r.Deny = true
	add(r)
	return rules
}

// offered are the choices of the form; none when there are no groups.
func (g *groups) offered() (list []openconnect.Group) {
	for i := range g.list {
		if i == 0 {
			list = append(list, openconnect.Group{Name: DefaultGroup, Label: "Default"})
		}
		list = append(list, openconnect.Group{Name: g.list[i].Name, Label: g.list[i].Label})
	}
	return list
}

func (g *groups) find(name string) *Group {
	for i := range g.list {
		if g.list[i].Name == name {
			return &g.list[i]
		}
	}
	return nil
}

// profile is that of a group, or for "" the common one.
func (g *groups) profile(name string) (Profile, bool) {
	if name == "" {
		return g.common, true
	}
	if group := g.find(name); group != nil {
		return group.Profile, true
	}
	return Profile{}, false
}

// admits tells whether the group of that name is for user. "" is for everybody who has got it.
func (g *groups) admits(user *User, name string) bool {
	group := g.find(name)
	return name == "" || group != nil && (group.Open || slices.Contains(user.Groups, name))
}

// shut says why a session of a group is to end, after a look at its user, of whom err was said; "" when it may go on.
func (g *groups) shut(user *User, err error, group string) string {
	switch {
	case errors.Is(err, ErrDenied):
		return "the user may not come in any more"
	case err == nil && !g.admits(user, group):
		return "the user is not of its group any more"
	}
	return ""
}

// choose is the group in which user gets in, who has asked for one, or not. ok is false when it is
// not for him.
func (g *groups) choose(user *User, asked string) (name string, ok bool) {
	if asked != "" && asked != DefaultGroup {
		return asked, g.admits(user, asked)
	}
	for _, name := range user.Groups {
		if g.find(name) != nil {
			return name, true
		}
	}
	return "", len(g.common.Pool) > 0
}
