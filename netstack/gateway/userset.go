package gateway

import (
	"bytes"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

// A UserEntry is one line of a [UserFile].
type UserEntry struct {
	Name      string
	Hash      string // by [HashPassword]; "*": none
	Groups    []string
	Addresses []netip.Addr
	Secret    string
	Disabled  bool
}

// noPassword stands where a hash would.
const noPassword = "*"

// maxUserFile is far more than any: 10,000 users take a megabyte.
const maxUserFile = 64 << 20

// A UserSet is the content of a [UserFile], with its comments.
type UserSet struct {
	lines   []userLine
	entries map[string]*UserEntry
	owners  map[netip.Addr]string // of static addresses
	// The bcrypt costs of the hashes are from low to high; 0: there are none. What is removed stays counted.
	low, high int
}

// userLine is an entry, or a comment or an empty line as it was written.
type userLine struct {
	entry *UserEntry
	text  string
}

// ReadUsers reads a file whole. Its error has a line for each mistake.
func ReadUsers(path string) (*UserSet, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("gateway: users: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxUserFile+1))
	if err != nil {
		return nil, fmt.Errorf("gateway: users: %w", err)
	}
	if len(data) > maxUserFile {
		return nil, fmt.Errorf("gateway: users: %s is larger than %d MiB", path, maxUserFile>>20)
	}
	return parseUsers(path, string(data))
}

func parseUsers(path, data string) (*UserSet, error) {
	s := &UserSet{entries: map[string]*UserEntry{}, owners: map[netip.Addr]string{}}
	var errs []error
	n := 0
	for line := range strings.Lines(data) {
		n++
		line = strings.TrimRight(line, "\r\n")
		if t := strings.TrimSpace(line); t == "" || t[0] == '#' {
			s.lines = append(s.lines, userLine{text: line})
			continue
		}
		e, err := parseUser(line)
		if err == nil {
			err = s.add(e)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s:%d: %w", path, n, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return s, nil
}

// parseUser reads one line. No message has a hash or a secret in it.
func parseUser(line string) (*UserEntry, error) {
	name, rest, found := strings.Cut(line, ":")
	if !found {
		return nil, errors.New("no colon in it; expected NAME:HASH or NAME:HASH:OPTIONS")
	}
	if problem := CheckName(name); problem != "" {
		return nil, fmt.Errorf("the name %q %s", name, problem)
	}
	e := &UserEntry{Name: name}
	hash, options, _ := strings.Cut(rest, ":")
	e.Hash = hash
	if hash != noPassword {
		cost, err := bcrypt.Cost([]byte(hash))
		if err != nil || len(hash) != 60 {
			return nil, fmt.Errorf("user %s: what stands for the password is no bcrypt hash; penstock user passwd and htpasswd -B write those, and * is none", name)
		}
		if cost > maxPasswordCost {
			return nil, fmt.Errorf("user %s: the hash has a cost of %d; expected at most %d", name, cost, maxPasswordCost)
		}
	}
	for _, o := range strings.Fields(options) {
		key, value, _ := strings.Cut(o, "=")
		if err := e.option(key, value); err != nil {
			return nil, fmt.Errorf("user %s: %w", name, err)
		}
	}
	return e, nil
}

func (e *UserEntry) option(key, value string) error {
	switch key {
	case "groups":
		return e.SetGroups(strings.Split(value, ","))
	case "address":
		return e.SetAddresses(strings.Split(value, ","))
	case "totp":
		if _, err := decodeSecret(value); err != nil {
			return errors.New("totp is not base32 of 10 bytes or more")
		}
		e.Secret = value
	case "disabled":
		if value != "" {
			return errors.New("disabled has no value; leave it out to enable the user")
		}
		e.Disabled = true
	default:
		return fmt.Errorf("option %q is not known; expected groups=, address=, totp= or disabled", key)
	}
	return nil
}

// SetGroups sets the groups by name.
func (e *UserEntry) SetGroups(groups []string) error {
	e.Groups = nil
	for _, g := range groups {
		if problem := CheckName(g); problem != "" || strings.Contains(g, ",") {
			return fmt.Errorf("the group %q cannot have that name", g)
		}
		if !slices.Contains(e.Groups, g) {
			e.Groups = append(e.Groups, g)
		}
	}
	return nil
}

// SetAddresses sets the static addresses: one of each family at most.
func (e *UserEntry) SetAddresses(addresses []string) error {
	e.Addresses = nil
	for _, text := range addresses {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() {
			return fmt.Errorf("%q is no address that a user can have", text)
		}
		if slices.ContainsFunc(e.Addresses, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			return fmt.Errorf("%s is a second address of its family", a)
		}
		e.Addresses = append(e.Addresses, a)
	}
	return nil
}

// String is the line of the file.
func (e *UserEntry) String() string {
	var options []string
	if len(e.Groups) > 0 {
		options = append(options, "groups="+strings.Join(e.Groups, ","))
	}
	if len(e.Addresses) > 0 {
		var s []string
		for _, a := range e.Addresses {
			s = append(s, a.String())
		}
		options = append(options, "address="+strings.Join(s, ","))
	}
	if e.Secret != "" {
		options = append(options, "totp="+e.Secret)
	}
	if e.Disabled {
		options = append(options, "disabled")
	}
	line := e.Name + ":" + e.Hash
	if len(options) > 0 {
		line += ":" + strings.Join(options, " ")
	}
	return line
}

func (s *UserSet) add(e *UserEntry) error {
	if s.entries[e.Name] != nil {
		return fmt.Errorf("user %s is there already", e.Name)
	}
	for _, a := range e.Addresses {
		if other, taken := s.owners[a]; taken {
			return fmt.Errorf("user %s: the address %s is that of %s", e.Name, a, other)
		}
	}
	for _, a := range e.Addresses {
		s.owners[a] = e.Name
	}
	if cost, err := bcrypt.Cost([]byte(e.Hash)); err == nil {
		if s.low == 0 || cost < s.low {
			s.low = cost
		}
		s.high = max(s.high, cost)
	}
	s.entries[e.Name] = e
	s.lines = append(s.lines, userLine{entry: e})
	return nil
}

func (s *UserSet) find(name string) *UserEntry {
	if s == nil {
		return nil
	}
	return s.entries[name]
}

// Entries are copies of the users, in the file's order.
func (s *UserSet) Entries() (all []UserEntry) {
	for _, l := range s.lines {
		if l.entry != nil {
			all = append(all, *l.entry)
		}
	}
	return all
}

// Add appends a user.
func (s *UserSet) Add(e UserEntry) error {
	parsed, err := parseUser(e.String())
	if err != nil {
		return err
	}
	return s.add(parsed)
}

// Find returns a copy of a user.
func (s *UserSet) Find(name string) (UserEntry, bool) {
	if e := s.find(name); e != nil {
		return *e, true
	}
	return UserEntry{}, false
}

// Replace puts e in the place of the user of that name.
func (s *UserSet) Replace(e UserEntry) error {
	old := s.find(e.Name)
	if old == nil {
		return fmt.Errorf("there is no user %s", e.Name)
	}
	parsed, err := parseUser(e.String())
	if err != nil {
		return err
	}
	for _, a := range parsed.Addresses {
		if owner, taken := s.owners[a]; taken && owner != e.Name {
			return fmt.Errorf("the address %s is that of %s", a, owner)
		}
	}
	for _, a := range old.Addresses {
		delete(s.owners, a)
	}
	for _, a := range parsed.Addresses {
		s.owners[a] = e.Name
	}
	*old = *parsed
	return nil
}

// Remove forgets a user.
func (s *UserSet) Remove(name string) error {
	e := s.find(name)
	if e == nil {
		return fmt.Errorf("there is no user %s", name)
	}
	delete(s.entries, name)
	for _, a := range e.Addresses {
		delete(s.owners, a)
	}
	s.lines = slices.DeleteFunc(s.lines, func(l userLine) bool { return l.entry == e })
	return nil
}

// costs are the lowest and the highest bcrypt cost of the hashes; those of new ones when there are none.
func (s *UserSet) costs() (low, high int) {
	if s.low == 0 {
		return passwordCost, passwordCost
	}
	return s.low, s.high
}

// EditUsers changes the file at path, which is made if need be, by edit. Others who do the same wait. The new
// file takes the place of the old one in one step, with its mode, or 0600.
func EditUsers(path string, edit func(*UserSet) error) error {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target
	}
	unlock, err := lockBeside(path)
	if err != nil {
		return fmt.Errorf("gateway: users: lock %s: %w", path, err)
	}
	defer unlock()
	mode := fs.FileMode(0o600)
	set, err := ReadUsers(path)
	switch {
	case err == nil:
		if st, err := os.Stat(path); err == nil {
			mode = st.Mode().Perm()
		}
	case errors.Is(err, fs.ErrNotExist):
		set, _ = parseUsers(path, "") // nothing has no mistake
	default:
		return err
	}
	if err := edit(set); err != nil {
		return err
	}
	var b bytes.Buffer
	for _, l := range set.lines {
		if l.entry != nil {
			b.WriteString(l.entry.String())
		} else {
			b.WriteString(l.text)
		}
		b.WriteByte('\n')
	}
	return replaceFile(path, b.Bytes(), mode)
}

// replaceFile writes a file so that at any moment the old one or the new one is there whole.
func replaceFile(path string, data []byte, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // of mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	keepOwner(f, path)
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// secretEncoding is how people write the secrets of TOTP: base32 without padding.
var secretEncoding = base32.StdEncoding.WithPadding(base32.NoPadding)

// decodeSecret reads one. RFC 4226 4 asks for 16 bytes; some services give 10.
func decodeSecret(s string) ([]byte, error) {
	b, err := secretEncoding.DecodeString(strings.TrimRight(strings.ToUpper(s), "="))
	if err == nil && len(b) < 10 {
		err = errors.New("too short")
	}
	return b, err
}
