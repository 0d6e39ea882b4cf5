package config

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Mistake is one thing wrong with a file.
type Mistake struct {
	File string
	Line int    // from 1; 0 when the file as a whole is meant
	Key  string // "peer.allowed_ips"; empty for a mistake of syntax
	// Problem says what is there, Want what is expected instead. Neither ever holds
	// a private key.
	Problem, Want string
}

// Error is "FILE:LINE: KEY: PROBLEM; expected WANT", without the parts that are
// empty.
func (m Mistake) Error() string {
	var b strings.Builder
	b.WriteString(m.File)
	if m.Line > 0 {
		fmt.Fprintf(&b, ":%d", m.Line)
	}
	b.WriteString(": ")
	if m.Key != "" {
		b.WriteString(m.Key + ": ")
	}
	b.WriteString(m.Problem)
	if m.Want != "" {
		b.WriteString("; expected " + m.Want)
	}
	return b.String()
}

// Mistakes are all that was found wrong with a file, by line.
type Mistakes []Mistake

// Error is one mistake a line.
func (ms Mistakes) Error() string {
	lines := make([]string, len(ms))
	for i, m := range ms {
		lines[i] = m.Error()
	}
	return strings.Join(lines, "\n")
}

// quoted is s as it may stand in a message: one line, and not too long for it.
func quoted(s string) string {
	const most = 60
	if len(s) > most {
		cut := most
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut] + "..."
	}
	return strconv.Quote(s)
}
