package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain lets the scripts run this program as "penstock": the test binary is
// installed under that name and calls the real run.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"penstock": func() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits,
		},
	})
}

// exits runs a program and checks its exit code, which exec only tells from 0:
//
//	exits CODE PROGRAM [ARG...]
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG...]")
	}
	want := map[string]string{"1": "exit status 1", "2": "exit status 2"}[args[0]]
	if want == "" {
		ts.Fatalf("exits: code %q is none of this program's failures", args[0])
	}
	if err := ts.Exec(args[1], args[2:]...); err == nil || err.Error() != want {
		ts.Fatalf("%v: got %v, want %s", args[1:], err, want)
	}
}
