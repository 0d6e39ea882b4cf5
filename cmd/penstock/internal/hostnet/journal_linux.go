package hostnet

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A journal is a file with a line of JSON for the owner and one for each step, written before the
// step is taken. The owner holds a lock on the file for as long as it lives; the kernel gives it up
// whatever ends the process. The file goes when all steps have been taken back.
//
// It is on a file system that a restart of the machine empties, as that takes back all steps but
// one: /etc/resolv.conf says itself where the file before it is (see resolvconf_linux.go).
type journal struct {
	path  string
	file  *os.File
	owner owner
	steps []step
}

// owner is the first line of a journal.
type owner struct {
	PID       int    `json:"pid"`
	Owner     string `json:"owner"`
	Interface string `json:"interface"`
	Index     int    `json:"index"` // of the interface
	NetNS     string `json:"netns"` // what /proc/PID/ns/net of the owner points to
}

// defaultFolder is where journals are: /run/penstock, or else the folder other of the user's, which
// is made if need be.
func defaultFolder(other string) (string, error) {
	const folder = "/run/penstock"
	if err := os.Mkdir(folder, 0o755); err == nil || errors.Is(err, fs.ErrExist) {
		if unix.Access(folder, unix.W_OK|unix.X_OK) == nil {
			return folder, nil
		}
	}
	if err := os.MkdirAll(other, 0o700); err != nil {
		return "", err
	}
	return other, nil
}

// Folder is where the journals of this user are. other is taken where /run/penstock cannot be
// written to.
func Folder(other string) string {
	folder, err := defaultFolder(other)
	if err != nil {
		return other // whose absence the first use of it reports
	}
	return folder
}

// thisNetNS names the network namespace of the thread.
func thisNetNS() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }

const journalEnd = ".journal"

// journalPath is unique to an interface of a network namespace. Interfaces of the namespace that the
// machine, or the container, started with have their bare name.
func journalPath(folder, name, ns string) string {
	if first, err := os.Readlink("/proc/1/ns/net"); err == nil && first != ns {
		return otherJournalPath(folder, name, ns)
	}
	return filepath.Join(folder, name+journalEnd)
}

// otherJournalPath is unique whatever the process with number 1 is, or may be known to be.
func otherJournalPath(folder, name, ns string) string {
	return filepath.Join(folder, name+"@"+strings.Trim(strings.TrimPrefix(ns, "net:"), "[]")+journalEnd)
}

// newJournal opens the journal of an interface here. Where one with its bare name is a living node's of another namespace
// (containers that share the folder; users who may not look at process 1), it is told apart as others are.
func newJournal(folder, name, ns string) (*journal, error) {
	j, err := openJournal(journalPath(folder, name, ns), os.O_CREATE)
	var used *inUseError
	if errors.As(err, &used) && used.owner.NetNS != ns {
		return openJournal(otherJournalPath(folder, name, ns), os.O_CREATE)
	}
	return j, err
}

// An inUseError is ErrInUse with who it is.
type inUseError struct {
	path  string
	owner owner
}

func (e *inUseError) Unwrap() error { return ErrInUse }
func (e *inUseError) Error() string {
	return fmt.Sprintf("%v: process %d (%s) is at work on interface %s, says %s", ErrInUse, e.owner.PID, e.owner.Owner, e.owner.Interface, e.path)
}

// lockFolder keeps other nodes from taking and taking back steps in which they could meet: which
// table is free, whose journal is dead.
//
// What a journal says is done without asking, so nobody else may be able to write one.
func lockFolder(folder string) (unlock func(), err error) {
	st, err := os.Stat(folder)
	if err != nil {
		return nil, err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != os.Geteuid() || st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s: others can write to it, or it belongs to another user", folder)
	}
	f, err := os.OpenFile(filepath.Join(folder, ".hostnet.lock"), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return nil, err
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); err != unix.EINTR {
			return err
		}
	}
}

// openJournal opens the journal at path, which it locks. It fails with ErrInUse if the owner lives.
func openJournal(path string, flags int) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|flags, 0o600)
	if err != nil {
		return nil, err
	}
	err = flock(f, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		j := &journal{path: path, file: f}
		j.read() // for the message alone
		f.Close()
		return nil, &inUseError{path, j.owner}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	j := &journal{path: path, file: f}
	if err := j.same(); err != nil {
		f.Close()
		return nil, err
	}
	if err := j.read(); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return j, nil
}

// same fails if the owner has removed the file between its opening and its lock. Nobody makes a new
// one meanwhile, for the folder is locked.
func (j *journal) same() error {
	ours, err := j.file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Stat(j.path)
	if err == nil && !os.SameFile(ours, there) {
		err = fs.ErrNotExist
	}
	return err
}

func (j *journal) rewind() error {
	_, err := j.file.Seek(0, io.SeekStart)
	return err
}

// read reads what is there. A last line that is cut off was written by a process that died before it
// took the step.
func (j *journal) read() error {
	if err := j.rewind(); err != nil {
		return err
	}
	r := bufio.NewReader(j.file)
	for n := 0; ; n++ {
		line, err := r.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if n == 0 {
			if err := json.Unmarshal(line, &j.owner); err != nil {
				return err
			}
			continue
		}
		var s step
		if err := json.Unmarshal(line, &s); err != nil {
			return err
		}
		if s.Void && len(j.steps) > 0 {
			j.steps = j.steps[:len(j.steps)-1]
		} else if !s.Void {
			j.steps = append(j.steps, s)
		}
	}
}

func (j *journal) line(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = j.file.Write(append(b, '\n'))
	return err
}

// add writes a step down.
func (j *journal) add(s step) error {
	j.steps = append(j.steps, s)
	if err := j.line(&s); err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	return nil
}

// void crosses out the last step, which changed nothing.
func (j *journal) void() error {
	j.steps = j.steps[:len(j.steps)-1]
	if err := j.line(step{Void: true}); err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	return nil
}

// takeBack takes back all steps, the last one first, and removes the journal, unless something could
// not be taken back. The lock is given up.
func (j *journal) takeBack(h *host) error {
	var errs []error
	for i := len(j.steps) - 1; i >= 0; i-- {
		if err := j.steps[i].undo(h); err != nil {
			errs = append(errs, fmt.Errorf("take back %v: %w", &j.steps[i], err))
		}
	}
	if len(errs) == 0 {
		errs = append(errs, os.Remove(j.path))
	}
	j.file.Close()
	return errors.Join(errs...)
}
