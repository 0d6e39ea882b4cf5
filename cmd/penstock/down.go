package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/hostnet"
)

func newDown() *cobra.Command {
	var file string
	var patience time.Duration
	cmd := &cobra.Command{
		Use:   "down [-c FILE]",
		Short: "end a node and make the host as it was",
		Long: `Down asks the node of a configuration to end, if it runs, and waits until it has. If
it was killed, down takes back what it has left on the host: rules, /etc/resolv.conf
and the like, which the next up would do too. Without -c it takes back what all dead
nodes have left, and ends none.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			var want func(name, owner string) bool
			if file != "" {
				owner, path := whose(file)
				if err := end(cmd.Context(), cmd.OutOrStdout(), path, patience); err != nil {
					return err
				}
				want = func(_, o string) bool { return o == owner || o == "" } // of one that nobody knows, too
			}
			return takeBack(cmd.OutOrStdout(), want)
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().DurationVar(&patience, "timeout", 30*time.Second, "how long to wait for the node to end")
	return cmd
}

// whose is how a configuration's node is known: as the owner of a journal, and by its control socket.
// A file that has mistakes by now, or is gone, will do.
func whose(file string) (owner, path string) {
	if path, err := config.Socket(file); err == nil && path != "" {
		return absolute(file), path
	}
	return absolute(file), control.Find(file)
}

// end asks the node behind a control socket to end, and waits for that.
func end(ctx context.Context, w io.Writer, path string, patience time.Duration) error {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	body, err := control.Fetch(ctx, path)
	if errors.Is(err, control.ErrNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	var r control.Report
	if err := json.Unmarshal(body, &r); err != nil {
		return fmt.Errorf("the node behind %s answers in another language: %w", path, err)
	}
	if r.Server != nil {
		return fmt.Errorf("behind %s is a server (penstock serve), which ends by a signal: kill %d", path, r.PID)
	}
	if err := control.Down(ctx, path); err != nil {
		return err
	}
	for alive(r.PID) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the node (process %d) has not ended within %v", r.PID, patience)
		case <-time.After(20 * time.Millisecond):
		}
	}
	fmt.Fprintf(w, "process %d has ended\n", r.PID)
	return nil
}

// takeBack takes back what dead nodes have left.
func takeBack(w io.Writer, want func(name, owner string) bool) error {
	did, err := hostnet.Recover(hostnet.Folder(control.Folder()), want)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range did {
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("interface %s: %w", r.Interface, r.Err))
			continue
		}
		fmt.Fprintf(w, "took back %d steps of a node that died, interface %s\n", r.Steps, r.Interface)
	}
	return errors.Join(errs...)
}
