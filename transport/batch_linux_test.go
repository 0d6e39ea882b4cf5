package transport

import (
	"testing"

	"golang.org/x/sys/unix"
)

// skipKernel makes the kernel take everything at no cost.
func skipKernel(_ testing.TB, s *UDPSocket) {
	s.sys.sendmmsg = func(_ uintptr, msgs []mmsghdr) (int, unix.Errno) { return len(msgs), 0 }
}

// TestAllocations pins zero for both directions over the real kernel, in the
// steady state.
func TestAllocations(t *testing.T) {
	for _, c := range []struct {
		name, from, to, host string
		opts                 SocketOptions
	}{
		{"v4", "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1", SocketOptions{}},
		{"all v4", "0.0.0.0:0", "0.0.0.0:0", "127.0.0.1", SocketOptions{}},
		{"v6", "[::1]:0", "[::1]:0", "::1", SocketOptions{}},
		{"dual by v4", "[::]:0", "[::]:0", "127.0.0.1", SocketOptions{}},
		{"dual by v6", "[::]:0", "[::]:0", "::1", SocketOptions{}},
		{"plain", "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1", SocketOptions{DisableGSO: true, DisableGRO: true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			from, to := testSocket(t, c.from, c.opts), testSocket(t, c.to, c.opts)
			toAddr := reach(c.host, to)
			run := Run{Remote: toAddr, Local: toAddr.Addr()}
			for range 4 {
				run.Segments = append(run.Segments, make([]byte, 1000))
			}
			runs := []Run{run, run}
			batch := inboundBatch(16, 64<<10)
			allocs := testing.AllocsPerRun(200, func() {
				if n, err := from.WriteBatch(runs); n != len(runs) || err != nil {
					t.Fatal(n, err)
				}
				for bytes := 0; bytes < 8000; {
					n, err := to.ReadBatch(batch)
					if err != nil {
						t.Fatal(err)
					}
					for i := range batch[:n] {
						bytes += batch[i].N
					}
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations per WriteBatch and ReadBatch, want 0", allocs)
			}
		})
	}
}
