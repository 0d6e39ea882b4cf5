package netstack

import "testing"

// TestProbe: what is probed is what a node gets.
func TestProbe(t *testing.T) {
	c, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	a, _ := pair(t, nil)
	if got := a.Status().Tunnel.Sockets[0].Capabilities; got != c {
		t.Errorf("a node's socket has %+v, the probe says %+v", got, c)
	}
}
