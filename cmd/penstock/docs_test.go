package main

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/config"
)

// section is the text below a heading of docs/cli.md, up to the next of its kind.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, rest, found := strings.Cut(doc, "\n"+heading+"\n")
	if !found {
		t.Errorf("docs/cli.md has no %q", heading)
	}
	level, _, _ := strings.Cut(heading, " ")
	if end := regexp.MustCompile(`(?m)^#{1,` + string(rune('0'+len(level))) + `} `).FindStringIndex(rest); end != nil {
		rest = rest[:end[0]]
	}
	return rest
}

// TestDocs: docs/cli.md explains every command, flag and key of the configuration, and none
// that does not exist.
func TestDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	root := newRoot()
	root.InitDefaultCompletionCmd() // cobra adds it when the program runs
	synopsis := section(t, doc, "## SYNOPSIS")
	verbs := map[string]*cobra.Command{}
	for _, cmd := range root.Commands() {
		verbs[cmd.Name()] = cmd
		text := section(t, doc, "### "+cmd.Name())
		if !strings.Contains(synopsis, "penstock "+cmd.Name()) {
			t.Errorf("penstock %s is not in the synopsis", cmd.Name())
		}
		if cmd.Name() == "completion" {
			continue // its flags are cobra's
		}
		flags := map[string]bool{}
		for _, c := range append(cmd.Commands(), cmd) {
			note := func(f *pflag.Flag) {
				flags[f.Name] = true
				if !strings.Contains(text, "--"+f.Name) {
					t.Errorf("%s --%s is not explained", c.CommandPath(), f.Name)
				}
			}
			c.Flags().VisitAll(note)
			c.PersistentFlags().VisitAll(note)
			if c != cmd && !strings.Contains(text, c.Name()) {
				t.Errorf("%s is not explained", c.CommandPath())
			}
		}
		for _, m := range regexp.MustCompile("(?m)^`.*--([a-z0-9-]+)").FindAllStringSubmatch(text, -1) {
			if !flags[m[1]] {
				t.Errorf("penstock %s has no flag --%s", cmd.Name(), m[1])
			}
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^### ([a-z]+)$`).FindAllStringSubmatch(doc, -1) {
		if verbs[m[1]] == nil {
			t.Errorf("there is no penstock %s", m[1])
		}
	}

	known := map[string]bool{}
	for _, key := range config.Keys() {
		known[key] = true
		dot := strings.LastIndexByte(key, '.')
		table, name := key[:dot], key[dot+1:]
		if !strings.Contains(section(t, doc, heading(table)), "`"+name+"`") {
			t.Errorf("%s is not explained", key)
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^### \[+([a-z.]+)\]+$`).FindAllStringSubmatch(doc, -1) {
		text := section(t, doc, heading(m[1]))
		for _, k := range regexp.MustCompile("(?m)^(?:\\| )?`([a-z_]+)`(?:, `([a-z_]+)`)?").FindAllStringSubmatch(text, -1) {
			for _, name := range k[1:] {
				if name != "" && !known[m[1]+"."+name] {
					t.Errorf("there is no %s.%s", m[1], name)
				}
			}
		}
	}
}

// TestServerDocs: docs/server.md explains every key of a server's configuration that is not a node's too, and none that does
// not exist.
func TestServerDocs(t *testing.T) {
	b, err := os.ReadFile("../../docs/server.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	nodes := map[string]bool{}
	for _, key := range config.Keys() {
		nodes[key] = true
	}
	known := map[string]bool{}
	for _, key := range config.ServerKeys() {
		known[key] = true
		if nodes[key] {
			continue
		}
		dot := strings.LastIndexByte(key, '.')
		table, name := key[:dot], key[dot+1:]
		if !strings.Contains(section(t, doc, heading(table)), "`"+name+"`") {
			t.Errorf("%s is not explained", key)
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^### \[+([a-z.]+)\]+$`).FindAllStringSubmatch(doc, -1) {
		text := section(t, doc, heading(m[1]))
		for _, k := range regexp.MustCompile("(?m)^\\| `([a-z_]+)`(?:, `([a-z_]+)`)?").FindAllStringSubmatch(text, -1) {
			for _, name := range k[1:] {
				if name != "" && !known[m[1]+"."+name] {
					t.Errorf("there is no %s.%s", m[1], name)
				}
			}
		}
	}
}

func heading(table string) string {
	switch table {
	case "group":
		return "### [[" + table + "]]"
	case "peer", "forward", "publish", "dns.split", "router.rule", "acl":
		return "### [[" + table + "]]"
	}
	return "### [" + table + "]"
}
