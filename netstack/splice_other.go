//go:build !unix

package netstack

import "net"

// systemBlockReader is not made here: a connection holds its block while it
// waits.
func systemBlockReader(net.Conn) func() (*block, int, error) { return nil }
