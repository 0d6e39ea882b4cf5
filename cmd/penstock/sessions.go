package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

func newSessions() *cobra.Command {
	var file, socket string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "sessions [-c FILE | --socket PATH] [--json]",
		Short: "list who is signed in to a running server",
		Long: `Sessions asks a running server (penstock serve) who is signed in: those with a tunnel, and
those whose client is gone and may come back. Servers that share a store show the
sessions of all of them.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			body, err := control.Sessions(ctx, path)
			if err != nil {
				return err
			}
			if asJSON {
				_, err := cmd.OutOrStdout().Write(body)
				return err
			}
			var list []gateway.SessionStatus
			if err := json.Unmarshal(body, &list); err != nil {
				return fmt.Errorf("the server behind %s answers in another language: %w", path, err)
			}
			return sessionsText(cmd.OutOrStdout(), list, time.Now())
		}),
	}
	nodeFlags(cmd, &file, &socket)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print everything, as JSON")
	return cmd
}

func sessionsText(out io.Writer, list []gateway.SessionStatus, now time.Time) error {
	if len(list) == 0 {
		_, err := fmt.Fprintln(out, "nobody is signed in")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tUSER\tGROUP\tADDRESS\tFROM\tPATH\tIN\tOUT\tSINCE")
	for _, s := range list {
		path := s.Path
		switch {
		case !s.Connected:
			path = "(gone)"
		case path == "":
			path = "on " + s.Server
		}
		remote := "-"
		if s.Remote.IsValid() {
			remote = s.Remote.String()
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%v\n", s.ID, s.User, dash(s.Group), dash(strings.ReplaceAll(joined(s.Addresses), " ", "")),
			remote, path, config.FormatSize(int64(s.InboundBytes)), config.FormatSize(int64(s.OutboundBytes)), now.Sub(s.Since).Round(time.Second))
	}
	return w.Flush()
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newKick() *cobra.Command {
	var file, socket string
	cmd := &cobra.Command{
		Use:   "kick [-c FILE | --socket PATH] USER|ID|ADDRESS",
		Short: "end sessions of a running server",
		Long: `Kick ends all sessions of a user, or the one that an ID of penstock sessions or an address inside
the VPN names. The client is told, its cookie is void and its addresses are free. The user may
sign in again: see penstock user rm, or disable.`,
		Args: cobra.ExactArgs(1),
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			k, err := control.Kick(ctx, path, args[0])
			if err != nil {
				return err
			}
			if k.Ended == 0 {
				return fmt.Errorf("no session of that user, ID or address: %s", args[0])
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d ended\n", k.Ended)
			return err
		}),
	}
	nodeFlags(cmd, &file, &socket)
	return cmd
}
