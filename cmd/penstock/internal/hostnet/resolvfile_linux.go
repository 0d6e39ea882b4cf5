package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// resolvFile is /etc/resolv.conf in place of which there is one of ours.
//
// Where the folder allows, the file before is moved aside, symbolic link or not, and ours moved to its
// place: no reader ever sees half a file. Where the file is a mount point, as in most containers, it
// is overwritten, and what was aside is a copy.
type resolvFile struct {
	Path    string      `json:"path"`
	Aside   string      `json:"aside"` // where the file before is
	Absent  bool        `json:"absent,omitempty"`
	Link    string      `json:"link,omitempty"`    // what it was a link to
	Content string      `json:"content,omitempty"` // what it had, unless it was a link
	Mode    fs.FileMode `json:"mode,omitempty"`
	First   string      `json:"first"` // line of ours
}

// firstLine of our file tells what to do with it. The pattern reads it back.
func firstLine(name, aside string) string {
	if aside == "" {
		return "# penstock: for interface " + name + "; there was no file before"
	}
	return "# penstock: for interface " + name + "; the file before is " + aside
}

var firstLinePattern = regexp.MustCompile(`^# penstock: for interface (\S+); (?:the file before is (\S+)|there was no file before)\n`)

func (s *State) resolvFile(servers, search []string) error {
	f := &resolvFile{Path: resolvConfPath, Mode: 0o644, Aside: resolvConfPath + ".before-" + s.host.name}
	st, err := os.Lstat(f.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.Absent, f.Aside = true, ""
	case err != nil:
		return err
	case st.Mode()&fs.ModeSymlink != 0:
		if f.Link, err = os.Readlink(f.Path); err != nil {
			return err
		}
	case !st.Mode().IsRegular():
		return fmt.Errorf("%s is no file", f.Path)
	default:
		f.Mode = st.Mode().Perm()
	}
	before, err := os.ReadFile(f.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if m := firstLinePattern.FindStringSubmatch(string(before)); m != nil {
		return fmt.Errorf("%s is that of interface %s, whose node runs (dns = false leaves the resolver alone)", f.Path, m[1])
	}
	if f.Link == "" {
		f.Content = string(before)
	}
	if st, err := os.Lstat(f.Aside); err == nil && !ordinary(st) {
		return fmt.Errorf("%s is there and is no file: %s cannot be kept as that (dns = false leaves the resolver alone)", f.Aside, f.Path)
	}
	f.First = firstLine(s.host.name, f.Aside)
	text := resolvConf(string(before), f.First, servers, search)
	err = s.take(step{File: f}, func() error { return f.replace(text) })
	if err != nil {
		return fmt.Errorf("%w (dns = false leaves the resolver alone)", err)
	}
	return nil
}

// replace puts text where the file is, which stays aside.
func (f *resolvFile) replace(text string) error {
	if f.Aside != "" {
		if err := os.Remove(f.Aside); err != nil && !errors.Is(err, fs.ErrNotExist) && !readOnly(err) {
			return err
		}
		err := f.keepAside()
		if err != nil && !readOnly(err) { // then the journal alone has it
			return err
		}
	}
	return put(f.Path, text, f.Mode)
}

// keepAside makes another name for the file, or a copy.
func (f *resolvFile) keepAside() error {
	if f.Link != "" {
		return os.Symlink(f.Link, f.Aside)
	}
	if os.Link(f.Path, f.Aside) == nil {
		return nil
	}
	return os.WriteFile(f.Aside, []byte(f.Content), f.Mode) // a mount point, or a file system without links
}

func readOnly(err error) bool {
	return errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission)
}

// put makes text the content of path: by a new file in its place, or else in the one that is there.
func put(path, text string, mode fs.FileMode) error {
	err := replaceFile(path, func(temporary string) error {
		f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		// The new name must not reach the disk before the content.
		return errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	})
	if err == nil || !notReplaceable(err) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	// The first line first, by which an interrupted write is known.
	_, err = f.WriteAt([]byte(text), 0)
	if err == nil {
		err = f.Truncate(int64(len(text)))
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// replaceFile lets create make a file under a name beside path and moves it there.
func replaceFile(path string, create func(temporary string) error) error {
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".penstock")
	os.Remove(temporary) // of one that died
	err := create(temporary)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		os.Remove(temporary)
	}
	return err
}

// notReplaceable: the file is a mount point, or only itself may be written to.
func notReplaceable(err error) bool {
	return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EXDEV) || readOnly(err)
}

// undo brings the file before back, unless somebody else has written one meanwhile.
func (f *resolvFile) undo() error {
	st, err := os.Lstat(f.Path)
	text := []byte(nil)
	if err == nil && st.Mode().IsRegular() {
		text, err = os.ReadFile(f.Path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if strings.HasPrefix(string(text), f.First+"\n") {
		if err := f.restore(); err != nil {
			return err
		}
	}
	if st, err := os.Lstat(f.Aside); err == nil && ordinary(st) {
		if err := os.Remove(f.Aside); err != nil && !readOnly(err) {
			return err
		}
	}
	return nil
}

// ordinary tells whether it is a file or a link, which is all that there can be aside.
func ordinary(st fs.FileInfo) bool { return st.Mode().IsRegular() || st.Mode()&fs.ModeSymlink != 0 }

func (f *resolvFile) restore() error {
	switch {
	case f.Absent:
		err := os.Remove(f.Path)
		if notReplaceable(err) {
			err = put(f.Path, "", f.Mode)
		}
		return err
	case f.Link != "":
		err := replaceFile(f.Path, func(temporary string) error { return os.Symlink(f.Link, temporary) })
		if err == nil || !notReplaceable(err) {
			return err
		}
		// It was a link when it was replaced, so this is a mount that came later.
		content, err := os.ReadFile(f.Aside)
		if err != nil {
			return err
		}
		return put(f.Path, string(content), f.Mode)
	}
	// The very file, if it is there still: its owner and labels with it.
	if st, err := os.Lstat(f.Aside); err == nil && st.Mode().IsRegular() {
		if b, err := os.ReadFile(f.Aside); err == nil && string(b) == f.Content && os.Rename(f.Aside, f.Path) == nil {
			return nil
		}
	}
	return put(f.Path, f.Content, f.Mode)
}

// orphan is our file whose node left no journal: the machine has been restarted since. nil: the file
// is not ours.
func orphan(path string) (f *resolvFile, name string) {
	st, err := os.Lstat(path)
	if err != nil || !st.Mode().IsRegular() {
		return nil, ""
	}
	b, err := os.ReadFile(path)
	m := firstLinePattern.FindStringSubmatch(string(b))
	if err != nil || m == nil {
		return nil, ""
	}
	f = &resolvFile{Path: path, Aside: m[2], Absent: m[2] == "", Mode: 0o644, First: strings.TrimSuffix(m[0], "\n")}
	if f.Absent {
		return f, m[1]
	}
	if f.Link, err = os.Readlink(f.Aside); err == nil {
		return f, m[1]
	}
	st, err = os.Lstat(f.Aside)
	if err == nil {
		b, err = os.ReadFile(f.Aside)
	}
	if err != nil {
		return nil, "" // nothing to bring back
	}
	f.Content, f.Mode = string(b), st.Mode().Perm()
	return f, m[1]
}
