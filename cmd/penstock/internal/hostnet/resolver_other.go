//go:build !linux

package hostnet

import "net/netip"

// Endpoints resolves the names of peers; here nobody has to.
type Endpoints struct{}

// NewEndpoints returns nil: the system's resolver will do.
func NewEndpoints(uint32, DNS) *Endpoints { return nil }

// Resolve is not called.
func (*Endpoints) Resolve(string) ([]netip.AddrPort, error) { return nil, ErrLinuxOnly }
