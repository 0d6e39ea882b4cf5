package main

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
)

// hostnet is told which addresses of peers are known, and whether all are.
func TestHostConfigEndpoints(t *testing.T) {
	for _, tt := range []struct {
		endpoints []string
		want      string
	}{
		{[]string{"192.0.2.1:5182", "[2001:db8::1]:5182"}, "[192.0.2.1 2001:db8::1] false"},
		{[]string{"192.0.2.1:5182", "b.example.net:5182"}, "[192.0.2.1] true"},
		{[]string{"192.0.2.1:5182", ""}, "[192.0.2.1] true"},
	} {
		c := &config.Config{TUN: &config.TUN{}}
		for _, e := range tt.endpoints {
			c.Peers = append(c.Peers, config.Peer{Endpoint: e})
		}
		h := hostConfig(c, slog.New(slog.DiscardHandler))
		if got := fmt.Sprint(h.Endpoints, " ", h.Anywhere); got != tt.want {
			t.Errorf("%q: %s, want %s", tt.endpoints, got, tt.want)
		}
	}
}
