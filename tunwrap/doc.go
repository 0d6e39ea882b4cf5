// Package tunwrap works on the bytes of IP packets: offload metadata,
// segmentation, coalescing, checksums, NAT and a packet filter. It is the middle of the path:
//
//	app ─ netstack ─ linkep ─ tunwrap ─ transport ─ UDP
//
// Outbound a [Wrapper] takes superpackets from a [Link] and gives MTU-sized
// segments with finished headers and checksums. Inbound it verifies what comes
// from a peer, coalesces neighbours of one TCP flow into superpackets and
// delivers them to the Link. A Wrapper is a wireguard tun.Device, so any engine
// that drives one can drive it.
//
// The package knows neither DTLS nor sockets.
package tunwrap
