package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// connector admits tunnels. It implements [openconnect.Sessions].
type connector struct{ s *Server }

var _ openconnect.Sessions = connector{}

// Connect implements [openconnect.Sessions].
func (c connector) Connect(ctx context.Context, a *openconnect.Attempt) (*openconnect.Admission, error) {
	s := c.s.sessions.enter(idOf(a.Request.Cookie))
	defer s.connecting.Unlock()
	user, err := s.load(ctx)
	switch {
	case errors.Is(err, openconnect.ErrCookie):
		s.drop("its cookie is not good")
		c.s.log.Info("cookie refused", "session", s.public, "remote", a.Client.Remote)
		return nil, err
	case err != nil && s.rec == nil:
		c.s.sessions.forget(s, nil) // it may be anybody's
		return nil, err
	case err != nil:
		return nil, err
	}
	settle(ctx, true)
	profile, ok := c.s.groups.profile(s.rec.Group)
	if !ok {
		s.end(ctx, "its group is no more")
		return nil, openconnect.ErrCookie
	}
	if err := c.s.sessions.admit(s); err != nil {
		return nil, err
	}
	if err := s.lease(ctx, user, a.Request, &profile, a.Client.Remote); err != nil {
		return nil, err
	}
	return s.connect(a, &profile)
}

// Logout implements [openconnect.Sessions].
func (c connector) Logout(ctx context.Context, _ *openconnect.Client, cookie string) {
	if err := c.s.sessions.endID(ctx, idOf(cookie), "the user has signed out"); err != nil {
		c.s.log.Error("session not ended", "error", err)
	}
}

// load reads the session from the store, where another server may have changed it, and asks about its user. It
// returns ErrCookie when there is no such session any more. connecting is held.
func (s *session) load(ctx context.Context) (*User, error) {
	srv := s.table.s
	rec, raw, err := loadRecord(ctx, srv.cfg.Store, s.id)
	s.mu.Lock()
	known := s.rec != nil && !s.ended
	switch {
	case err != nil && known:
		srv.log.Error("the store does not answer: going on with what is known here", "error", err)
		rec, raw = s.rec, s.raw
	case s.ended:
		rec = nil
	}
	s.rec, s.raw = rec, raw
	if err == nil {
		s.touched = time.Now() // it lives
	}
	if s.left.IsZero() {
		s.left = time.Now()
	}
	s.mu.Unlock()
	if err != nil && !known {
		return nil, fmt.Errorf("gateway: store: %w", err)
	}
	if rec == nil || !rec.Expires.IsZero() && time.Now().After(rec.Expires) {
		return nil, openconnect.ErrCookie
	}
	user, err := srv.cfg.Users.User(ctx, rec.User)
	if errors.Is(err, ErrDenied) {
		s.end(ctx, "the user may not come in any more")
		return nil, openconnect.ErrCookie
	}
	return user, err
}

// admit finds out whether there is room for s among the clients.
func (t *sessionTable) admit(s *session) error {
	if s.connected() {
		return nil // it has its place
	}
	if t.clients() >= t.s.cfg.MaxClients {
		return &openconnect.UnavailableError{Reason: "The server is full."}
	}
	return nil
}

// clients counts the tunnels.
func (t *sessionTable) clients() (n int) {
	for _, s := range t.all() {
		if s.connected() {
			n++
		}
	}
	return n
}

func (s *session) connected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tunnel != nil
}

var (
	errNoAddress = &openconnect.UnavailableError{Reason: "No address is free."}
	errTaken     = &openconnect.UnavailableError{Reason: "Your address is in use by another session."}
)

