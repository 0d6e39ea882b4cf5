//go:build linux

package hosts

import (
	"net"
	"testing"
	"time"
)

// The first packet arrives, in both directions and by both families.
func TestJoin(t *testing.T) {
	h := New(t, 2)
	h.Join(
		Port{Host: 0, Name: "right", Addrs: []string{"10.9.1.1/24", "fd91::1/64", "fe80::1/64"}},
		Port{Host: 1, Name: "left", Addrs: []string{"10.9.1.2/24", "fd91::2/64", "fe80::2/64"}},
	)
	for _, way := range []struct {
		from, to int
		addr     string
	}{
		{0, 1, "10.9.1.2"}, {1, 0, "10.9.1.1"}, {0, 1, "fd91::2"}, {1, 0, "fd91::1"}, {0, 1, "fe80::2%right"}, {1, 0, "fe80::1%left"},
	} {
		var in net.PacketConn
		var out net.Conn
		h.On(way.to, func() {
			var err error
			in, err = net.ListenPacket("udp", ":0")
			h.Check(err)
		})
		defer in.Close()
		_, port, err := net.SplitHostPort(in.LocalAddr().String())
		h.Check(err)
		h.On(way.from, func() {
			out, err = net.Dial("udp", net.JoinHostPort(way.addr, port))
			h.Check(err)
		})
		defer out.Close()
		_, err = out.Write([]byte("hello"))
		h.Check(err)
		in.SetReadDeadline(time.Now().Add(10 * time.Second))
		b := make([]byte, 10)
		if n, _, err := in.ReadFrom(b); err != nil || string(b[:n]) != "hello" {
			t.Errorf("to %s: %q, %v", way.addr, b[:n], err)
		}
	}
}

// What is on one host is not on another, and a goroutine of the test's can go there too.
func TestEnter(t *testing.T) {
	h := New(t, 2)
	h.On(0, func() { h.Up("lo", "10.9.9.9/32") })
	listens := func(host int) error {
		done := make(chan error)
		go func() {
			leave, err := h.Enter(host)
			if err == nil {
				var l net.Listener
				if l, err = net.Listen("tcp", "10.9.9.9:0"); err == nil {
					l.Close()
				}
				leave()
			}
			done <- err
		}()
		return <-done
	}
	if err := listens(0); err != nil {
		t.Error(err)
	}
	if listens(1) == nil {
		t.Error("the address of one host is another's too")
	}
}
