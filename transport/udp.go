package transport

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
)

// SocketOptions shape a [UDPSocket]. The zero value asks for everything the
// kernel can do.
type SocketOptions struct {
	// DisableGSO sends every segment as a message of its own. Besides measuring,
	// it is the way out on kernels and guests that corrupt segmented sends (Linux
	// 7.0 to 7.1.4); the far side then counts records that fail to open.
	DisableGSO bool
	// DisableGRO receives every datagram in a buffer of its own.
	DisableGRO bool

	// ReceiveBuffer and SendBuffer are the kernel's queues in bytes. 0 asks for
	// [DefaultSocketBuffer]; negative leaves what the system gives. What was
	// granted is in [Capabilities]; a smaller grant is not an error.
	ReceiveBuffer, SendBuffer int

	// MaxSegments and MaxBytes cap one segmented message, and with it the burst
	// that leaves at line rate; a longer [Run] is split. 0 means what the kernel
	// was probed to take, and [MaxRunBytes].
	MaxSegments, MaxBytes int

	// MaxPacingRate in bytes per second is given to SO_MAX_PACING_RATE, which the
	// fq queueing discipline enforces. 0 does not pace. Linux only.
	MaxPacingRate uint64

	// ReusePort lets several sockets share the address, the kernel spreading
	// remote addresses over them (SO_REUSEPORT). Linux only.
	ReusePort bool

	// V6Only keeps a socket on [::] from taking IPv4 too, so that 0.0.0.0 can
	// be bound to the same port beside it.
	V6Only bool

	// MayFragment leaves datagrams larger than the path to be fragmented, as the system
	// does by default. A tunnel wants to learn of them instead; a socket that stands
	// in for another program's does not.
	MayFragment bool

	// Mark is the SO_MARK of everything sent, for policy routing; 0 sets none.
	// It needs CAP_NET_ADMIN. Linux only.
	Mark uint32

	Logger *slog.Logger // told once when an offload is withdrawn; nil: discarded
}

// MarkControl is a net.Dialer.Control that sets SO_MARK, for connections that are to take the way of the
// tunnel's datagrams; nil for mark 0. The dial fails where [SocketOptions].Mark would.
func MarkControl(mark uint32) func(network, address string, c syscall.RawConn) error {
	if mark == 0 {
		return nil
	}
	o := SocketOptions{Mark: mark}
	return func(_, _ string, c syscall.RawConn) error {
		var optErr error
		if err := c.Control(func(fd uintptr) { optErr = o.beforeBind(fd) }); err != nil {
			return err
		}
		return optErr
	}
}

// DefaultSocketBuffer is asked for in each direction, in bytes. The usual
// default of 208 KiB is three full runs; 8 MiB holds about 10 ms of 6 Gbit/s.
const DefaultSocketBuffer = 8 << 20

// A UDPSocket is a [PacketConn] over one UDP socket.
type UDPSocket struct {
	conn   *net.UDPConn
	local  netip.AddrPort
	logger *slog.Logger

	stats counters
	caps  capabilityState

	closeOnce sync.Once
	closeErr  error

	socketPlatform
}

var _ PacketConn = (*UDPSocket)(nil)

// ListenUDP binds addr and probes what the kernel can do. An IPv4 address gives
// an IPv4 socket, an IPv6 address an IPv6 one, and [::] one that takes both
// unless opts.V6Only is set. Port 0 lets the system choose.
func ListenUDP(addr netip.AddrPort, opts SocketOptions) (*UDPSocket, error) {
	s, err := listenUDP(addr, opts)
	if err != nil {
		return nil, fmt.Errorf("listen udp %v: %w", addr, err)
	}
	return s, nil
}

func listenUDP(addr netip.AddrPort, opts SocketOptions) (*UDPSocket, error) {
	if !addr.Addr().IsValid() {
		return nil, errors.New("not an IP address and port")
	}
	if err := opts.check(); err != nil {
		return nil, err
	}
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var optErr error
		if err := c.Control(func(fd uintptr) { optErr = opts.beforeBind(fd) }); err != nil {
			return err
		}
		return optErr
	}}
	pc, err := lc.ListenPacket(context.Background(), udpNetwork(addr.Addr(), opts.V6Only), addr.String())
	if err != nil {
		return nil, bindError(err, addr)
	}
	conn := pc.(*net.UDPConn)
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	s := &UDPSocket{
		conn:   conn,
		local:  netip.AddrPortFrom(local.Addr().Unmap(), local.Port()),
		logger: opts.Logger,
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if err := s.open(opts); err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

func (o *SocketOptions) check() error {
	if o.MaxSegments < 0 || o.MaxBytes < 0 {
		return fmt.Errorf("MaxSegments %d and MaxBytes %d must not be negative", o.MaxSegments, o.MaxBytes)
	}
	return nil
}

// udpNetwork never returns "udp" for an IPv4 address: the net package would make
// a dual-stack socket of 0.0.0.0.
func udpNetwork(a netip.Addr, v6only bool) string {
	switch {
	case a.Is4():
		return "udp4"
	case a.IsUnspecified() && !v6only:
		return "udp"
	default:
		return "udp6"
	}
}

// bindError strips what ListenUDP says itself (operation and address) and adds
// what is likely to help.
func bindError(err error, addr netip.AddrPort) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && addr.Addr().IsUnspecified():
		return fmt.Errorf("%w (another program has the port, or 0.0.0.0 and [::] are both asked for without V6Only)", err)
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w (another program has the port)", err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w (no interface here has that address)", err)
	case errors.Is(err, syscall.EAFNOSUPPORT) && addr.Addr().Is6():
		return fmt.Errorf("%w (IPv6 is switched off on this system)", err)
	case errors.Is(err, syscall.EACCES) && addr.Port() < 1024:
		return fmt.Errorf("%w (ports below 1024 need a privilege)", err)
	}
	return err
}

// LocalAddr is the address bound, with the port chosen by the system.
func (s *UDPSocket) LocalAddr() netip.AddrPort { return s.local }

// Capabilities tells what the kernel does for this socket now. Safe from any
// goroutine.
func (s *UDPSocket) Capabilities() Capabilities { return s.caps.snapshot() }

// Stats is a snapshot of the counters. Safe from any goroutine, also after Close.
func (s *UDPSocket) Stats() SocketStats { return s.stats.snapshot() }

// Close wakes ReadBatch and any WriteBatch that waits, and frees the port. It
// may be called twice and from any goroutine.
func (s *UDPSocket) Close() error {
	s.closeOnce.Do(func() { s.closeErr = s.conn.Close() })
	return s.closeErr
}
