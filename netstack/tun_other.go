//go:build !linux

package netstack

// portConflict knows nothing: such systems use ports from 49152 on, and have no way to reserve
// some of them.
func portConflict() string { return "" }
