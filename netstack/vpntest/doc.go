// Package vpntest gives tests connected VPN nodes in one line:
//
//	a, b := vpntest.Pair(t)
//	nodes := vpntest.Mesh(t, 5, vpntest.Wire{Latency: 20 * time.Millisecond, Loss: 0.01})
//
// The nodes are real ones, with fresh keys, real stacks, handshakes and records. They are at
// 10.66.0.1 and fd66::1, 10.66.0.2 and fd66::2, and so on, know each other, are
// connected when the function returns, and are closed by the test's cleanup. Without
// an option they are joined by an in-memory wire that loses nothing; [Wire] makes it bad,
// [Network] changes it while it runs, and [Loopback] uses real UDP sockets instead.
// No privileges are needed and nothing leaves the machine. It works in benchmarks and
// fuzz tests too.
package vpntest
