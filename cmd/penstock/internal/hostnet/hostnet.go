// Package hostnet is what a node with an interface of the kernel does to its host: addresses, MTU,
// routes, rules and the resolver, and how all of it is taken back.
//
//	Recover ── what dead nodes left ──▶ Check ── can it work? ──▶ (the interface is opened) ──▶ Apply ──▶ State.Close
//
// Every step is written down in a journal before it is taken. Close takes the steps back in
// reverse order; after a crash the next Recover does, from the journal. A step is
// taken back only where things still are as it left them.
//
// Routes are in a table of their own by default, with rules that merge it with the main table as
// if it were one; see plan.go.
package hostnet

import (
	"errors"
	"log/slog"
	"net/netip"
)

// Config says how the host is to be.
type Config struct {
	Interface string // the TUN, which is open
	// Owner tells what made the changes: the path of a configuration. It is in the journal, for
	// Recover and for messages.
	Owner string
	// Folder is for the journal; empty: the default one.
	Folder string

	Addresses []netip.Prefix
	MTU       int // 0: as it is

	// Routes go through the interface, Exclude does not although a prefix of Routes has it.
	Routes, Exclude []netip.Prefix
	// Table gets the routes. TableAuto makes one with rules, TableNone makes no routes.
	Table int
	// FwMark is on every packet of the tunnel itself. TableAuto needs it: by the mark the rules
	// keep these packets out of the interface.
	FwMark uint32
	// Endpoints are addresses from which packets of the tunnel come, as far as they are known; with Anywhere
	// there are others, of peers that have a name or call. They say whether strict reverse path filtering
	// would drop those packets.
	Endpoints []netip.Addr
	Anywhere  bool

	DNS DNS

	Logger *slog.Logger // nil: discarded
}

// What Config.Table can be besides a number.
const (
	TableAuto = 0
	TableNone = -1
)

// DefaultFwMark has none of the bits that Kubernetes (0x4000, 0x8000) and Tailscale (0xff0000) put
// into marks. All nodes of a host have the same one, so that no tunnel is sent through another.
const DefaultFwMark = 5182

// DNS is for the host's resolver. The zero value leaves it alone.
type DNS struct {
	Servers []netip.AddrPort // for all names but those of Split
	Search  []string
	Split   []SplitDNS
}

// SplitDNS are the servers of some domains and of what is below them.
type SplitDNS struct {
	Domains []string // "." is all names
	Servers []netip.AddrPort
}

func (d *DNS) empty() bool { return len(d.Servers) == 0 && len(d.Search) == 0 && len(d.Split) == 0 }

var (
	// ErrLinuxOnly: this system's addresses and routes are left to its owner.
	ErrLinuxOnly = errors.New(`addresses and routes are set on Linux only`)
	// ErrInUse: a node that is alive has changed the host for this interface.
	ErrInUse = errors.New("in use")
)

// Recovered is what Recover did about one dead node.
type Recovered struct {
	Interface, Owner string
	Steps            int   // that it had taken, and that were taken back
	Err              error // what could not be
}
