package netstack

import (
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"
)

// SOCKS5 is small, and the libraries that were looked at lack what matters here: the best
// (things-go/go-socks5 v0.1.0) has no deadline anywhere, takes datagrams from anybody, and
// never forgets a UDP flow.

const socksVersion = 5

// RFC 1928 3 and RFC 1929.
const (
	socksNoAuth       = 0x00
	socksPassword     = 0x02
	socksNoAcceptable = 0xff
	socksAuthVersion  = 1
)

// RFC 1928 4.
const (
	socksConnect   = 1
	socksAssociate = 3

	socksIPv4 = 1
	socksName = 3
	socksIPv6 = 4
)

// A socksReply is a code of RFC 1928 6.
type socksReply byte

const (
	socksSucceeded          socksReply = 0
	socksFailure            socksReply = 1
	socksNotAllowed         socksReply = 2
	socksNetworkUnreachable socksReply = 3
	socksHostUnreachable    socksReply = 4
	socksRefused            socksReply = 5
	socksNoSuchCommand      socksReply = 7
	socksNoSuchAddressType  socksReply = 8
)

// replyOf says why a service cannot be reached.
func replyOf(err error) socksReply {
	var de *net.DNSError
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return socksRefused
	case errors.Is(err, syscall.ENETUNREACH):
		return socksNetworkUnreachable
	case errors.Is(err, syscall.EHOSTUNREACH), errors.As(err, &de), timedOut(err):
		return socksHostUnreachable
	case errors.Is(err, syscall.EACCES):
		return socksNotAllowed
	}
	return socksFailure
}

var (
	errSocksGarbage  = errors.New("SOCKS5: not a request")
	errSocksMethods  = errors.New("SOCKS5: the client offers no way to authenticate that is wanted")
	errSocksPassword = errors.New("SOCKS5: wrong user or password")
	errSocksAddress  = errors.New("SOCKS5: an address of an unknown type")
	errSocksFull     = errors.New("SOCKS5: too many UDP associations")
)

// socksAddr is where a client wants to: an address or a name.
type socksAddr struct {
	ip   netip.Addr // not valid for a name
	name string
	port uint16
}

func (a socksAddr) String() string {
	host := a.name
	if a.ip.IsValid() {
		host = a.ip.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(a.port)))
}

// parseSocksAddr reads an address from its type byte on, and tells how many bytes it takes.
// The name is a copy.
func parseSocksAddr(b []byte) (a socksAddr, size int, err error) {
	if len(b) < 2 {
		return a, 0, errSocksGarbage
	}
	host := b[1:]
	switch b[0] {
	case socksIPv4:
		size = 4
	case socksIPv6:
		size = 16
	case socksName:
		size = int(b[1])
		host = b[2:]
	default:
		return a, 0, errSocksAddress
	}
	if size == 0 || len(host) < size+2 {
		return a, 0, errSocksGarbage
	}
	if b[0] == socksName {
		a.name = string(host[:size])
		if ip, err := netip.ParseAddr(a.name); err == nil && ip.Zone() == "" { // some clients write addresses so
			a.ip, a.name = ip.Unmap(), ""
		}
	} else {
		a.ip, _ = netip.AddrFromSlice(host[:size])
		a.ip = a.ip.Unmap()
	}
	a.port = binary.BigEndian.Uint16(host[size:])
	return a, len(b) - len(host) + size + 2, nil
}

