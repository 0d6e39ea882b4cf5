package netstack

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// A loadEnd is one end of a transfer whose other end is another process, in JSON in the
// environment: .ci/bench-tun compares a node with wireguard's engine over the same stack and
// wrapper, each with an interface of its kernel as the other end.
type loadEnd struct {
	Engine   string // "penstock" or "wireguard-go"
	Key      string // the private key: base64 for penstock, hexadecimal for wireguard-go
	Peer     string // the peer's public key, likewise
	Endpoint string // of the peer
	Port     uint16 // this end's, of UDP
	Address  string // of this end inside, with its prefix length
	Send     string // send to this address; "": receive one connection
	Listen   string // where to receive, an address inside
	Seconds  int
}

const loadEnv = "PENSTOCK_LOAD_END"

// TestLoadEnd is no test but a program for the script named above. It prints bytes, seconds and
// the process's processor seconds.
func TestLoadEnd(t *testing.T) {
	text := os.Getenv(loadEnv)
	if text == "" {
		t.Skip("only for .ci/bench-tun")
	}
	var e loadEnd
	if err := json.Unmarshal([]byte(text), &e); err != nil {
		t.Fatal(err)
	}
	var n *Node
	switch e.Engine {
	case "penstock":
		n = e.penstock(t)
	case "wireguard-go":
		n = e.wireguard(t)
	default:
		t.Fatalf("engine %q", e.Engine)
	}
	var bytes int64
	var began time.Time
	var cpu time.Duration
	start := func() { began, cpu = time.Now(), processTime(t) }
	ctx := within(t, time.Minute)
	if e.Send != "" {
		c, err := n.Dial(ctx, "tcp", e.Send)
		if err != nil {
			t.Fatal(err)
		}
		start()
		buf := make([]byte, defaultWrite)
		for end := began.Add(time.Duration(e.Seconds) * time.Second); time.Now().Before(end); {
			c.SetDeadline(end.Add(10 * time.Second))
			k, err := c.Write(buf)
			if bytes += int64(k); err != nil {
				t.Fatal(err)
			}
		}
		// All has arrived when the other end has closed.
		if err := c.(*TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, c)
		c.Close()
	} else {
		bytes = e.receive(t, ctx, n, start)
	}
	took := time.Since(began)
	fmt.Printf("load: %d %.3f %.3f\n", bytes, took.Seconds(), (processTime(t) - cpu).Seconds())
}

// receive counts what one connection brings.
func (e *loadEnd) receive(t *testing.T, ctx context.Context, n *Node, start func()) (bytes int64) {
	l, err := n.Listen("tcp", e.Listen)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	fmt.Println("load: ready")
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start()
	for buf := make([]byte, 256<<10); ; {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		k, err := c.Read(buf)
		if bytes += int64(k); err == io.EOF {
			return bytes
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

func (e *loadEnd) config(t *testing.T) Config {
	return Config{
		Addresses: prefixes(e.Address),
		Peers:     []Peer{{Name: "peer", Endpoint: e.Endpoint, AllowedIPs: []netip.Prefix{prefixes(e.Address)[0].Masked()}}},
	}
}

func (e *loadEnd) penstock(t *testing.T) *Node {
	cfg := e.config(t)
	cfg.Listen = []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), e.Port)}
	if err := cfg.PrivateKey.UnmarshalText([]byte(e.Key)); err != nil {
		t.Fatal(err)
	}
	if err := cfg.Peers[0].PublicKey.UnmarshalText([]byte(e.Peer)); err != nil {
		t.Fatal(err)
	}
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	if err := n.WaitEstablished(within(t, 20*time.Second), cfg.Peers[0].PublicKey); err != nil {
		t.Fatal(err)
	}
	return n
}

// wireguard is joinWireguard's, with the other end elsewhere.
func (e *loadEnd) wireguard(t *testing.T) *Node {
	cfg := e.config(t)
	cfg.MTU = device.DefaultMTU
	cfg.PrivateKey, cfg.Peers[0].PublicKey = newKey(t), newKey(t).Public() // not used
	n, err := newInner(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n.peers = n.cfg.Peers
	n.applyAllowed()
	n.wrapper = tunwrap.New(n.link, tunwrap.Options{MTU: device.DefaultMTU})
	// The other end may still have a session with who was here before: the keepalive makes a new one
	// at once.
	d := device.NewDevice(n.wrapper, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	t.Cleanup(func() { d.Close(); n.Close() })
	err = d.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\npublic_key=%s\nallowed_ip=%s\nendpoint=%s\npersistent_keepalive_interval=10\n",
		e.Key, e.Port, e.Peer, prefixes(e.Address)[0].Masked(), e.Endpoint))
	if err == nil {
		err = d.Up()
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}
