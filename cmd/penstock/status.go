package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
)

func newStatus() *cobra.Command {
	var file, socket string
	var asJSON, live bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "status [-c FILE | --socket PATH] [--json | --watch]",
		Short: "show what a running node is doing",
		Long: `Status asks a running node for its peers, what went each way, what was dropped and
why, the path MTU, and which offloads are on, or why they are not. The node is found
by its configuration file or by its control socket; without either, the only one
that runs for this user.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			if live {
				if asJSON {
					return exitWith(exitUsage, errors.New("--watch and --json exclude each other"))
				}
				if interval < 100*time.Millisecond {
					return exitWith(exitUsage, fmt.Errorf("--interval %v: expected at least 100ms", interval))
				}
				ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
				defer stop()
				return watch(ctx, path, interval, cmd.OutOrStdout())
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			body, err := control.Fetch(ctx, path)
			if err != nil {
				return err
			}
			if asJSON {
				_, err := cmd.OutOrStdout().Write(body)
				return err
			}
			var r control.Report
			if err := json.Unmarshal(body, &r); err != nil {
				return fmt.Errorf("the node behind %s answers in another language: %w", path, err)
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), statusText(&r, time.Now()))
			return err
		}),
	}
	configFlag(cmd, &file)
	cmd.Flags().StringVar(&socket, "socket", "", "the node's control socket `PATH`")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print everything, as JSON")
	cmd.Flags().BoolVarP(&live, "watch", "w", false, "show rates, and renew them until interrupted")
	cmd.Flags().DurationVar(&interval, "interval", time.Second, "the time between two looks of --watch")
	return cmd
}

// findSocket says which node is meant.
func findSocket(file, socket string) (string, error) {
	switch {
	case file != "" && socket != "":
		return "", exitWith(exitUsage, errors.New("-c and --socket both say which node is meant; give one"))
	case socket != "":
		return socket, nil
	case file != "":
		path, err := config.Socket(file)
		if err != nil {
			return "", exitWith(exitUsage, err)
		}
		if path == "" {
			path = control.Find(file)
		}
		return path, nil
	}
	sockets := control.Sockets()
	if len(sockets) > 1 {
		sockets = control.Live(sockets)
	}
	switch len(sockets) {
	case 0:
		return "", fmt.Errorf("%w: nobody answers on a control socket in %s; name the node with -c or --socket", control.ErrNotRunning, control.Folder())
	case 1:
		return sockets[0], nil
	}
	return "", exitWith(exitUsage, fmt.Errorf("several nodes have a control socket; name one with --socket:\n\t%s", strings.Join(sockets, "\n\t")))
}