// appendSocksAddr appends an address with its type byte.
func appendSocksAddr(b []byte, a netip.AddrPort) []byte {
	ip := a.Addr().Unmap()
	switch {
	case !ip.IsValid():
		ip = netip.IPv4Unspecified()
		fallthrough
	case ip.Is4():
		b = append(b, socksIPv4)
	default:
		b = append(b, socksIPv6)
	}
	b = append(b, ip.AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// socks serves a connection whose version byte has been read. Its deadline is set.
func (p *proxy) socks(f *tcpFlow) error {
	defer closeSlowly(f.client)
	if err := p.socksMethod(f.client); err != nil {
		return err
	}
	command, to, err := readSocksRequest(f.client)
	if err != nil {
		if errors.Is(err, errSocksAddress) {
			writeSocksReply(f.client, socksNoSuchAddressType, netip.AddrPort{})
		}
		return err
	}
	switch command {
	case socksConnect:
		return p.socksConnect(f, to)
	case socksAssociate:
		return p.socksAssociate(f.client, to)
	}
	writeSocksReply(f.client, socksNoSuchCommand, netip.AddrPort{})
	return fmt.Errorf("SOCKS5: command %d is not supported", command)
}

// socksMethod agrees on how to authenticate, and does it.
func (p *proxy) socksMethod(c net.Conn) error {
	offered, err := readSocksString(c)
	if err != nil {
		return err
	}
	method := byte(socksNoAuth)
	if p.o.locked() {
		method = socksPassword
	}
	found := false
	for _, m := range []byte(offered) {
		found = found || m == method
	}
	if !found {
		c.Write([]byte{socksVersion, socksNoAcceptable})
		return errSocksMethods
	}
	if _, err := c.Write([]byte{socksVersion, method}); err != nil || method == socksNoAuth {
		return err
	}
	var version [1]byte
	if _, err := io.ReadFull(c, version[:]); err != nil {
		return err
	}
	if version[0] != socksAuthVersion {
		return errSocksGarbage
	}
	user, err := readSocksString(c)
	if err != nil {
		return err
	}
	password, err := readSocksString(c)
	if err != nil {
		return err
	}
	if !p.o.admits(user, password) {
		c.Write([]byte{socksAuthVersion, 1})
		return errSocksPassword
	}
	_, err = c.Write([]byte{socksAuthVersion, 0})
	return err
}

// admits compares in constant time.
func (o *ProxyOptions) admits(user, password string) bool {
	u := subtle.ConstantTimeCompare([]byte(user), []byte(o.User))
	p := subtle.ConstantTimeCompare([]byte(password), []byte(o.Password))
	return u&p == 1
}

// readSocksString reads a length byte and as many bytes. It reads no more than that: what follows is
// for others.
func readSocksString(c net.Conn) (string, error) {
	var b [1 + 255]byte
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return "", err
	}
	s := b[1 : 1+int(b[0])]
	_, err := io.ReadFull(c, s)
	return string(s), err
}

func readSocksRequest(c net.Conn) (command byte, to socksAddr, err error) {
	var b [3 + 2 + 255 + 2]byte
	if _, err := io.ReadFull(c, b[:5]); err != nil {
		return 0, to, err
	}
	if b[0] != socksVersion {
		return 0, to, errSocksGarbage
	}
	end := 4 + 2
	switch b[3] {
	case socksIPv4:
		end += 4
	case socksIPv6:
		end += 16
	case socksName:
		end += 1 + int(b[4])
	default:
		return b[1], to, errSocksAddress
	}
	if _, err := io.ReadFull(c, b[5:end]); err != nil {
		return 0, to, err
	}
	to, _, err = parseSocksAddr(b[3:end])
	return b[1], to, err
}

func writeSocksReply(c net.Conn, code socksReply, bound netip.AddrPort) error {
	_, err := c.Write(appendSocksAddr([]byte{socksVersion, byte(code), 0}, bound))
	return err
}

// socksConnect is the CONNECT command.
func (p *proxy) socksConnect(f *tcpFlow, to socksAddr) error {
	service, err := p.dial(context.Background(), to.String())
	// The client has waited for us: its time starts anew.
	f.client.SetDeadline(time.Now().Add(p.o.HandshakeTimeout))
	if err != nil {
		writeSocksReply(f.client, replyOf(err), netip.AddrPort{})
		return err
	}
	if !f.join(service) {
		return nil
	}
	if err := writeSocksReply(f.client, socksSucceeded, addrPortOf(service.LocalAddr())); err != nil {
		reset(service)
		return err
	}
	f.client.SetDeadline(time.Time{})
	splice(f.client, service, &p.relay.count.bytesToService, &p.relay.count.bytesToClient)
	return nil
}

// addrPortOf converts an address of the net package.
func addrPortOf(a net.Addr) netip.AddrPort {
	switch a := a.(type) {
	case *net.TCPAddr:
		return unmap(a.AddrPort())
	case *net.UDPAddr:
		return unmap(a.AddrPort())
	}
	return netip.AddrPort{}
}
