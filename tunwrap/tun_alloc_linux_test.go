//go:build linux && !race

package tunwrap

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Neither direction of a TUN allocates in steady state.
func TestTUNAllocs(t *testing.T) {
	for name, nat := range map[string][]NATRule{
		"no NAT": nil,
		"NAT":    {rule("10.0.0.1", "172.31.255.1", "10.0.0.0/24"), rule("172.31.255.2", "10.0.0.2", "10.0.0.0/24")},
	} {
		t.Run(name, func(t *testing.T) {
			dev, kernel := pipeTUN(t, TUNOptions{})
			if err := dev.SetNAT(nat); err != nil {
				t.Fatal(err)
			}
			super := spec{flags: ack, tcpOptions: timestamps, payload: payload(50000)}
			plain := spec{udp: true, payload: payload(700)}
			g := super.gso(1348)
			messages := [][]byte{
				append(vnetBytes(g), super.partial()...),
				append(vnetBytes(GSO{NeedsCsum: true, CsumStart: 20, CsumOffset: udpChecksum}), plain.partial()...),
				append(vnetBytes(GSO{}), plain.full()...),
			}
			bufs, sizes := buffers(dev.BatchSize(), 1500)
			want := len(super.plainSegments(1348)) + 2
			if n := testing.AllocsPerRun(200, func() {
				for _, m := range messages {
					if _, err := unix.Write(kernel, m); err != nil {
						t.Fatal(err)
					}
				}
				if n, err := dev.Read(bufs, sizes, headroom); n != want || err != nil {
					t.Fatal(n, err)
				}
			}); n != 0 {
				t.Errorf("Read: %v allocations", n)
			}

			in := append(super.plainSegments(1348), plain.full())
			udp := plain
			udp.dport = 7
			udp.payload = payload(30000)
			in = append(in, udp.plainSegments(1000)...)
			scratch := withRoom(in)
			room := make([]byte, 70000)
			if n := testing.AllocsPerRun(200, func() {
				for i, b := range in {
					copy(scratch[i][headroom:], b)
				}
				if _, err := dev.Write(scratch, headroom); err != nil {
					t.Fatal(err)
				}
				for range 3 {
					if _, err := unix.Read(kernel, room); err != nil {
						t.Fatal(err)
					}
				}
			}); n != 0 {
				t.Errorf("Write: %v allocations", n)
			}
			if d := dev.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
		})
	}
}