// lease gets the session its addresses, or finds that it has them still, and writes down that it is
// connected. connecting is held.
func (s *session) lease(ctx context.Context, user *User, r *openconnect.ConnectRequest, profile *Profile, remote netip.AddrPort) error {
	t := s.table
	for range retries {
		rec := *s.rec
		var changes []Change
		rec.Address = nil
		for _, is4 := range []bool{true, false} {
			if is4 && !r.IPv4 || !is4 && !(r.IPv6 && r.FullIPv6) {
				continue
			}
			a, change, err := s.address(ctx, user, profile, is4)
			if err != nil {
				t.release(s, rec.Address)
				return err
			}
			if a.IsValid() {
				rec.Address = append(rec.Address, a)
				changes = append(changes, change)
			}
		}
		if len(rec.Address) == 0 {
			return errNoAddress
		}
		for _, a := range s.rec.Address {
			if !slices.Contains(rec.Address, a) { // the client wants it no more, or the profile is another
				changes = append(changes, Change{Key: leaseKey + a.String(), Old: []byte(s.id)})
			}
		}
		rec.Server, rec.Connected, rec.Remote = t.s.cfg.ServerID, true, remote
		rec.Life = int(max(profile.DisconnectedTimeout, minLife) / time.Second)
		for i := range changes {
			changes[i].TTL = rec.ttl()
		}
		raw := rec.marshal()
		changes = append(changes, Change{Key: sessionKey + s.id, Old: s.raw, New: raw, TTL: rec.ttl()})
		err := t.s.cfg.Store.Update(ctx, changes...)
		if err == nil {
			s.took(&rec, raw)
			return nil
		}
		t.release(s, rec.Address)
		if !errors.Is(err, ErrConflict) {
			return fmt.Errorf("gateway: store: %w", err)
		}
		if err := t.afterConflict(ctx, s, rec.Address); err != nil {
			return err
		}
	}
	return errNoAddress
}

// minLife is the least time between signs of life of a session in the store.
const minLife = 30 * time.Second

// took makes rec the session's record and its addresses known here.
func (s *session) took(rec *record, raw []byte) {
	s.mu.Lock()
	before := s.rec.Address
	s.rec, s.raw, s.touched = rec, raw, time.Now()
	s.mu.Unlock()
	t := s.table
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range before {
		if t.inUse[a] == s.id {
			delete(t.inUse, a)
		}
	}
	for _, a := range rec.Address {
		t.inUse[a] = s.id
	}
}

// address finds an address of a family for s, and what to change in the store for it; the zero Addr if there is
// none of that family to be had.
func (s *session) address(ctx context.Context, user *User, profile *Profile, is4 bool) (netip.Addr, Change, error) {
	t, store := s.table, s.table.s.cfg.Store
	lease := func(a netip.Addr, old []byte) (netip.Addr, Change, error) {
		return a, Change{Key: leaseKey + a.String(), Old: old, New: []byte(s.id)}, nil
	}
	fail := func(err error) (netip.Addr, Change, error) { return netip.Addr{}, Change{}, err }
	ofFamily := func(list []netip.Addr) netip.Addr {
		for _, a := range list {
			if a.Is4() == is4 {
				return a
			}
		}
		return netip.Addr{}
	}
	pool := profile.Pool.family(is4)
	if static := ofFamily(user.Addresses); static.IsValid() {
		owner, err := store.Get(ctx, leaseKey+static.String())
		if err != nil {
			return fail(fmt.Errorf("gateway: store: %w", err))
		}
		if owner == nil || string(owner) == s.id {
			return lease(static, owner)
		}
		if err := t.vacate(ctx, string(owner), user); err != nil {
			return fail(err)
		}
		return lease(static, nil)
	}
	if a := ofFamily(s.rec.Address); a.IsValid() && pool.contains(a) && !t.reserved(a, user) {
		owner, err := store.Get(ctx, leaseKey+a.String())
		if err != nil {
			return fail(fmt.Errorf("gateway: store: %w", err))
		}
		if owner == nil || string(owner) == s.id {
			return lease(a, owner)
		}
	}
	if len(pool) == 0 {
		return netip.Addr{}, Change{}, nil
	}
	a, ok := t.pick(pool, user, s.id)
	if !ok {
		return fail(errNoAddress)
	}
	return lease(a, nil)
}

