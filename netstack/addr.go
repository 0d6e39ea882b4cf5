package netstack

import (
	"net"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// stackAddr converts an address; the invalid one becomes the stack's empty one.
func stackAddr(a netip.Addr) tcpip.Address {
	if a = a.Unmap(); a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	} else if a.Is6() {
		return tcpip.AddrFrom16(a.As16())
	}
	return tcpip.Address{}
}

// fullAddress converts an address with port for the node's only NIC.
func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	f := tcpip.FullAddress{Addr: stackAddr(a.Addr()), Port: a.Port()}
	if f.Addr != (tcpip.Address{}) {
		f.NIC = nicID
	}
	return f
}

// addrPort converts an address of the stack, without IPv4-mapped forms.
func addrPort(f tcpip.FullAddress) netip.AddrPort {
	var a netip.Addr
	switch f.Addr.Len() {
	case 4:
		a = netip.AddrFrom4(f.Addr.As4())
	case 16:
		a = netip.AddrFrom16(f.Addr.As16()).Unmap()
	}
	return netip.AddrPortFrom(a, f.Port)
}

// netAddr converts an address of the stack for the net package.
func netAddr(network string, f tcpip.FullAddress) net.Addr {
	a := addrPort(f)
	if network == "udp" {
		return net.UDPAddrFromAddrPort(a)
	}
	return net.TCPAddrFromAddrPort(a)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// protocolOf is the network protocol that a belongs to.
func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Unmap().Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}
