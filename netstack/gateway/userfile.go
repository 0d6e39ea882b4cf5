package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// A UserFile is a [Users] in a file, one user a line, as htpasswd -B writes them:
//
//	name:$2y$10$...
//	name:$2y$10$...:groups=staff,ops address=10.9.0.5,fd66::5 totp=JBSWY3DPEHPK3PXP disabled
//	name:*:groups=staff
//
// The third field is Penstock's own. "*" is no password: the user has a certificate. The
// file is read again when it has changed.
type UserFile struct {
	path string
	log  *slog.Logger
	gate *passwordGate

	mu     sync.Mutex
	state  fileState // when it was read
	set    *UserSet
	decoys decoys
	decoy  string // of the cost that most users have
}

var (
	_ Users    = (*UserFile)(nil)
	_ Reserver = (*UserFile)(nil)
)

// fileState changes when a file does.
type fileState struct {
	modified time.Time
	size     int64
	info     os.FileInfo
}

func (s fileState) same(t fileState) bool {
	return s.modified.Equal(t.modified) && s.size == t.size && s.info != nil && t.info != nil && os.SameFile(s.info, t.info)
}

func stateOf(path string) (fileState, error) {
	st, err := os.Stat(path)
	if err != nil {
		return fileState{}, err
	}
	return fileState{st.ModTime(), st.Size(), st}, nil
}

// OpenUserFile reads the file, and fails if it has a mistake. Later mistakes are logged, and the users are as
// before.
func OpenUserFile(path string, log *slog.Logger) (*UserFile, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &UserFile{path: path, log: log, gate: newPasswordGate(), decoys: decoys{}}
	state, err := stateOf(path)
	if err != nil {
		return nil, fmt.Errorf("gateway: users: %w", err)
	}
	set, err := ReadUsers(path)
	if err != nil {
		return nil, err
	}
	f.take(set, state)
	return f, nil
}

// take makes set the users. mu is held, or f is new.
func (f *UserFile) take(set *UserSet, state fileState) {
	f.set, f.state = set, state
	f.decoy = f.decoys.of(set.usualCost())
}

// current is the users as they are now, and the hash for those who are none of them.
func (f *UserFile) current() (*UserSet, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, err := stateOf(f.path)
	if err != nil {
		f.log.Error("users are as before", "error", err)
		return f.set, f.decoy
	}
	if state.same(f.state) {
		return f.set, f.decoy
	}
	set, err := ReadUsers(f.path)
	if err != nil {
		f.log.Error("users are as before", "error", err)
		f.state = state // complain once
		return f.set, f.decoy
	}
	f.take(set, state)
	f.log.Info("users read again", "file", f.path, "users", len(set.entries))
	return f.set, f.decoy
}

// Password implements [Users].
func (f *UserFile) Password(ctx context.Context, name, password string) (*User, error) {
	set, hash := f.current()
	e := set.find(name)
	if usable := e != nil && e.Hash != noPassword && !e.Disabled; usable {
		hash = e.Hash
	} else {
		e = nil
	}
	if err := f.gate.check(ctx, hash, password); err != nil {
		return nil, err
	}
	if e == nil {
		return nil, ErrDenied // a decoy's password, guessed
	}
	return e.user(), nil
}

// User implements [Users].
func (f *UserFile) User(_ context.Context, name string) (*User, error) {
	set, _ := f.current()
	e := set.find(name)
	if e == nil || e.Disabled {
		return nil, ErrDenied
	}
	return e.user(), nil
}

// Reserved implements [Reserver].
func (f *UserFile) Reserved(a netip.Addr, name string) bool {
	set, _ := f.current()
	owner, ok := set.owners[a]
	return ok && owner != name
}

func (e *UserEntry) user() *User {
	return &User{Name: e.Name, Groups: slices.Clone(e.Groups), Addresses: slices.Clone(e.Addresses), Secret: e.Secret}
}
