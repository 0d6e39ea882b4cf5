package netstack

import (
	"net"
	"net/netip"

	"github.com/penstock-vpn/penstock/transport"
)

// A systemFront is a UDP socket of the system: the tunnel's own kind, since that
// batches and knows which address a client asked.
type systemFront struct {
	conn  transport.PacketConn
	batch []transport.Inbound
}

// frontBatch times 64 KiB is what a forward of UDP holds to receive into.
const frontBatch = 4

func newSystemFront(conn transport.PacketConn) *systemFront {
	f := &systemFront{conn: conn, batch: make([]transport.Inbound, frontBatch)}
	for i := range f.batch {
		f.batch[i].Buf = make([]byte, 64<<10) // never truncates, coalesced or not
	}
	return f
}

func (f *systemFront) receive(take func(udpClient, []byte)) error {
	n, err := f.conn.ReadBatch(f.batch)
	for i := range f.batch[:n] {
		in := &f.batch[i]
		from := udpClient{in.Remote, in.Local}
		rest := in.Buf[:in.N]
		for {
			size := min(in.SegmentSize, len(rest))
			take(from, rest[:size:size])
			if rest = rest[size:]; len(rest) == 0 {
				break // after one, if it is empty
			}
		}
	}
	return err
}

func (f *systemFront) reply(to udpClient, b *burst) (datagrams, bytes int) {
	datagrams, bytes = b.n, b.used
	for runs := b.toRuns(to.remote, to.local); len(runs) > 0; {
		n, err := f.conn.WriteBatch(runs)
		if err == nil {
			break
		}
		if n < len(runs) { // this one is lost, those after it were not tried
			datagrams -= len(runs[n].Segments)
			for _, d := range runs[n].Segments {
				bytes -= len(d)
			}
			n++
		}
		runs = runs[n:]
	}
	return datagrams, bytes
}

func (f *systemFront) localAddr() net.Addr { return net.UDPAddrFromAddrPort(f.conn.LocalAddr()) }
func (f *systemFront) Close() error        { return f.conn.Close() }

// A vpnFront is a UDP socket of the node, bound to one address, which it answers
// from.
type vpnFront struct {
	conn vpnPacketConn
	buf  []byte
}

// vpnPacketConn is what a vpnFront needs of a *UDPConn.
type vpnPacketConn interface {
	net.PacketConn
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
}

func newVPNFront(conn vpnPacketConn) *vpnFront {
	return &vpnFront{conn: conn, buf: make([]byte, maxDatagram)}
}

func (f *vpnFront) receive(take func(udpClient, []byte)) error {
	n, from, err := f.conn.ReadFromUDPAddrPort(f.buf)
	if err != nil {
		return err
	}
	take(udpClient{remote: from}, f.buf[:n:n])
	return nil
}

func (f *vpnFront) reply(to udpClient, b *burst) (datagrams, bytes int) {
	for _, d := range b.datagrams[:b.n] {
		if _, err := f.conn.WriteToUDPAddrPort(d, to.remote); err == nil {
			datagrams++
			bytes += len(d)
		}
	}
	return datagrams, bytes
}

func (f *vpnFront) localAddr() net.Addr { return f.conn.LocalAddr() }
func (f *vpnFront) Close() error        { return f.conn.Close() }
