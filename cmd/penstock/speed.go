package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/speed"
)

func newSpeed() *cobra.Command {
	var file, socket, direction, rate string
	var udp, asJSON bool
	t := speed.Test{Network: "tcp"}
	cmd := &cobra.Command{
		Use:   "speed [-c FILE | --socket PATH] PEER",
		Short: "measure the throughput to another node",
		Long: `Speed lets a running node exchange data with PEER, the name of a peer or an address or name
inside the VPN, and prints how much of it arrived: from TCP/IP stack to TCP/IP stack, through
everything that the node's programs use. The far side must allow it, by speedtest = true in
its [node] table.`,
		Args: cobra.ExactArgs(1),
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			if udp {
				t.Network = "udp"
			}
			var err error
			if t.Rate, err = bitRate(rate); err != nil {
				return exitWith(exitUsage, err)
			}
			if t.Rate > 0 && !udp {
				return exitWith(exitUsage, errors.New("--rate is for --udp"))
			}
			if err := t.Check(); err != nil {
				return exitWith(exitUsage, err)
			}
			directions := map[string][]bool{"outbound": {false}, "inbound": {true}, "both": {false, true}}[direction]
			if directions == nil {
				return exitWith(exitUsage, fmt.Errorf("--direction %q: expected outbound, inbound or both", direction))
			}
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return measure(ctx, path, args[0], t, directions, asJSON, cmd.OutOrStdout(), cmd.ErrOrStderr())
		}),
	}
	nodeFlags(cmd, &file, &socket)
	f := cmd.Flags()
	f.BoolVarP(&udp, "udp", "u", false, "datagrams instead of TCP")
	f.StringVarP(&direction, "direction", "d", "both", "outbound, inbound or both, one after the other")
	f.IntVarP(&t.Flows, "flows", "P", 1, "how many flows at once, 1 to 64")
	f.DurationVarP(&t.Duration, "time", "t", 5*time.Second, "how long to send in each direction, at most 1m")
	f.IntVarP(&t.Datagram, "size", "s", 1200, "bytes in a datagram")
	f.StringVarP(&rate, "rate", "r", "", "bits a second over all flows of datagrams, such as 50M (default: as fast as the tunnel takes them)")
	f.BoolVar(&asJSON, "json", false, "print the results as JSON")
	complete(cmd, "direction", "outbound", "inbound", "both")
	return cmd
}

// bitRate reads bits per second, with k, M or G for powers of 1000; "" is 0.
func bitRate(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	var n float64
	var unit string
	if _, err := fmt.Sscanf(s, "%g%s", &n, &unit); err != nil && unit == "" && n == 0 {
		return 0, fmt.Errorf("--rate %q: expected bits a second, such as 50M", s)
	}
	factor, ok := map[string]float64{"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]
	if bits := n * factor; ok && bits >= 1 && bits <= 1e12 {
		return int64(bits), nil
	}
	return 0, fmt.Errorf("--rate %q: expected bits a second, such as 50M", s)
}

// measure runs one test after the other and prints the results.
func measure(ctx context.Context, path, peer string, t speed.Test, inbound []bool, asJSON bool, out, progress io.Writer) error {
	live := isTerminal(progress)
	results := []*speed.Result{}
	for _, t.Inbound = range inbound {
		r, err := control.Speed(ctx, path, peer, t, func(s speed.Sample) {
			if live {
				fmt.Fprintf(progress, "\r%-8s %4.1f of %.1f s  %8.2f Mbit/s ", s.Direction, s.Elapsed, s.Of, s.BitsPerSecond/1e6)
			}
		})
		if live {
			fmt.Fprint(progress, "\r\x1b[K")
		}
		if err != nil {
			return err
		}
		results = append(results, r)
		if !asJSON {
			fmt.Fprintln(out, r)
		}
	}
	if !asJSON {
		return nil
	}
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(results)
}
