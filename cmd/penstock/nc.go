package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
)

func newNc() *cobra.Command {
	var file, socket string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "nc [-c FILE | --socket PATH] HOST PORT",
		Short: "connect standard input and output to a port of the VPN",
		Long: `Nc asks a running node for a TCP connection inside the VPN and carries the standard
input and output over it. The end of the input ends that half of the connection alone.

    ssh -o ProxyCommand='penstock nc %h %p' b.example`,
		Args: cobra.ExactArgs(2),
		RunE: verb(func(cmd *cobra.Command, args []string) error {
			path, err := findSocket(file, socket)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(context.Background(), timeout)
			defer cancel()
			address := net.JoinHostPort(args[0], args[1])
			s, err := control.Dial(ctx, path, address)
			switch {
			case err != nil && ctx.Err() != nil:
				return fmt.Errorf("no connection to %s within %v", address, timeout)
			case err != nil:
				return err
			}
			defer s.Close()
			return connect(s, cmd.InOrStdin(), cmd.OutOrStdout())
		}),
	}
	nodeFlags(cmd, &file, &socket)
	cmd.Flags().DurationVarP(&timeout, "timeout", "w", 30*time.Second, "how long to wait for the connection")
	return cmd
}

// nodeFlags add what findSocket wants to know.
func nodeFlags(cmd *cobra.Command, file, socket *string) {
	configFlag(cmd, file)
	cmd.Flags().StringVar(socket, "socket", "", "the node's control socket `PATH`")
}

// connect carries in and out over s until both halves have ended. A person at a terminal is
// not waited for.
func connect(s *control.Stream, in io.Reader, out io.Writer) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(s, in)
		if err == nil {
			err = s.CloseWrite()
		}
		if err != nil {
			s.Close()
		}
		sent <- err
	}()
	if _, err := io.Copy(out, s); err != nil {
		select {
		case e := <-sent:
			if e != nil && errors.Is(err, net.ErrClosed) {
				return e
			}
		default:
		}
		return err
	}
	if f, ok := out.(*os.File); ok {
		f.Close() // whoever reads it hears of the end now
	}
	if isTerminal(in) {
		return nil
	}
	err := <-sent
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return nil // the far side has ended everything, and had the right to
	}
	return err
}
