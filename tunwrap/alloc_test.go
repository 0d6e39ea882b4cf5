//go:build !race

package tunwrap

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// Neither direction allocates in steady state: not per packet, and not per batch.
func TestAllocs(t *testing.T) {
	rules := []NATRule{
		rule("10.0.0.1", "172.31.255.1", "10.0.0.0/24"), rule("fd00::1", "2001:db8:5::1", "fd00::/64"),
		rule("172.31.255.2", "10.0.0.2", "10.0.0.0/24"),
	}
	for name, nat := range map[string][]NATRule{"no NAT": nil, "NAT": rules} {
		t.Run(name, func(t *testing.T) {
			pkts, _ := mixed()
			w := New(&fakeLink{forever: pkts}, Options{})
			if err := w.SetNAT(nat); err != nil {
				t.Fatal(err)
			}
			bufs, sizes := buffers(100, 1500)
			if n := testing.AllocsPerRun(200, func() {
				if n, err := w.Read(bufs, sizes, headroom); n == 0 || err != nil {
					t.Fatal(n, err)
				}
			}); n != 0 {
				t.Errorf("Read: %v allocations", n)
			}
			w.Close()
			for _, p := range pkts {
				p.DecRef()
			}

			link := &fakeLink{delivered: func(*stack.PacketBuffer) {}}
			w = New(link, Options{})
			if err := w.SetNAT(nat); err != nil {
				t.Fatal(err)
			}
			var in, scratch [][]byte
			for f := range uint16(8) {
				for _, v6 := range []bool{false, true} {
					s := spec{v6: v6, sport: f, flags: ack | psh, tcpOptions: timestamps, payload: payload(9000)}
					in = append(in, s.plainSegments(1348)...)
				}
				s := spec{udp: true, sport: f, payload: payload(1000)}
				in = append(in, s.full())
			}
			for _, b := range in {
				scratch = append(scratch, make([]byte, headroom+len(b)))
			}
			if n := testing.AllocsPerRun(200, func() {
				for i, b := range in {
					copy(scratch[i][headroom:], b)
				}
				if _, err := w.Write(scratch, headroom); err != nil {
					t.Fatal(err)
				}
			}); n != 0 {
				t.Errorf("Write: %v allocations", n)
			}
			if d := w.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
			w.Close()
		})
	}
}
