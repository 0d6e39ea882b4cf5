package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A hostSocket is a connected UDP or ICMP socket of the system, of which the kernel
// tells what the network says about its datagrams (IP_RECVERR, ip(7)).
type hostSocket struct {
	io.Closer
	raw      syscall.RawConn
	v6       bool
	echo     bool   // an ICMP socket
	ident    uint16 // of a raw ICMP socket, which hears the replies to others too
	rawEcho  bool
	receiver func() (*burst, error)

	mu          sync.Mutex
	set         bool // ttl and mayFragment are the socket's
	ttl         uint8
	mayFragment bool
	datagram    []byte // of the send under way
	result      error
	control     func(fd uintptr)
}

func newHostSocket(c io.Closer, raw syscall.RawConn, v6 bool) *hostSocket {
	s := &hostSocket{Closer: c, raw: raw, v6: v6}
	s.receiver = rawBurstReader(raw)
	s.control = s.sendOn
	raw.Control(func(fd uintptr) {
		if v6 {
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVERR, 1)
		} else {
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVERR, 1)
		}
	})
	return s
}

// newUDPFlowSocket takes c if it is a UDP socket of the system; nil otherwise.
func newUDPFlowSocket(c net.Conn) flowSocket {
	u, ok := c.(*net.UDPConn)
	if !ok {
		return nil
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil
	}
	return newHostSocket(u, raw, u.RemoteAddr().(*net.UDPAddr).AddrPort().Addr().Unmap().Is6())
}

// send implements flowSocket.
func (s *hostSocket) send(b []byte, ttl uint8, mayFragment bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rawEcho {
		binary.BigEndian.PutUint16(b[4:], s.ident)
		if !s.v6 { // the kernel sums ICMPv6 itself (RFC 3542 3.1)
			m := header.ICMPv4(b)
			m.SetChecksum(0)
			m.SetChecksum(^checksum.Checksum(m, 0))
		}
	}
	change := !s.set || s.ttl != ttl || s.mayFragment != mayFragment
	s.set, s.ttl, s.mayFragment = !change, ttl, mayFragment
	s.datagram = b
	err := s.raw.Control(s.control)
	s.datagram = nil
	if err != nil {
		return err
	}
	return s.result
}

// sendOn sends s.datagram. s.mu is held.
func (s *hostSocket) sendOn(fd uintptr) {
	if !s.set {
		s.set = true
		if s.v6 {
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, int(s.ttl))
		} else {
			discover := unix.IP_PMTUDISC_DO
			if s.mayFragment {
				discover = unix.IP_PMTUDISC_DONT
			}
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TTL, int(s.ttl))
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_MTU_DISCOVER, discover)
		}
	}
	_, s.result = ignoringEINTR(func() (int, error) {
		return unix.SendmsgN(int(fd), s.datagram, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	})
}

// receive implements flowSocket.
func (s *hostSocket) receive() (*burst, error) {
	for {
		b, err := s.receiver()
		if err != nil {
			if errors.Is(err, os.ErrClosed) {
				err = net.ErrClosed
			}
			return nil, err
		}
		if !s.echo {
			return b, nil
		}
		if s.keepReplies(b); b.n > 0 {
			return b, nil
		}
		bursts.Put(b)
	}
}

// keepReplies leaves in b the echo replies that are for this socket, without IP
// headers.
func (s *hostSocket) keepReplies(b *burst) {
	kept := 0
	for _, d := range b.datagrams[:b.n] {
		if s.rawEcho && !s.v6 { // raw(7): with its IP header
			if len(d) < header.IPv4MinimumSize || len(d) < int(header.IPv4(d).HeaderLength()) {
				continue
			}
			d = d[header.IPv4(d).HeaderLength():]
		}
		if len(d) < echoHeader || d[0] != echoTypes(s.v6)[1] || s.rawEcho && binary.BigEndian.Uint16(d[4:]) != s.ident {
			continue
		}
		b.datagrams[kept] = d
		kept++
	}
	b.n = kept
}

