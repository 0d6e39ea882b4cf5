package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unicode"

	"github.com/pelletier/go-toml/v2"
)

// maxFile is far more than any configuration: 1,000 peers take about 200 KB.
const maxFile = 4 << 20

// Load reads the file. Its error is [Mistakes], or what the system says when the
// file cannot be read.
func Load(file string) (*Config, error) {
	data, mode, err := readFile(file)
	if err != nil {
		return nil, err
	}
	c, err := Parse(file, data, func(name string) ([]byte, fs.FileMode, error) {
		return readFile(beside(file, name))
	})
	if err != nil {
		return nil, err
	}
	if c.Node.Socket != "" {
		c.Node.Socket = beside(file, c.Node.Socket)
	}
	if inline := !bytes.Contains(data, []byte("private_key_file")); inline && othersRead(mode) {
		c.Warnings = append(c.Warnings, Mistake{File: file,
			Problem: fmt.Sprintf("holds the private key and can be read by every user (mode %04o)", mode.Perm()), Want: "0600"})
	}
	return c, nil
}

// Socket is the path of the control socket that a file names, of a node or of a server; empty: the default. It is for
// those who look for what runs already: whatever else is in the file may be wrong by now, or not theirs to read, as a key is.
func Socket(file string) (string, error) {
	data, _, err := readFile(file)
	if err != nil {
		return "", err
	}
	var whole map[string]any
	if err := toml.Unmarshal(data, &whole); err != nil {
		return "", Mistakes{syntax(file, err)}
	}
	for _, name := range []string{"node", "server"} {
		if table, ok := whole[name].(map[string]any); ok {
			if path, ok := table["control"].(string); ok && path != "" {
				return beside(file, path), nil
			}
		}
	}
	return "", nil
}

// beside resolves a path of the file relative to the file's folder.
func beside(file, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(filepath.Dir(file), name)
}

func readFile(name string) ([]byte, fs.FileMode, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("%s: is larger than %s", name, FormatSize(maxFile))
	}
	return data, st.Mode(), err
}

// othersRead tells whether every user of the machine can read a file of this
// mode. Windows has access lists instead, which Go does not show.
func othersRead(mode fs.FileMode) bool {
	return runtime.GOOS != "windows" && mode.Perm()&0o004 != 0
}

// KeyFile reads the file that private_key_file names.
type KeyFile func(name string) ([]byte, fs.FileMode, error)

// Parse checks data, the content of file. Its error is [Mistakes]. It borrows data.
func Parse(file string, data []byte, keyFile KeyFile) (*Config, error) {
	raw, r, err := decode[rawFile](file, data, nodeSchema)
	if err != nil {
		return nil, err
	}
	c := &Config{File: file}
	c.Node = r.node(&raw.Node, keyFile)
	for i := range raw.Peer {
		c.Peers = append(c.Peers, r.peer(element("peer", i), &raw.Peer[i]))
	}
	for i := range raw.Forward {
		c.Forwards = append(c.Forwards, r.port(element("forward", i), &raw.Forward[i]))
	}
	for i := range raw.Publish {
		c.Publishes = append(c.Publishes, r.port(element("publish", i), &raw.Publish[i]))
	}
	c.DNS = r.dns(&raw.DNS)
	c.Router = r.router(&raw.Router, c.Peers)
	for i := range raw.ACL {
		c.ACL = append(c.ACL, r.acl(element("acl", i), &raw.ACL[i], c.Peers))
	}
	c.ACLLimits = r.filter(&raw.Filter, len(c.ACL))
	c.Proxy = r.proxy(&raw.Proxy)
	c.TUN = r.tun(raw.Node.Device, &raw.TUN)
	c.Offload = r.offload(&raw.Offload)
	c.TCP = r.tcp(&raw.TCP)
	c.Timing = r.timing(&raw.Timing)
	r.together(c)
	if err := r.sorted(); err != nil {
		return nil, err
	}
	c.Warnings = r.warnings
	return c, nil
}

func (r *reader) offload(raw *rawOffload) Offload {
	return Offload{
		NoSuperpackets: !r.flag("offload.superpackets", raw.Superpackets),
		NoGSO:          !r.flag("offload.gso", raw.GSO),
		NoGRO:          !r.flag("offload.gro", raw.GRO),
		SendBuffer:     r.size("offload.send_buffer", raw.SendBuffer, 4<<10, 1<<30),
		ReceiveBuffer:  r.size("offload.receive_buffer", raw.ReceiveBuffer, 4<<10, 1<<30),
		MaxSegments:    int(r.integer("offload.max_segments", raw.MaxSegments, 1, 128)),
		PacingRate:     r.size("offload.pacing_rate", raw.PacingRate, 1<<10, 1<<30),
	}
}

// decode reads the TOML itself: syntax, tables and the names of keys. Raw is what s was read off.
func decode[Raw any](file string, data []byte, s schema) (*Raw, *reader, error) {
	var whole map[string]any
	if err := toml.Unmarshal(data, &whole); err != nil {
		return nil, nil, Mistakes{syntax(file, err)}
	}
	x, err := newIndex(data)
	if err != nil {
		return nil, nil, Mistakes{syntax(file, err)}
	}
	r := &reader{file: file, schema: s, index: x}
	r.checkKeys()
	r.checkTables()
	if tables := r.ok(); !tables && !onlyLeaves(r.mistakes) {
		return nil, nil, r.sorted()
	}
	var raw Raw
	d := toml.NewDecoder(bytes.NewReader(data))
	if r.ok() {
		// checkKeys has found nothing; should go-toml know better, it has the last word.
		d.DisallowUnknownFields()
	}
	if err := d.Decode(&raw); err != nil {
		return nil, nil, append(r.mistakes, syntax(file, err))
	}
	return &raw, r, nil
}

// onlyLeaves tells whether the mistakes so far leave the tables as they should
// be, so that the rest of the file can be read in spite of them.
func onlyLeaves(ms Mistakes) bool {
	for _, m := range ms {
		if !strings.HasPrefix(m.Problem, "unknown key") {
			return false
		}
	}
	return true
}

// syntax is a mistake that go-toml found. Its words name the key where there is
// one, spelled as in the file, so control characters are taken out.
func syntax(file string, err error) Mistake {
	m := Mistake{File: file}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		m.Line, _ = de.Position()
		err = de
	}
	m.Problem = strings.Map(func(c rune) rune {
		if unicode.IsPrint(c) {
			return c
		}
		return '?'
	}, strings.TrimPrefix(err.Error(), "toml: "))
	return m
}

var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

// LogLevel reads the name of a level.
func LogLevel(name string) (slog.Level, bool) {
	l, ok := logLevels[name]
	return l, ok
}
