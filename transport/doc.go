// Package transport carries IP packets between peers as DTLS 1.2 records in
// UDP datagrams. It is the outer half of the path:
//
//	app ─ netstack ─ linkep ─ tunwrap ─ transport ─ UDP
//
// Outbound it reads finished packets from a [Device], finds the peer whose
// allowed prefixes cover the destination, seals each packet in place as one
// record and hands runs of equal-sized records to a [PacketConn] as one send.
// Inbound it opens records in place, checks them against the replay window and
// against the peer's allowed prefixes, and writes the packets to the Device.
//
// The handshake is pion's; everything after it is here. The package does not
// know gVisor, virtio or NAT.
package transport
