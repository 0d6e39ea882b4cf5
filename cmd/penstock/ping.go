package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
)

func newPing() *cobra.Command {
	var file, socket string
	var v4, v6 bool
	p := pinger{request: control.PingRequest{Network: "ip"}}
	cmd := &cobra.Command{
		Use:   "ping [-c FILE | --socket PATH] [-n COUNT] HOST",
		Short: "send ICMP echo requests through the VPN",
		Long: `Ping lets a running node send ICMP echo requests to a host inside the VPN, and prints
each reply and, at the end or when it is interrupted, statistics. The exit code is 1 if no
reply came.`,
		Args: cobra.ExactArgs(1),
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			switch {
			case v4 && v6:
				return exitWith(exitUsage, errors.New("-4 and -6 exclude each other"))
			case p.request.Size < 0 || p.request.Size > 65000:
				return exitWith(exitUsage, errors.New("--size: expected 0 to 65000 bytes"))
			case p.count < 0 || p.interval < time.Millisecond || p.request.Timeout < time.Millisecond:
				return exitWith(exitUsage, errors.New("--count, --interval and --timeout: expected no negative number, and at least 1ms"))
			case v4:
				p.request.Network = "ip4"
			case v6:
				p.request.Network = "ip6"
			}
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			p.request.Host = args[0]
			return p.run(ctx, path, cmd.OutOrStdout())
		}),
	}
	nodeFlags(cmd, &file, &socket)
	f := cmd.Flags()
	f.IntVarP(&p.count, "count", "n", 0, "how many requests to send (default: until interrupted)")
	f.DurationVarP(&p.interval, "interval", "i", time.Second, "the time between requests")
	f.DurationVarP(&p.request.Timeout, "timeout", "W", 2*time.Second, "how long to wait for a reply")
	f.IntVarP(&p.request.Size, "size", "s", 56, "bytes of data")
	f.BoolVarP(&v4, "ipv4", "4", false, "IPv4 only")
	f.BoolVarP(&v6, "ipv6", "6", false, "IPv6 only")
	return cmd
}

// A pinger sends echo requests and counts what comes back.
type pinger struct {
	request  control.PingRequest
	count    int // 0: until interrupted
	interval time.Duration

	sent, received   int
	least, most, sum time.Duration
	squares          float64 // of seconds
}

func (p *pinger) run(ctx context.Context, path string, out io.Writer) error {
	tick := time.NewTicker(p.interval)
	defer tick.Stop()
	for ctx.Err() == nil {
		p.request.Sequence = (p.sent + 1) & math.MaxUint16
		reply, err := control.Ping(ctx, path, p.request)
		if ctx.Err() != nil {
			break // this one was not waited for
		}
		p.sent++
		switch {
		case err == nil:
			p.note(reply.RTT)
			fmt.Fprintf(out, "%d bytes from %v: seq=%d ttl=%d time=%s ms\n", reply.Size, reply.From, p.request.Sequence, reply.TTL, milliseconds(reply.RTT))
		case errors.Is(err, control.ErrNoReply):
			fmt.Fprintf(out, "no reply from %s: seq=%d\n", p.request.Host, p.request.Sequence)
		case p.received == 0:
			return err // a name, an address, a node that is not there
		default:
			fmt.Fprintf(out, "%v: seq=%d\n", err, p.request.Sequence)
		}
		if p.count > 0 && p.sent >= p.count {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	p.statistics(out)
	if p.received == 0 {
		return fmt.Errorf("%s does not reply", p.request.Host)
	}
	return nil
}

func (p *pinger) note(rtt time.Duration) {
	if p.received == 0 || rtt < p.least {
		p.least = rtt
	}
	p.received++
	p.most = max(p.most, rtt)
	p.sum += rtt
	p.squares += rtt.Seconds() * rtt.Seconds()
}

func (p *pinger) statistics(out io.Writer) {
	if p.sent == 0 {
		return
	}
	fmt.Fprintf(out, "%d sent, %d received, %.1f%% lost\n", p.sent, p.received, 100*float64(p.sent-p.received)/float64(p.sent))
	if p.received > 0 {
		mean := p.sum.Seconds() / float64(p.received)
		deviation := math.Sqrt(max(0, p.squares/float64(p.received)-mean*mean))
		fmt.Fprintf(out, "rtt min/avg/max/mdev %s/%s/%s/%s ms\n", milliseconds(p.least),
			milliseconds(time.Duration(mean*1e9)), milliseconds(p.most), milliseconds(time.Duration(deviation*1e9)))
	}
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.3f", float64(d)/1e6) }
