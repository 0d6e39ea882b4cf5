package netstack

import (
	"bytes"
	"crypto/rand"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestOuterIPv6: the datagrams travel over IPv6, the packets in them are IPv4 and IPv6.
func TestOuterIPv6(t *testing.T) {
	if c, err := net.ListenPacket("udp", "[::1]:0"); err != nil {
		t.Skipf("SKIPPED, NOT TESTED: no IPv6 here: %v", err)
	} else {
		c.Close()
	}
	a, b := pair(t, func(a, b *Config) {
		for _, c := range []*Config{a, b} {
			c.Listen = []netip.AddrPort{netip.MustParseAddrPort("[::1]:0")}
		}
	})
	if remote := a.Status().Tunnel.Peers[0].Remote; !remote.Addr().Is6() {
		t.Fatalf("the peer is at %v", remote)
	}
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(c, c)
				c.Close()
			}()
		}
	}()
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	for _, to := range []string{"10.66.0.2:80", "[fd66::2]:80"} {
		c, err := a.Dial(within(t, 10*time.Second), "tcp", to)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(30 * time.Second))
		go func() {
			c.Write(sent)
			c.(*TCPConn).CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%s: %d bytes came back of %d, %v", to, len(got), len(sent), err)
		}
		c.Close()
	}
	l.Close()
}
