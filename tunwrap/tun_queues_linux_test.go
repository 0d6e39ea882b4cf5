package tunwrap

import (
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel sends a flow out by the queue to which a packet of it was written last, so a flow is always written to the
// same one, whichever goroutine writes. Different flows use all of them.
func TestTUNWritesAFlowToOneQueue(t *testing.T) {
	const queues = 3
	dev := newTUN(TUNOptions{})
	var ours, kernel []int
	for range queues {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		ours, kernel = append(ours, fds[0]), append(kernel, fds[1])
	}
	dev.vnet = true
	if err := dev.poll(ours); err != nil {
		t.Fatal(err)
	}
	defer func() {
		dev.Close()
		for _, fd := range kernel {
			unix.Close(fd)
		}
	}()
	const flows, times = 20, 5
	var packets [][]byte
	for i := range flows {
		tcp := spec{v6: i%2 == 0, sport: uint16(i), flags: ack, payload: payload(i)}
		udp := tcp
		udp.udp = true
		packets = append(packets, tcp.full(), udp.full(), fragmentsOf(udp.full(), 8, 1)[0])
		packets = append(packets, pingIn(byte(i+2), 1)...)
	}
	where := map[string]int{}
	used := map[int]bool{}
	for range times {
		held := dev.writers.Get() // as if another goroutine were in Write
		if _, err := dev.Write(withRoom(packets), headroom); err != nil {
			t.Fatal(err)
		}
		_ = held
		n := 0
		for q, fd := range kernel {
			for _, d := range taken(t, fd) {
				key := string(d.b)
				if at, ok := where[key]; ok && at != q {
					t.Errorf("queue %d after %d: %x", q, at, d.b[:min(len(d.b), 28)])
				}
				where[key], used[q] = q, true
				n++
			}
		}
		if n != len(packets) {
			t.Errorf("%d packets of %d", n, len(packets))
		}
	}
	if len(used) != queues {
		t.Errorf("queues used: %v", used)
	}
	if d := dev.Drops(); d.Total() != 0 {
		t.Errorf("drops %v", d)
	}
}
