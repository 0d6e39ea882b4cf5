package main

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// labPlain is labConfig without certificates, and with sessions that wait for longer.
var labPlain = strings.NewReplacer(`method = "either"`, "", `client_ca = "ca.pem"`, "", `disconnected_timeout = "8s"`, `disconnected_timeout = "60s"`).Replace(labConfig)

// TestServeStockPathMTU: openconnect finds out what the path carries, by DPD of all sizes, where the path says nothing of it.
func TestServeStockPathMTU(t *testing.T) {
	required(t, "openconnect", "curl", "ping")
	l := newLab(t)
	l.write("server.toml", labPlain)
	l.write("users", "")
	l.addUser("alice", "correct horse")
	p := l.start("serve", "-c", "server.toml")
	l.On(labServer, func() { // what is longer the client may send, and it does not arrive
		link, err := netlink.LinkByName("veth99")
		l.Check(err)
		l.Check(netlink.LinkSetMTU(link, 1400))
	})
	c := l.connect(stock.ClientOptions{Pin: p.pin(), User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default"}})
	tunnel := c.Connected(40 * time.Second)
	// IPv4, UDP, record, type: 20 + 8 + 13+8+16 + 1 bytes of 1400.
	const want = 1334
	if !tunnel.DTLS || tunnel.MTU > want || tunnel.MTU < want-16 {
		t.Errorf("MTU %d, DTLS %v; the path carries %d", tunnel.MTU, tunnel.DTLS, want)
	}
	t.Logf("MTU %d of %d", tunnel.MTU, want)
	full := fmt.Sprint(tunnel.MTU - 28)
	if out, err := l.client("ping", "-c", "2", "-i", "0.2", "-W", "5", "-M", "do", "-s", full, "10.98.0.2"); err != nil {
		t.Errorf("ping with packets of the MTU: %v\n%s", err, out)
	}
	l.downloads("10.98.0.2", 100000)
	l.downloads("[fd98::2]", 100000)
	if s := p.session("alice", isConnected); s.Path != "dtls" {
		t.Errorf("%+v", s)
	}
	c.Stop(syscall.SIGINT)
	p.nobodyIn("alice")
}
