// Command penstock is a VPN endpoint that needs no privileges: see docs/cli.md.
package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
	"github.com/penstock-vpn/penstock/cmd/penstock/internal/sandbox"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1 // something failed at run time
	exitUsage   = 2 // a mistake in the command line or in the configuration; nothing was started
)

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is the whole program but for the process around it. It returns the exit
// code.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 1 && args[0] == sandbox.HelperVerb {
		return sandbox.Helper()
	}
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	var mistakes config.Mistakes
	var e *exitError
	switch {
	case errors.As(err, &mistakes):
		fmt.Fprintln(stderr, mistakes.Error()) // each line begins with the file, as a compiler's do
		if errors.As(err, &e) {
			return e.code
		}
		return exitUsage
	case errors.As(err, &e) && e.err == nil:
		return e.code
	case errors.As(err, &e):
		fmt.Fprintf(stderr, "penstock: error: %v\n", e.err)
		return e.code
	default: // cobra's
		fmt.Fprintf(stderr, "penstock: error: %v\npenstock: see %s --help\n", err, helpFor(root, args))
		return exitUsage
	}
}

// helpFor is the command whose help explains args.
func helpFor(root *cobra.Command, args []string) string {
	if cmd, _, err := root.Find(args); err == nil {
		return cmd.CommandPath()
	}
	return root.CommandPath()
}

// exitError is an error of a verb with the exit code that it means; err is nil when there is
// nothing to say. Errors of
// other types are cobra's, about the command line.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return fmt.Sprint(e.err) }
func (e *exitError) Unwrap() error { return e.err }

// failed says that err, unless it is nil, is a failure at run time.
func failed(err error) error { return exitWith(exitFailure, err) }

func exitWith(code int, err error) error {
	var e *exitError
	if err == nil || errors.As(err, &e) {
		return err
	}
	return &exitError{code, err}
}

// verb makes the RunE of a command whose errors are failures at run time unless
// they say otherwise.
func verb(do func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error { return failed(do(cmd, args)) }
}

const longHelp = `Penstock is a VPN endpoint in userspace. It needs no root and no kernel module:
ports of the VPN become local ports, local services become ports of the VPN.

    $ penstock genkey -o a.key          # prints the public key
    $ penstock check -c node.toml       # validates, starts nothing
    $ penstock up -c node.toml          # runs in the foreground
    $ penstock run -c node.toml curl …  # runs a program that has this network only
    $ penstock status                   # what the running node is doing

Exit codes: 0 done, 1 failed at run time, 2 a mistake in the command line or in
the configuration.`

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "penstock",
		Short:         "a VPN endpoint in userspace",
		Long:          longHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newGenkey(), newPubkey(), newCheck(), newUp(), newDown(), newRun(), newStatus(), newNc(), newPing(), newSpeed(), newDemo(), newVersion(),
		newConnect(), newServe(), newUser(), newSessions(), newKick())
	return root
}

// configFlag adds -c to a command and completes it with TOML files.
func configFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVarP(file, "config", "c", "", "the node's configuration `FILE`")
	// The error is for a flag that does not exist or is registered twice.
	_ = cmd.MarkFlagFilename("config", "toml")
}
