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
	rec, _ := s.record()
	if err != nil {
		switch {
		case errors.Is(err, openconnect.ErrCookie):
			s.drop("its cookie is not good")
			c.s.log.Info("cookie refused", "session", s.public, "remote", a.Client.Remote)
		case rec == nil:
			c.s.sessions.forget(s) // anybody's cookie
		}
		return nil, err
	}
	settle(ctx, true)
	profile, ok := c.s.groups.profile(rec.Group)
	if !ok {
		s.end(ctx, "its group is no more")
		return nil, openconnect.ErrCookie
	}
	if err := c.s.sessions.admit(s); err != nil {
		return nil, err
	}
	err = s.lease(ctx, user, a.Request, &profile, a.Client.Remote)
	if errors.Is(err, errStore) && len(rec.Address) > 0 && rec.Server == c.s.cfg.ServerID {
		c.s.log.Error("addresses not written down: going on with those of before", "session", s.public, "error", err)
		err = nil // upkeep writes it down
	}
	if err != nil {
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
	if rec != nil {
		s.rec, s.raw = rec, raw
	}
	if err == nil {
		s.touched = time.Now() // it lives
	}
	if s.left.IsZero() {
		s.left = time.Now()
	}
	s.mu.Unlock()
	if err != nil && !known {
		return nil, storeError(err)
	}
	if rec == nil || !rec.Expires.IsZero() && time.Now().After(rec.Expires) {
		return nil, openconnect.ErrCookie
	}
	user, err := srv.cfg.Users.User(ctx, rec.User)
	if why := srv.groups.shut(user, err, rec.Group); why != "" {
		s.end(ctx, why)
		return nil, openconnect.ErrCookie
	}
	return user, err
}

// errStore: the store does not answer.
var errStore = errors.New("gateway: store")

func storeError(err error) error { return fmt.Errorf("%w: %w", errStore, err) }

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
		old, oldRaw := s.record()
		rec := *old
		var changes []Change
		rec.Address = nil
		for _, is4 := range []bool{true, false} {
			if is4 && !r.IPv4 || !is4 && !(r.IPv6 && r.FullIPv6) {
				continue
			}
			a, change, err := s.address(ctx, user, old, profile, is4)
			if err != nil {
				t.hold(s, old.Address)
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
		for _, a := range old.Address {
			if slices.Contains(rec.Address, a) {
				continue
			}
			// The client wants it no more, or the profile is another; or others have it.
			owner, err := t.s.cfg.Store.Get(ctx, leaseKey+a.String())
			if err != nil {
				t.hold(s, old.Address)
				return storeError(err)
			}
			if string(owner) == s.id {
				changes = append(changes, Change{Key: leaseKey + a.String(), Old: owner})
			}
		}
		rec.Server, rec.Connected, rec.Remote = t.s.cfg.ServerID, true, remote
		rec.Life = int(max(profile.DisconnectedTimeout, minLife) / time.Second)
		for i := range changes {
			changes[i].TTL = rec.ttl()
		}
		raw := rec.marshal()
		changes = append(changes, Change{Key: sessionKey + s.id, Old: oldRaw, New: raw, TTL: rec.ttl()})
		err := t.s.cfg.Store.Update(ctx, changes...)
		if err == nil {
			s.took(&rec, raw)
			return nil
		}
		t.hold(s, old.Address)
		if !errors.Is(err, ErrConflict) {
			return storeError(err)
		}
		if err := t.afterConflict(ctx, s); err != nil {
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
	s.rec, s.raw, s.touched = rec, raw, time.Now()
	s.mu.Unlock()
	s.table.hold(s, rec.Address)
}

// address finds an address of a family for s, and what to change in the store for it; the zero Addr if there is
// none of that family to be had.
func (s *session) address(ctx context.Context, user *User, rec *record, profile *Profile, is4 bool) (netip.Addr, Change, error) {
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
		if t.s.ownAddress(static) {
			t.s.log.Error("the static address is the server's own", "user", user.Name, "address", static)
			return fail(errTaken)
		}
		owner, err := store.Get(ctx, leaseKey+static.String())
		if err != nil {
			return fail(storeError(err))
		}
		if owner == nil || string(owner) == s.id {
			return lease(static, owner)
		}
		if err := t.vacate(ctx, string(owner), user); err != nil {
			return fail(err)
		}
		return lease(static, nil)
	}
	if a := ofFamily(rec.Address); a.IsValid() && pool.contains(a) && !t.reserved(a, user) {
		owner, err := store.Get(ctx, leaseKey+a.String())
		if err != nil {
			return fail(storeError(err))
		}
		if owner == nil || string(owner) == s.id {
			return lease(a, owner)
		}
	}
	if len(pool) == 0 {
		return netip.Addr{}, Change{}, nil
	}
	for {
		a, ok := t.pick(pool, user, s.id)
		if !ok {
			return fail(errNoAddress)
		}
		owner, err := store.Get(ctx, leaseKey+a.String())
		if err != nil {
			return fail(storeError(err))
		}
		if owner == nil || string(owner) == s.id {
			return lease(a, owner)
		}
		t.elsewhere(a)
	}
}

// vacate makes the session that has a user's static address give it up: an older one of his own, perhaps of a client
// that has died.
func (t *sessionTable) vacate(ctx context.Context, id string, user *User) error {
	r, _, err := loadRecord(ctx, t.s.cfg.Store, id)
	if err != nil {
		return storeError(err)
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
// hold if nothing comes of it.
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

// busyTime is how long an address that another server has is not tried again.
const busyTime = time.Minute

// elsewhere notes that somebody has a who is not of this server.
func (t *sessionTable) elsewhere(a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.inUse, a)
	t.busy[a] = time.Now().Add(busyTime)
}

// afterConflict reads the record of s again. What else was in the way, an address that others have taken, the next
// attempt finds.
func (t *sessionTable) afterConflict(ctx context.Context, s *session) error {
	rec, raw, err := loadRecord(ctx, t.s.cfg.Store, s.id)
	if err != nil {
		return storeError(err)
	}
	if rec == nil {
		return openconnect.ErrCookie
	}
	s.mu.Lock()
	s.rec, s.raw = rec, raw
	s.mu.Unlock()
	return nil
}

// recover makes sense of what is in the store at the start. The sessions in a store of our own have no client now, whatever it
// says: we were killed. The addresses of these, and of other servers, are not to be tried in vain.
func (t *sessionTable) recover(ctx context.Context) error {
	if _, ours := t.s.cfg.Store.(*boltStore); ours {
		found, err := t.s.cfg.Store.List(ctx, sessionKey)
		if err != nil {
			return storeError(err)
		}
		var changes []Change
		for key, raw := range found {
			var r record
			if json.Unmarshal(raw, &r) != nil || !r.Connected {
				continue
			}
			r.Connected = false
			changes = append(changes, Change{Key: key, Old: raw, New: r.marshal(), TTL: r.ttl()})
		}
		if err := t.s.cfg.Store.Update(ctx, changes...); err != nil { // one, as each waits for the disk
			return storeError(err)
		}
	}
	leases, err := t.s.cfg.Store.List(ctx, leaseKey)
	if err != nil {
		return storeError(err)
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
