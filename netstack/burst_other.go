//go:build !unix

package netstack

import "net"

// systemBurstReader is not made here: a flow holds its burst while it waits.
func systemBurstReader(net.Conn) func() (*burst, error) { return nil }
