package config

import (
	"fmt"
	"sort"

	"github.com/pelletier/go-toml/v2/unstable"
)

// index tells where in a file each key and each element of a list stands, and
// whether a table was written with one bracket or with two. Decoding into Go
// values forgets both, and a mistake found later needs them.
//
// Paths are written "node.mtu", "peer[1].allowed_ips[0]".
type index struct {
	lines []int                    // offset of the start of each line
	at    map[string]int           // path -> offset
	kinds map[string]unstable.Kind // path of a table or value -> how it was written
	keys  []string                 // every path that was written as a key, in order
	count map[string]int           // path of an array of tables -> how many so far
}

// newIndex walks data, which must be a valid TOML document.
func newIndex(data []byte) (*index, error) {
	x := &index{
		lines: []int{0},
		at:    map[string]int{},
		kinds: map[string]unstable.Kind{},
		count: map[string]int{},
	}
	for i, c := range data {
		if c == '\n' {
			x.lines = append(x.lines, i+1)
		}
	}
	var p unstable.Parser
	p.Reset(data)
	table := ""
	for p.NextExpression() {
		switch e := p.Expression(); e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = x.table(e)
		case unstable.KeyValue:
			x.keyValue(table, e)
		}
	}
	return x, p.Error()
}

// table notes the header of a table and returns the path of what follows it.
func (x *index) table(e *unstable.Node) string {
	path := ""
	it := e.Key()
	for it.Next() {
		key := it.Node()
		path = join(path, string(key.Data))
		if !it.IsLast() {
			x.note(path, key, unstable.Table)
			if n := x.count[path]; n > 0 {
				path = element(path, n-1)
			}
			continue
		}
		x.note(path, key, e.Kind)
		if e.Kind == unstable.ArrayTable {
			n := x.count[path]
			x.count[path]++
			path = element(path, n)
			x.note(path, key, unstable.Table)
		}
	}
	return path
}

// keyValue notes one assignment and, where its value is a list or an inline
// table, what is in it.
func (x *index) keyValue(table string, e *unstable.Node) {
	path := table
	it := e.Key()
	for it.Next() {
		key := it.Node()
		path = join(path, string(key.Data))
		kind := unstable.Table // a dotted key makes one
		if it.IsLast() {
			kind = e.Value().Kind
		}
		x.note(path, key, kind)
	}
	x.value(path, e.Value())
}

func (x *index) value(path string, v *unstable.Node) {
	it := v.Children()
	switch v.Kind {
	case unstable.Array:
		for n := 0; it.Next(); {
			e := it.Node()
			if e.Kind == unstable.Comment {
				continue
			}
			p := element(path, n)
			x.note(p, e, e.Kind)
			x.value(p, e)
			n++
		}
	case unstable.InlineTable:
		for it.Next() {
			if it.Node().Kind == unstable.KeyValue {
				x.keyValue(path, it.Node())
			}
		}
	}
}

func (x *index) note(path string, n *unstable.Node, kind unstable.Kind) {
	if _, known := x.kinds[path]; known {
		return
	}
	x.kinds[path] = kind
	if n.Raw.Length > 0 {
		x.at[path] = int(n.Raw.Offset)
	}
	if n.Kind == unstable.Key {
		x.keys = append(x.keys, path)
	}
}

// line returns the line of path, or of the nearest table or list around it; 0
// when there is none.
func (x *index) line(path string) int {
	for ; path != ""; path = parent(path) {
		if offset, ok := x.at[path]; ok {
			return sort.SearchInts(x.lines, offset+1)
		}
	}
	return 0
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func element(path string, n int) string { return fmt.Sprintf("%s[%d]", path, n) }

// parent cuts the last key or index off a path.
func parent(path string) string {
	for i := len(path) - 1; i > 0; i-- {
		if path[i] == '.' || path[i] == '[' {
			return path[:i]
		}
	}
	return ""
}