// troubles implements flowSocket: it empties the error queue.
func (s *hostSocket) troubles() (told []trouble) {
	head := make([]byte, 128)
	oob := make([]byte, 512)
	s.raw.Control(func(fd uintptr) {
		for range 64 {
			n, oobn, _, _, err := unix.Recvmsg(int(fd), head, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			if t, ok := s.parseTrouble(oob[:oobn]); ok {
				t.head = append([]byte(nil), head[:n]...)
				told = append(told, t)
			}
		}
	})
	return told
}

// parseTrouble reads struct sock_extended_err and the address of the offender behind
// it (linux/errqueue.h).
func (s *hostSocket) parseTrouble(oob []byte) (t trouble, ok bool) {
	const extendedErr = 16
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return t, false
	}
	for _, m := range messages {
		is4 := m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVERR
		is6 := m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if !is4 && !is6 || len(m.Data) < extendedErr {
			continue
		}
		errno := syscall.Errno(binary.NativeEndian.Uint32(m.Data))
		origin, kind, code := m.Data[4], m.Data[5], m.Data[6]
		info := binary.NativeEndian.Uint32(m.Data[8:])
		offender := m.Data[extendedErr:]
		switch origin {
		case unix.SO_EE_ORIGIN_LOCAL:
			if errno == unix.EMSGSIZE {
				return trouble{what: errTooBig(info)}, true
			}
			what, known := errorOf(failureOf(errno))
			return trouble{what: what}, known
		case unix.SO_EE_ORIGIN_ICMP:
			t.what = icmpError{type4: kind, code4: code}
			if kind == 3 && code == 4 {
				t.what.mtu = info
			}
			if len(offender) >= 8 && binary.NativeEndian.Uint16(offender) == unix.AF_INET {
				t.what.from = stackAddr(netip.AddrFrom4([4]byte(offender[4:8])))
			}
			return t, true
		case unix.SO_EE_ORIGIN_ICMP6:
			t.what = icmpError{type6: kind, code6: code}
			if kind == 2 {
				t.what.mtu = info
			}
			if len(offender) >= 24 && binary.NativeEndian.Uint16(offender) == unix.AF_INET6 {
				t.what.from = stackAddr(netip.AddrFrom16([16]byte(offender[8:24])))
			}
			return t, true
		}
	}
	return t, false
}

// probeEcho tells how echo requests of a family can be sent.
func probeEcho(v6 bool) echoAbility {
	unprivileged, err := echoFD(v6, false)
	if err == nil {
		unix.Close(unprivileged)
		return echoAbility{}
	}
	raw, rawErr := echoFD(v6, true)
	if rawErr == nil {
		unix.Close(raw)
		return echoAbility{raw: true}
	}
	if errors.Is(err, unix.EACCES) && errors.Is(rawErr, unix.EPERM) {
		err = errors.New("net.ipv4.ping_group_range does not include a group of this process, which has no CAP_NET_RAW either")
	} else {
		err = fmt.Errorf("unprivileged socket: %w; raw socket: %w", err, rawErr)
	}
	return echoAbility{err: err}
}

func echoFD(v6, raw bool) (int, error) {
	family, proto, kind := unix.AF_INET, unix.IPPROTO_ICMP, unix.SOCK_DGRAM
	if v6 {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	if raw {
		kind = unix.SOCK_RAW
	}
	return unix.Socket(family, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
}

// openEcho makes a socket that pings dst.
func openEcho(dst netip.Addr, raw, onRouter bool) (flowSocket, error) {
	fd, err := echoFD(dst.Is6(), raw)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{}
	if dst.Is6() {
		to = &unix.SockaddrInet6{Addr: dst.As16()}
	} else {
		to.(*unix.SockaddrInet4).Addr = dst.As4()
	}
	if err := unix.Connect(fd, to); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	if local, err := unix.Getsockname(fd); !onRouter && err == nil && sockaddrIP(local) == dst {
		unix.Close(fd)
		return nil, refusedRouterItself
	}
	file := os.NewFile(uintptr(fd), "icmp") // takes fd, and waits with the runtime's poller
	conn, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, err
	}
	s := newHostSocket(file, conn, dst.Is6())
	s.echo, s.rawEcho = true, raw
	s.ident = uint16(rand.Uint32())
	return s, nil
}

func sockaddrIP(a unix.Sockaddr) netip.Addr {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(a.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(a.Addr)
	}
	return netip.Addr{}
}