// vacate makes the session that has a user's static address give it up: an older one of his own, perhaps of a client
// that has died.
func (t *sessionTable) vacate(ctx context.Context, id string, user *User) error {
	r, _, err := loadRecord(ctx, t.s.cfg.Store, id)
	if err != nil {
		return fmt.Errorf("gateway: store: %w", err)
	}
	if r != nil && r.User != user.Name {
		return errTaken // got from a pool before it was this user's own
	}
	return t.endID(ctx, id, "the user's address went to a new session")
}

// reserved tells whether a client of user must not have a from a pool.
func (t *sessionTable) reserved(a netip.Addr, user *User) bool {
	if t.s.ownAddress(a) {
		return true
	}
	r, ok := t.s.cfg.Users.(Reserver)
	return ok && r.Reserved(a, user.Name)
}

// pick finds an address that nobody seems to have, and keeps others on this server from it. The caller calls
// release if nothing comes of it.
func (t *sessionTable) pick(pool Pool, user *User, id string) (netip.Addr, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	a, ok := pool.pick(user.Name, func(a netip.Addr) bool {
		if _, used := t.inUse[a]; used {
			return true
		}
		if until, ok := t.busy[a]; ok {
			if now.Before(until) {
				return true
			}
			delete(t.busy, a)
		}
		return t.reserved(a, user)
	})
	if ok {
		t.inUse[a] = id
	}
	return a, ok
}

// release undoes pick for those addresses that are not the session's.
func (t *sessionTable) release(s *session, picked []netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, a := range picked {
		if t.inUse[a] == s.id && !slices.Contains(s.rec.Address, a) {
			delete(t.inUse, a)
		}
	}
}

// busyTime is how long an address that another server has is not tried again.
const busyTime = time.Minute

// afterConflict finds out what was in the way of s: of its record, which it reads again, or of addresses that others
// have, which are not tried for a while.
func (t *sessionTable) afterConflict(ctx context.Context, s *session, addresses []netip.Addr) error {
	rec, raw, err := loadRecord(ctx, t.s.cfg.Store, s.id)
	if err != nil {
		return fmt.Errorf("gateway: store: %w", err)
	}
	if rec == nil {
		return openconnect.ErrCookie
	}
	s.mu.Lock()
	s.rec, s.raw = rec, raw
	s.mu.Unlock()
	for _, a := range addresses {
		owner, err := t.s.cfg.Store.Get(ctx, leaseKey+a.String())
		if err != nil {
			return fmt.Errorf("gateway: store: %w", err)
		}
		if owner != nil && string(owner) != s.id {
			t.mu.Lock()
			t.busy[a] = time.Now().Add(busyTime)
			t.mu.Unlock()
		}
	}
	return nil
}

// recover makes sense of what is in the store at the start. The sessions in a store of our own have no client now, whatever it
// says: we were killed. The addresses of these, and of other servers, are not to be tried in vain.
func (t *sessionTable) recover(ctx context.Context) error {
	if _, ours := t.s.cfg.Store.(*boltStore); ours {
		found, err := t.s.cfg.Store.List(ctx, sessionKey)
		if err != nil {
			return fmt.Errorf("gateway: store: %w", err)
		}
		for key, raw := range found {
			var r record
			if json.Unmarshal(raw, &r) != nil || !r.Connected {
				continue
			}
			r.Connected = false
			if err := t.s.cfg.Store.Update(ctx, Change{Key: key, Old: raw, New: r.marshal(), TTL: r.ttl()}); err != nil {
				return fmt.Errorf("gateway: store: %w", err)
			}
		}
	}
	leases, err := t.s.cfg.Store.List(ctx, leaseKey)
	if err != nil {
		return fmt.Errorf("gateway: store: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key := range leases {
		if a, err := netip.ParseAddr(key[len(leaseKey):]); err == nil {
			t.busy[a] = time.Now().Add(busyTime)
		}
	}
	return nil
}
