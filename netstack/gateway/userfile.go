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

	"golang.org/x/crypto/bcrypt"
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
	low, high := set.costs()
	f.decoys.between(low, high+1) // made now, while nobody waits
}

// settleTime is how long a file that is written in place has to be left alone until it is read: half of it, a user a line, looks like
// all of it. One that takes the place of the old is read at once.
const settleTime = time.Second

// current is the users as they are now.
func (f *UserFile) current() *UserSet {
	f.mu.Lock()
	defer f.mu.Unlock()
	state, err := stateOf(f.path)
	if err != nil {
		f.log.Error("users are as before", "error", err)
		return f.set
	}
	if state.same(f.state) {
		return f.set
	}
	if age := time.Since(state.modified); age >= 0 && age < settleTime && os.SameFile(state.info, f.state.info) {
		return f.set
	}
	set, err := ReadUsers(f.path)
	if err != nil {
		f.log.Error("users are as before", "error", err)
		f.state = state // complain once
		return f.set
	}
	f.take(set, state)
	f.log.Info("users read again", "file", f.path, "users", len(set.entries))
	return f.set
}

// hashes are what a password for e is to be checked with, who may be nil: the first decides, and together they take the
// time of the dearest hash in the file.
func (f *UserFile) hashes(set *UserSet, e *UserEntry) (hash string, others []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, high := set.costs()
	if e == nil {
		return f.decoys.of(high), nil
	}
	cost, err := bcrypt.Cost([]byte(e.Hash))
	if err != nil {
		cost = high // never: it was looked at when it was read
	}
	return e.Hash, f.decoys.between(cost, high)
}

// Password implements [Users].
func (f *UserFile) Password(ctx context.Context, name, password string) (*User, error) {
	set := f.current()
	e := set.find(name)
	if e != nil && (e.Hash == noPassword || e.Disabled) {
		e = nil
	}
	hash, others := f.hashes(set, e)
	if err := f.gate.check(ctx, hash, password, others...); err != nil {
		return nil, err
	}
	if e == nil {
		return nil, ErrDenied // a decoy's password, guessed
	}
	return e.user(), nil
}

// User implements [Users].
func (f *UserFile) User(_ context.Context, name string) (*User, error) {
	e := f.current().find(name)
	if e == nil || e.Disabled {
		return nil, ErrDenied
	}
	return e.user(), nil
}

// Reserved implements [Reserver].
func (f *UserFile) Reserved(a netip.Addr, name string) bool {
	owner, ok := f.current().owners[a]
	return ok && owner != name
}

func (e *UserEntry) user() *User {
	return &User{Name: e.Name, Groups: slices.Clone(e.Groups), Addresses: slices.Clone(e.Addresses), Secret: e.Secret}
}
