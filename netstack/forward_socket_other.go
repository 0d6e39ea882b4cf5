//go:build !linux

package netstack

import (
	"errors"
	"net"
	"net/netip"
)

var errNoEchoSockets = errors.New("only on Linux")

// newUDPFlowSocket is nil: without an error queue a socket is like any connection.
func newUDPFlowSocket(net.Conn) flowSocket { return nil }

func probeEcho(bool) echoAbility { return echoAbility{err: errNoEchoSockets} }

func openEcho(netip.Addr, bool, bool) (flowSocket, error) { return nil, refusedNoEcho }
