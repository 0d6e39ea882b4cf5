//go:build !linux

package hostnet

import "fmt"

// State is a host that Apply has changed.
type State struct{}

// Folder is where journals are.
func Folder(other string) string { return other }

// Check fails if there is anything to do.
func Check(c Config) error {
	if c.Table == TableNone && c.DNS.empty() {
		return nil
	}
	return fmt.Errorf("device = \"tun\": %w; with routes = false and dns = false in [tun] they are left to you", ErrLinuxOnly)
}

// Apply does nothing, or fails if there is anything to do.
func Apply(c Config) (*State, error) {
	if err := Check(c); err != nil {
		return nil, err
	}
	if c.Logger != nil {
		c.Logger.Warn("the interface has no addresses yet: they are set on Linux only", "name", c.Interface, "addresses", c.Addresses)
	}
	return new(State), nil
}

// SetMTU does nothing.
func (s *State) SetMTU(int) error { return nil }

// Table is 0: there are no routes.
func (s *State) Table() int { return 0 }

// Close does nothing.
func (s *State) Close() error { return nil }

// Recover finds nothing.
func Recover(string, func(name, owner string) bool) ([]Recovered, error) { return nil, nil }
