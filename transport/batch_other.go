//go:build !linux

package transport

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"
)

// socketPlatform is the plain half of a [UDPSocket], for systems without batch
// system calls: every datagram is a system call.
type socketPlatform struct{}

var errEmptyBatch = errors.New("ReadBatch: empty batch")

// beforeBind refuses what only Linux has: an option asked for by name is kept
// or is an error.
func (o *SocketOptions) beforeBind(uintptr) error {
	for _, unsupported := range []struct {
		asked bool
		name  string
	}{
		{o.ReusePort, "ReusePort"},
		{o.Mark != 0, "Mark"},
		{o.MaxPacingRate != 0, "MaxPacingRate"},
	} {
		if unsupported.asked {
			return fmt.Errorf("option %s: %w on %s", unsupported.name, errors.ErrUnsupported, runtime.GOOS)
		}
	}
	return nil
}

// open sets the options of a bound socket.
func (s *UDPSocket) open(opts SocketOptions) error {
	raw, err := s.conn.SyscallConn()
	if err != nil {
		return err
	}
	absent := abilityOff("not on " + runtime.GOOS)
	c := Capabilities{
		GSO: absent, GRO: absent, MessageBatches: absent, SourceAddress: absent,
		MaxSegments: 1, MaxBytes: MaxRunBytes,
	}
	if opts.MaxBytes > 0 {
		c.MaxBytes = min(opts.MaxBytes, MaxRunBytes)
	}
	growBuffer(s.conn.SetReadBuffer, opts.ReceiveBuffer)
	growBuffer(s.conn.SetWriteBuffer, opts.SendBuffer)
	if err := raw.Control(func(fd uintptr) {
		c.DontFragment = abilityOff(reasonConfigured)
		if !opts.MayFragment {
			c.DontFragment = setDontFragment(fd, s.local.Addr())
		}
		c.ReceiveBuffer, c.SendBuffer = bufferSizes(fd)
	}); err != nil {
		return err
	}
	s.caps.update(func(now *Capabilities) { *now = c })
	return nil
}

// growBuffer asks for want bytes, and for less while the system refuses: the
// BSDs do not cut a request to their limit.
func growBuffer(set func(int) error, want int) {
	if want == 0 {
		want = DefaultSocketBuffer
	}
	for ; want >= 64<<10; want /= 2 {
		if set(want) == nil {
			return
		}
	}
}

// WriteBatch implements [PacketConn]. Any number of goroutines may be in it.
func (s *UDPSocket) WriteBatch(runs []Run) (int, error) {
	var datagrams, bytes, tries int
	var err error
	n := 0
send:
	for ; n < len(runs); n++ {
		for i, segment := range runs[n].Segments {
			tries++
			if _, err = s.conn.WriteToUDPAddrPort(segment, runs[n].Remote); err != nil {
				err = s.sendError(err, len(runs[n].Segments)-i)
				break send
			}
			datagrams++
			bytes += len(segment)
		}
	}
	addTo(&s.stats.sends, tries)
	addTo(&s.stats.messages, datagrams)
	addTo(&s.stats.runs, n)
	addTo(&s.stats.datagramsOut, datagrams)
	addTo(&s.stats.bytesOut, bytes)
	return n, err
}

// sendError makes the error of a run that was given up, and counts its datagrams.
func (s *UDPSocket) sendError(err error, datagrams int) error {
	switch {
	case errors.Is(err, net.ErrClosed):
		return net.ErrClosed
	case errors.Is(err, errMessageTooBig):
		addTo(&s.stats.dropTooBig, datagrams)
		return ErrDatagramTooBig
	case errors.Is(err, syscall.ENOBUFS):
		addTo(&s.stats.dropNoBuffers, datagrams)
	default:
		addTo(&s.stats.dropSendError, datagrams)
	}
	return err
}

// ReadBatch implements [PacketConn]; it fills one element. One goroutine may be
// in it.
func (s *UDPSocket) ReadBatch(batch []Inbound) (int, error) {
	if len(batch) == 0 {
		return 0, errEmptyBatch
	}
	in := &batch[0]
	for {
		n, _, flags, remote, err := s.conn.ReadMsgUDPAddrPort(in.Buf[:cap(in.Buf)], nil)
		addTo(&s.stats.receives, 1)
		switch {
		case errors.Is(err, net.ErrClosed):
			return 0, net.ErrClosed
		case errors.Is(err, errMessageTooBig) || flags&messageTruncated != 0:
			addTo(&s.stats.dropTruncated, 1)
			continue
		case err != nil:
			return 0, err
		}
		in.Remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
		in.Local = netip.Addr{}
		if local := s.local.Addr(); !local.IsUnspecified() {
			in.Local = local
		}
		var tally inboundTally
		tally.fill(in, n, 0)
		tally.count(&s.stats)
		return 1, nil
	}
}
