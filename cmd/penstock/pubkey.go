package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/netstack"
)

func newPubkey() *cobra.Command {
	return &cobra.Command{
		Use:   "pubkey",
		Short: "print the public key of a private key",
		Long: `Pubkey reads a private key from the standard input and prints its public key.

    $ penstock pubkey <a.key`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			return pubkey(cmd.InOrStdin(), cmd.OutOrStdout())
		}),
	}
}

func pubkey(stdin io.Reader, stdout io.Writer) error {
	const most = 1 << 10 // a key has 44 characters; white space may be around it
	text, err := io.ReadAll(io.LimitReader(stdin, most))
	if err != nil {
		return err
	}
	key, err := netstack.ParsePrivateKey(string(text))
	if err != nil {
		return fmt.Errorf("standard input is %w", err)
	}
	if key.IsZero() {
		return errors.New("standard input is the zero key, which is no secret")
	}
	_, err = fmt.Fprintln(stdout, key.Public())
	return err
}
