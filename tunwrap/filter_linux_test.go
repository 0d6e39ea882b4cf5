package tunwrap

import (
	"errors"
	"net"
	"syscall"
	"testing"
	"time"
)

// TestFilterTUN: two kernels behind TUNs, one with a filter that lets TCP and ping begin on its side only.
// What the kernel makes of it is connections that work, refusals that arrive, and silence.
func TestFilterTUN(t *testing.T) {
	leavesNothing(t)
	const mtu = 1400
	one, two := newNamespace(t), newNamespace(t)
	a := one.openTUN(t, TUNOptions{Name: "pen0", MTU: mtu}, "10.9.0.1/24", "fd09::1/64")
	b := two.openTUN(t, TUNOptions{Name: "pen0", MTU: mtu}, "10.9.0.2/24", "fd09::2/64")
	f, err := NewFilter(FilterOptions{
		Rules: []FilterRule{{Direction: Outbound, Protocol: "tcp", Peer: "b"}, {Direction: Inbound, Protocol: "udp", Ports: ports(7000)}},
		Peers: []FilterPeer{{ID: "b", Prefixes: prefixes("10.9.0.2/32", "fd09::2/128")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	a.SetFilter(f)
	w := &wire{mtu: mtu}
	end := w.join(a, b)
	// How long to wait for what has to come, and for what must not.
	const patience, silence = 20 * time.Second, 300 * time.Millisecond
	dial := func(from *namespace, network, addr string, wait time.Duration) (c net.Conn, err error) {
		err = from.do(func() (err error) { c, err = net.DialTimeout(network, addr, wait); return err })
		return c, err
	}
	for _, far := range []string{"10.9.0.2", "fd09::2"} {
		if err := sendOver(one, two, far, 4<<20); err != nil {
			t.Error(far, err)
		}
		if _, err := dial(one, "tcp", net.JoinHostPort(far, "9"), patience); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a closed port of %s: %v, want a refusal", far, err)
		}
	}
	for _, own := range []string{"10.9.0.1", "fd09::1"} {
		var timeout net.Error
		if _, err := dial(two, "tcp", net.JoinHostPort(own, "9"), silence); !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("a connection to %s: %v, want silence", own, err)
		}
		// Nobody listens: the kernel answers with an ICMP error, which passes because the flow is known.
		for _, port := range []string{"7000", "7001"} {
			c, err := dial(two, "udp", net.JoinHostPort(own, port), patience)
			if err != nil {
				t.Fatal(err)
			}
			c.Write([]byte("hello"))
			wait := silence
			if port == "7000" {
				wait = patience
			}
			c.SetReadDeadline(time.Now().Add(wait))
			_, err = c.Read(make([]byte, 9))
			if refused := errors.Is(err, syscall.ECONNREFUSED); refused != (port == "7000") {
				t.Errorf("UDP to %s port %s: %v", own, port, err)
			}
			c.Close()
		}
	}
	if err := end(); err != nil {
		t.Error(err)
	}
	s := f.Stats()
	if r := s.Rules[0]; r.Flows != 4 || r.Outbound.Bytes < 8<<20 || r.Outbound.Packets > r.Outbound.Bytes/mtu {
		t.Errorf("%+v, want four flows and superpackets", r)
	}
	if r := s.Rules[1]; r.Flows != 2 || r.Inbound.Packets != 2 || r.Outbound.Packets != 2 {
		t.Errorf("%+v, want two datagrams and two errors about them", r)
	}
	if d := a.Drops(); d[DropFilter] != d.Total() || d[DropFilter] < 4 || d[DropFilter] != s.NoRule.Packets+s.Unknown.Packets {
		t.Errorf("drops %v, %+v", d, s)
	}
}
