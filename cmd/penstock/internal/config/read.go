package config

import (
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"time"
)

// reader turns the loose values of a rawFile into typed ones and collects the
// mistakes. Each of its methods takes the path of a key, for the position, and
// the value that go-toml decoded there, nil when the key is absent.
type reader struct {
	file     string
	schema   schema
	index    *index
	mistakes Mistakes
	warnings Mistakes
}

// item is one string of the file and where it stands.
type item struct{ text, path string }

// wrong reports a mistake in the value at path.
func (r *reader) wrong(path, problem, want string) {
	r.wrongAt(path, subscript.ReplaceAllString(path, ""), problem, want)
}

// wrongAt reports a mistake at the line of path under another key.
func (r *reader) wrongAt(path, key, problem, want string) {
	r.mistakes = append(r.mistakes, Mistake{r.file, r.index.line(path), key, problem, want})
}

func (r *reader) warn(path, problem, want string) {
	key := subscript.ReplaceAllString(path, "")
	r.warnings = append(r.warnings, Mistake{r.file, r.index.line(path), key, problem, want})
}

// ok tells whether nothing has been wrong so far.
func (r *reader) ok() bool { return len(r.mistakes) == 0 }

// sorted returns the mistakes by line; nil when there are none.
func (r *reader) sorted() error {
	if r.ok() {
		return nil
	}
	sort.SliceStable(r.mistakes, func(i, j int) bool { return r.mistakes[i].Line < r.mistakes[j].Line })
	return r.mistakes
}

// typeOf names the type of a value that go-toml decoded into an any.
func typeOf(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case bool:
		return "true or false"
	case int64:
		return "an integer"
	case float64:
		return "a number with a fraction"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	default:
		return "a date or a time"
	}
}

func (r *reader) text(path string, v any, want string) (string, bool) {
	switch v := v.(type) {
	case nil:
		return "", false
	case string:
		if v == "" {
			r.wrong(path, "is empty", want)
		}
		return v, v != ""
	default:
		r.wrong(path, "is "+typeOf(v), want)
		return "", false
	}
}

// texts reads a string or a list of strings.
func (r *reader) texts(path string, v any, want string) (items []item) {
	list, isList := v.([]any)
	if !isList {
		if s, ok := r.text(path, v, want); ok {
			items = append(items, item{s, path})
		}
		return items
	}
	for i, e := range list {
		p := element(path, i)
		if s, ok := r.text(p, e, want); ok {
			items = append(items, item{s, p})
		}
	}
	return items
}

// integer reads a whole number from least to most; 0 when it is absent.
func (r *reader) integer(path string, v any, least, most int64) int64 {
	want := fmt.Sprintf("a whole number from %d to %d", least, most)
	switch v := v.(type) {
	case nil:
		return 0
	case int64:
		if v < least || v > most {
			r.wrong(path, fmt.Sprintf("is %d", v), want)
			return 0
		}
		return v
	default:
		r.wrong(path, "is "+typeOf(v), want)
		return 0
	}
}

// flag reads true or false; absent is true, so that the zero value of what
// leaves something out keeps it in.
func (r *reader) flag(path string, v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case bool:
		return v
	default:
		r.wrong(path, "is "+typeOf(v), "true or false")
		return true
	}
}

// duration reads a time such as "10s"; 0 when it is absent. With off, "off" is
// -1.
func (r *reader) duration(path string, v any, least, most time.Duration, off bool) time.Duration {
	want := fmt.Sprintf("a time from %v to %v, such as %q", least, most, least*2)
	if off {
		want += `, or "off"`
	}
	s, ok := r.text(path, v, want)
	switch {
	case !ok:
		return 0
	case off && s == "off":
		return -1
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		r.wrong(path, quoted(s)+" is not a time", want)
		return 0
	}
	if d < least || d > most {
		r.wrong(path, fmt.Sprintf("%v is out of range", d), want)
		return 0
	}
	return d
}

// size reads a number of bytes, 4194304 or "4MiB"; 0 when it is absent.
func (r *reader) size(path string, v any, least, most int64) int {
	want := fmt.Sprintf("a size from %s to %s, such as %q", FormatSize(least), FormatSize(most), "4MiB")
	var n int64
	switch v := v.(type) {
	case nil:
		return 0
	case int64:
		n = v
	default:
		s, ok := r.text(path, v, want)
		if !ok {
			return 0
		}
		if n, ok = ParseSize(s); !ok {
			r.wrong(path, quoted(s)+" is not a size", want)
			return 0
		}
	}
	if n < least || n > most {
		r.wrong(path, fmt.Sprintf("%s is out of range", FormatSize(n)), want)
		return 0
	}
	return int(n)
}

var units = []struct {
	suffix string
	shift  uint
}{{"GiB", 30}, {"MiB", 20}, {"KiB", 10}, {"B", 0}, {"", 0}}

// ParseSize reads bytes written as a whole number with or without one of the
// units B, KiB, MiB and GiB.
func ParseSize(s string) (int64, bool) {
	for _, u := range units {
		digits, has := strings.CutSuffix(s, u.suffix)
		if !has {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(digits), 10, 64)
		if err != nil || n < 0 || n > math.MaxInt64>>u.shift {
			return 0, false
		}
		return n << u.shift, true
	}
	return 0, false
}

// FormatSize writes n bytes in the largest unit that divides it.
func FormatSize(n int64) string {
	for _, u := range units {
		if n != 0 && u.shift > 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}
