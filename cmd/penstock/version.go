package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/penstock-vpn/penstock/netstack"
)

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "print what this program was built from and what the kernel can do",
		Args:  cobra.NoArgs,
		RunE: verb(func(cmd *cobra.Command, _ []string) error {
			return version(cmd.OutOrStdout())
		}),
	}
}

// shown are the dependencies that decide what goes over the wire.
var shown = map[string]string{
	"gvisor.dev/gvisor":       "gVisor",
	"github.com/pion/dtls/v2": "pion DTLS",
}

func version(stdout io.Writer) error {
	b := readBuild()
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "penstock\t%s\n", b.version)
	if b.revision != "" {
		fmt.Fprintf(w, "commit\t%s\n", b.revision)
	}
	fmt.Fprintf(w, "Go\t%s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	for _, d := range b.deps {
		fmt.Fprintf(w, "%s\t%s\n", shown[d.Path], d.Version)
	}
	c, err := netstack.Probe()
	if err != nil {
		return errors.Join(w.Flush(), fmt.Errorf("ask the kernel for its abilities: %w", err))
	}
	fmt.Fprintf(w, "UDP GSO\t%s\n", c.GSO)
	fmt.Fprintf(w, "UDP GRO\t%s\n", c.GRO)
	fmt.Fprintf(w, "UDP batches\t%s\n", c.MessageBatches)
	return w.Flush()
}

// build is what the linker knows about this program.
type build struct {
	version  string // "v1.2.3", "v1.2.4-0.2026…", or "(devel)"
	revision string // of the version control, with "modified" when it was
	deps     []*debug.Module
}

func readBuild() build {
	b := build{version: "(unknown)"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if b.version = info.Main.Version; b.version == "" {
		b.version = "(devel)"
	}
	modified := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			b.revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = " (modified)"
		}
	}
	if b.revision != "" {
		b.revision += modified
	}
	for _, d := range info.Deps {
		if shown[d.Path] != "" {
			b.deps = append(b.deps, d)
		}
	}
	return b
}
