package netstack

import (
	"crypto/rand"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// floodRate is the datagrams a second of the flood, half of them hellos, half garbage.
const floodRate = 20000

// BenchmarkTunnelUnderFlood measures what a live transfer loses while strangers at thousands of
// addresses send forged hellos and garbage to both nodes. The flood is made in this process, and
// its processor time counts.
func BenchmarkTunnelUnderFlood(b *testing.B) {
	for _, flood := range []string{"off", "on"} {
		b.Run("flood="+flood, func(b *testing.B) {
			x, y := pair(b, func(x, y *Config) { x.MTU, y.MTU = 1400, 1400 })
			j := &joined{
				dial:   x.Dial,
				listen: func(int) (net.Listener, error) { return y.Listen("tcp", serverIP+":8080") },
			}
			if flood == "off" {
				benchTCP(b, j, 1, defaultWrite)
				return
			}
			sent := 0
			var wg sync.WaitGroup
			stop := make(chan struct{})
			hello := aHello(b)
			wg.Go(func() { sent = floodNodes(b, stop, hello, x.LocalAddrs()[0], y.LocalAddrs()[0]) })
			benchTCP(b, j, 1, defaultWrite)
			close(stop)
			wg.Wait()
			st := y.Status().Tunnel
			b.Logf("%d sent; half-open %d; drops %v", sent, st.HalfOpen, st.Drops)
		})
	}
}

// aHello is a genuine first ClientHello.
func aHello(t testing.TB) []byte {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := start(t, Config{
		PrivateKey: newKey(t), Addresses: prefixes("10.66.0.9/24"),
		Peers: []Peer{{PublicKey: newKey(t).Public(), Endpoint: c.LocalAddr().String()}},
	})
	defer n.Close()
	buf := make([]byte, 2048)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	k, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:k]
}

// floodNodes sends from 127.x.y.z addresses, a new one for every burst, until stop.
func floodNodes(t testing.TB, stop chan struct{}, hello []byte, nodes ...netip.AddrPort) (sent int) {
	const burst, randomAt = 20, 13 + 12 + 2 // of the client's random in a ClientHello
	garbage := make([]byte, 300)
	tick := time.NewTicker(burst * time.Second / floodRate)
	defer tick.Stop()
	var ip [4]byte
	for {
		select {
		case <-stop:
			return sent
		case <-tick.C:
		}
		rand.Read(ip[:])
		ip[0], ip[3] = 127, ip[3]|1
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: ip[:]})
		if err != nil {
			t.Error(err)
			return sent
		}
		for i := range burst {
			d := hello
			if i%2 == 0 {
				rand.Read(d[randomAt : randomAt+32])
			} else {
				rand.Read(garbage)
				// A record of data, as far as anybody without keys can tell.
				copy(garbage, []byte{23, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0})
				binary.BigEndian.PutUint16(garbage[11:], uint16(len(garbage)-13))
				d = garbage
			}
			if _, err := c.WriteToUDPAddrPort(d, nodes[i/2%len(nodes)]); err == nil {
				sent++
			}
		}
		c.Close()
	}
}
