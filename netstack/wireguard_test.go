package netstack

import (
	"crypto/ecdh"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	wgnetstack "golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// Wireguard's engine, which nobody here wrote, drives our Wrapper and link endpoint: a file
// arrives whole, both ways.
func TestWireguardEngineCarriesAFile(t *testing.T) {
	j := joinWireguard(t, 1400)
	l, err := j.listen(8080)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file := make([]byte, 24<<20+123)
	rand.Read(file)
	want := sha256.Sum256(file)
	sum := func(c net.Conn) (sum [32]byte, err error) {
		h := sha256.New()
		if _, err = io.Copy(h, c); err == nil {
			sum = [32]byte(h.Sum(nil))
		}
		return sum, err
	}
	send := func(c net.Conn) error {
		if _, err := c.Write(file); err != nil {
			return err
		}
		return c.(interface{ CloseWrite() error }).CloseWrite()
	}
	served := make(chan error, 1)
	go func() { // takes the file, then sends it back
		served <- func() error {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			defer c.Close()
			got, err := sum(c)
			if err == nil && got != want {
				err = fmt.Errorf("the file arrived with SHA-256 %x, want %x", got, want)
			}
			if err != nil {
				return err
			}
			return send(c)
		}()
	}()
	c, err := j.dial(within(t, time.Minute), "tcp", serverIP+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if err := send(c); err != nil {
		t.Fatal(err)
	}
	got, err := sum(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Errorf("the file came back with SHA-256 %x, want %x", got, want)
	}
}

// joinWireguard drives our Wrapper and link endpoint with wireguard's device: the same
// stack, the same superpackets, another engine.
func joinWireguard(t testing.TB, mtu int) *joined {
	var inner [2]*Node
	keys := [2]wgKey{newWGKey(t), newWGKey(t)}
	var devices [2]*device.Device
	for i := range inner {
		n, err := newInner(Config{
			PrivateKey: newKey(t), Addresses: prefixes(fmt.Sprintf("10.66.0.%d/24", i+1)), MTU: mtu,
			Peers: []Peer{{PublicKey: newKey(t).Public(), AllowedIPs: prefixes("10.66.0.0/24")}},
		})
		if err != nil {
			t.Fatal(err)
		}
		n.peers = n.cfg.Peers
		n.applyAllowed()
		n.wrapper = tunwrap.New(n.link, tunwrap.Options{MTU: mtu})
		devices[i] = device.NewDevice(n.wrapper, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
		inner[i] = n
		t.Cleanup(func() { devices[i].Close(); n.Close() })
	}
	connectWG(t, devices, keys)
	return &joined{
		node: inner[0],
		dial: inner[0].Dial,
		listen: func(port int) (net.Listener, error) {
			return inner[1].Listen("tcp", fmt.Sprintf("%s:%d", serverIP, port))
		},
		packet: func(port int) (net.PacketConn, error) {
			return inner[1].ListenPacket("udp", fmt.Sprintf("%s:%d", serverIP, port))
		},
	}
}

// joinWireguardNetstack is what a Go program gets from wireguard-go alone.
func joinWireguardNetstack(t testing.TB, mtu int) *joined {
	keys := [2]wgKey{newWGKey(t), newWGKey(t)}
	var devices [2]*device.Device
	var nets [2]*wgnetstack.Net
	for i := range devices {
		tun, tnet, err := wgnetstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.66.0.%d", i+1))}, nil, mtu)
		if err != nil {
			t.Fatal(err)
		}
		devices[i], nets[i] = device.NewDevice(tun, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, "")), tnet
		t.Cleanup(devices[i].Close)
	}
	connectWG(t, devices, keys)
	return &joined{
		dial: nets[0].DialContext,
		listen: func(port int) (net.Listener, error) {
			return nets[1].ListenTCP(&net.TCPAddr{IP: net.ParseIP(serverIP), Port: port})
		},
		packet: func(port int) (net.PacketConn, error) {
			return nets[1].ListenUDP(&net.UDPAddr{IP: net.ParseIP(serverIP), Port: port})
		},
	}
}

// wgKey is a WireGuard key pair in the hexadecimal of its configuration protocol.
type wgKey struct{ private, public string }

func newWGKey(t testing.TB) wgKey {
	t.Helper()
	k := newKey(t)
	text, err := k.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	return wgKey{hex.EncodeToString(raw), hex.EncodeToString(private.PublicKey().Bytes())}
}

// connectWG makes the two devices each other's peer over loopback.
func connectWG(t testing.TB, devices [2]*device.Device, keys [2]wgKey) {
	t.Helper()
	port := func(d *device.Device) string {
		state, err := d.IpcGet()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(state) {
			if p, ok := strings.CutPrefix(strings.TrimSpace(line), "listen_port="); ok {
				return p
			}
		}
		t.Fatal("the device has no port")
		return ""
	}
	for i, d := range devices {
		if err := d.IpcSet("private_key=" + keys[i].private + "\nlisten_port=0\n"); err != nil {
			t.Fatal(err)
		}
		if err := d.Up(); err != nil {
			t.Fatal(err)
		}
	}
	for i, d := range devices {
		other := 1 - i
		err := d.IpcSet(fmt.Sprintf("public_key=%s\nallowed_ip=10.66.0.%d/32\nendpoint=127.0.0.1:%s\n",
			keys[other].public, other+1, port(devices[other])))
		if err != nil {
			t.Fatal(err)
		}
	}
}
