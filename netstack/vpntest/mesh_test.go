package vpntest_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/refs"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/vpntest"
)

func TestMain(m *testing.M) {
	refs.SetLeakMode(refs.LeaksPanic)
	goleak.VerifyTestMain(leakCheck{m})
}

type leakCheck struct{ m *testing.M }

func (l leakCheck) Run() int {
	code := l.m.Run()
	refs.DoRepeatedLeakCheck() // panics
	return code
}

// echo answers every connection to port 7 of n until the test ends.
func echo(t *testing.T, n *netstack.Node) {
	t.Helper()
	l, err := n.Listen("tcp", ":7")
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
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// ping sends a few bytes to addr's port 7 and expects them back.
func ping(from *netstack.Node, addr string, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := from.Dial(ctx, "tcp", net.JoinHostPort(addr, "7"))
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	sent, got := make([]byte, 100), make([]byte, 100)
	rand.Read(sent)
	if _, err := c.Write(sent); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(sent, got) {
		return fmt.Errorf("other bytes came back")
	}
	return nil
}

func TestPair(t *testing.T) {
	for name, opts := range map[string][]vpntest.Option{
		"wire":     nil,
		"bad wire": {vpntest.Wire{Latency: 5 * time.Millisecond, Loss: 0.05, Reorder: 0.05, Duplicate: 0.05}},
		"loopback": {vpntest.Loopback},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := vpntest.Pair(t, opts...)
			echo(t, a)
			echo(t, b)
			for _, addr := range []string{"10.66.0.2", "fd66::2"} {
				if err := ping(a, addr, 10*time.Second); err != nil {
					t.Errorf("a to %s: %v", addr, err)
				}
			}
			for _, addr := range []string{"10.66.0.1", "fd66::1"} {
				if err := ping(b, addr, 10*time.Second); err != nil {
					t.Errorf("b to %s: %v", addr, err)
				}
			}
		})
	}
}

func TestMesh(t *testing.T) {
	nodes := vpntest.Mesh(t, 5)
	for _, n := range nodes {
		echo(t, n)
	}
	for i, from := range nodes {
		for j := range nodes {
			if err := ping(from, vpntest.Addr4(j).String(), 10*time.Second); err != nil {
				t.Errorf("node %d to %d: %v", i, j, err)
			}
		}
	}
}

// timing detects a dead peer within the time of a test.
func timing(_ int, c *netstack.Config) {
	c.Timing = netstack.Timing{
		DPD: 100 * time.Millisecond, DPDTimeout: 400 * time.Millisecond,
		HandshakeRetry: 50 * time.Millisecond, HandshakeRetryMax: 200 * time.Millisecond,
		FlightInterval: 50 * time.Millisecond,
	}
}

func TestNetworkChanges(t *testing.T) {
	nw := vpntest.NewNetwork(t, vpntest.Wire{Latency: time.Millisecond})
	nodes := vpntest.Mesh(t, 3, nw, vpntest.Configure(timing))
	a, b, c := nodes[0], nodes[1], nodes[2]
	for _, n := range nodes {
		echo(t, n)
	}
	nw.Partition(a, b)
	if ping(a, "10.66.0.2", 150*time.Millisecond) == nil {
		t.Error("a reaches b in spite of the partition")
	}
	if err := ping(a, "10.66.0.3", 5*time.Second); err != nil {
		t.Errorf("a does not reach c: %v", err)
	}
	nw.Heal()
	if err := ping(a, "10.66.0.2", 10*time.Second); err != nil {
		t.Errorf("after Heal: %v", err)
	}

	before := a.LocalAddrs()[0]
	after := nw.Rebind(a)
	if now := a.LocalAddrs()[0]; now != after || now == before {
		t.Errorf("Rebind moved from %v to %v, the node says %v", before, after, now)
	}
	for _, addr := range []string{"10.66.0.2", "10.66.0.3"} {
		if err := ping(a, addr, 10*time.Second); err != nil {
			t.Errorf("to %s after Rebind: %v", addr, err)
		}
	}
	if err := ping(c, "10.66.0.1", 10*time.Second); err != nil {
		t.Errorf("c to the rebound a: %v", err)
	}

	nw.SetLoss(1)
	if ping(b, "10.66.0.3", 150*time.Millisecond) == nil {
		t.Error("b reaches c although all is lost")
	}
	nw.SetWire(vpntest.Wire{})
	if err := ping(b, "10.66.0.3", 10*time.Second); err != nil {
		t.Errorf("after SetWire: %v", err)
	}
}

// Superpackets cross the in-memory wire as they do a UDP socket with GSO and GRO.
func TestWireUsesFastPath(t *testing.T) {
	a, b := vpntest.Pair(t)
	l, err := b.Listen("tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	c, err := a.Dial(t.Context(), "tcp", "10.66.0.2:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go func() {
		c.Write(make([]byte, 16<<20))
		c.(*netstack.TCPConn).CloseWrite()
	}()
	if n, err := io.Copy(io.Discard, s); n != 16<<20 || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	in, out := b.Status().Inbound, a.Status().Outbound
	if out.Superpackets == 0 || out.Segments < 8*out.Packets {
		t.Errorf("outbound %+v", out)
	}
	if in.Superpackets == 0 || in.Segments < 4*in.Packets {
		t.Errorf("inbound %+v", in)
	}
}
