package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/netstack"
)

func newGenkey() *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use:   "genkey",
		Short: "make a private key",
		Long: `Genkey makes a private key and writes it to the standard output, or to a new file
of mode 0600 with -o. An existing file is never overwritten. With -o the public
key is printed, for the other side's configuration.`,
		Args: cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			return genkey(output, cmd.OutOrStdout(), cmd.ErrOrStderr())
		}),
	}
	cmd.Flags().StringVarP(&output, "output", "o", "", "write the key to a new `FILE`")
	return cmd
}

func genkey(output string, stdout, stderr io.Writer) error {
	key, err := netstack.GenerateKey()
	if err != nil {
		return err
	}
	text, err := key.MarshalText()
	if err != nil {
		return err
	}
	if output == "" {
		if f, ok := stdout.(*os.File); ok && othersCanRead(f) {
			fmt.Fprintln(stderr, "penstock: warning: the private key goes to a file that every user can read")
		}
		_, err = fmt.Fprintf(stdout, "%s\n", text)
		return err
	}
	f, err := os.OpenFile(output, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%s\n", text)
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		os.Remove(output)
		return err
	}
	_, err = fmt.Fprintln(stdout, key.Public())
	return err
}

// othersCanRead tells whether f is a file that is open to every user.
func othersCanRead(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && runtime.GOOS != "windows" && st.Mode().IsRegular() && st.Mode().Perm()&fs.FileMode(0o004) != 0
}
