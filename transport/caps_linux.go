package transport

import (
	"errors"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// beforeBind sets the options that must be there when the address is bound.
func (o *SocketOptions) beforeBind(fd uintptr) error {
	if o.ReusePort {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			return fmt.Errorf("option ReusePort: %w", os.NewSyscallError("setsockopt", err))
		}
	}
	if o.Mark != 0 {
		if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(int32(o.Mark))); err != nil {
			return fmt.Errorf("option Mark %#x (needs CAP_NET_ADMIN): %w", o.Mark, os.NewSyscallError("setsockopt", err))
		}
	}
	return nil
}

func isInet6(fd int) (bool, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return domain == unix.AF_INET6, os.NewSyscallError("getsockopt", err)
}

// setUp sets the options of a bound socket and tells what came of it. Only what
// was asked for by name and refused is an error. sourced becomes false when the
// kernel does not tell destination addresses.
func setUp(fd int, opts SocketOptions, inet6 bool, sourced *bool) (Capabilities, error) {
	var c Capabilities
	if err := setPacing(fd, opts.MaxPacingRate); err != nil {
		return c, fmt.Errorf("option MaxPacingRate: %w", os.NewSyscallError("setsockopt", err))
	}
	c.ReceiveBuffer = setBuffer(fd, opts.ReceiveBuffer, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF)
	c.SendBuffer = setBuffer(fd, opts.SendBuffer, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF)
	c.DontFragment = abilityOff(reasonConfigured)
	if !opts.MayFragment {
		c.DontFragment = ability(setDontFragment(fd, inet6))
	}
	c.MessageBatches = abilityOn() // Linux 3.0
	c.SourceAddress = abilityOn()
	if *sourced {
		c.SourceAddress = ability(setPacketInfo(fd, inet6))
		*sourced = c.SourceAddress.On
	}
	// Counting is all that is lost without it.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RXQ_OVFL, 1)
	c.GRO = setGRO(fd, opts.DisableGRO)

	c.MaxSegments, c.MaxBytes = 1, MaxRunBytes
	if opts.MaxBytes > 0 {
		c.MaxBytes = min(opts.MaxBytes, MaxRunBytes)
	}
	c.GSO, c.ProbedSegments = probeGSO(fd, opts.DisableGSO)
	if c.GSO.On {
		c.MaxSegments = max(c.ProbedSegments, MaxRunSegments)
		if opts.MaxSegments > 0 {
			c.MaxSegments = min(opts.MaxSegments, c.MaxSegments)
		}
	}
	return c, nil
}

// setBuffer asks for a queue of want bytes, past the system's limit if allowed,
// and returns what is in force.
func setBuffer(fd, want, force, plain int) int {
	if want == 0 {
		want = DefaultSocketBuffer
	}
	if want > 0 {
		want = min(want, math.MaxInt32/2) // the kernel doubles it
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, want) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, want) // cut to rmem_max or wmem_max
		}
	}
	got, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, plain)
	return got
}

// setPacing: the option takes an unsigned long since Linux 4.20, and 32 bits
// before and on 32-bit systems.
func setPacing(fd int, rate uint64) error {
	switch {
	case rate == 0:
		return nil
	case rate < math.MaxUint32: // which means no limit
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, int(int32(uint32(rate))))
	default:
		return unix.SetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, rate)
	}
}

// setDontFragment sets DF and never asks the kernel's path MTU cache, which an
// ICMP message can poison: PMTUDISC_PROBE leaves only the interface's MTU.
func setDontFragment(fd int, inet6 bool) error {
	err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
	if inet6 {
		err = errors.Join(
			os.NewSyscallError("IP_MTU_DISCOVER", err), // for mapped remotes
			os.NewSyscallError("IPV6_MTU_DISCOVER",
				unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE)))
		return err
	}
	return os.NewSyscallError("IP_MTU_DISCOVER", err)
}

// setPacketInfo asks for destination addresses. An AF_INET6 socket tells those
// of IPv4 datagrams in IPV6_PKTINFO, mapped.
func setPacketInfo(fd int, inet6 bool) error {
	if inet6 {
		return os.NewSyscallError("IPV6_RECVPKTINFO", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1))
	}
	return os.NewSyscallError("IP_PKTINFO", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_PKTINFO, 1))
}

func setGRO(fd int, disabled bool) Ability {
	if disabled {
		return abilityOff(reasonConfigured)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1); err != nil {
		return ability(os.NewSyscallError("UDP_GRO", err))
	}
	// Before Linux 5.12 the option could be set but not read: trust it then.
	if v, err := unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO); err == nil && v == 0 {
		return abilityOff("UDP_GRO: set, but reads as off")
	}
	return abilityOn()
}

// probeGSO asks whether the socket knows UDP_SEGMENT and how many segments a
// message may have.
func probeGSO(fd int, disabled bool) (Ability, int) {
	if disabled {
		return abilityOff(reasonConfigured), 0
	}
	if _, err := unix.GetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT); err != nil {
		return ability(os.NewSyscallError("UDP_SEGMENT", err)), 0
	}
	a := abilityOn()
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		a.Reason = gsoCaution(unix.ByteSliceToString(uts.Release[:]))
	}
	segments, err := trySegments()
	if err != nil {
		return ability(fmt.Errorf("UDP_SEGMENT on loopback: %w", err)), 0
	}
	return a, segments
}

// trySegments sends segmented messages from a throw-away socket to itself over
// loopback. It returns the most segments that passed, 0 without an error when
// loopback cannot tell (it is down, say), or why segmentation was refused.
func trySegments() (int, error) {
	fd, to, err := loopbackSocket()
	if err != nil {
		return 0, nil
	}
	defer unix.Close(fd)
	if unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, 1) != nil {
		return 0, nil
	}
	for _, n := range []int{maxSegments, MaxRunSegments} {
		if err = unix.Sendto(fd, make([]byte, n), 0, to); err == nil {
			return n, nil
		}
	}
	if errno, ok := err.(unix.Errno); ok && gsoRefused(errno) {
		return 0, os.NewSyscallError("sendto", err)
	}
	return 0, nil
}

// loopbackSocket is bound to 127.0.0.1, or to ::1 on a host without IPv4.
func loopbackSocket() (fd int, bound unix.Sockaddr, err error) {
	for _, to := range []unix.Sockaddr{
		&unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}},
		&unix.SockaddrInet6{Addr: [16]byte{15: 1}},
	} {
		family := unix.AF_INET
		if _, ok := to.(*unix.SockaddrInet6); ok {
			family = unix.AF_INET6
		}
		fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			continue
		}
		if err = unix.Bind(fd, to); err == nil {
			if bound, err = unix.Getsockname(fd); err == nil {
				return fd, bound, nil
			}
		}
		unix.Close(fd)
	}
	return -1, nil, err
}
