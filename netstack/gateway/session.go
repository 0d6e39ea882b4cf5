package gateway

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A session is a user who has signed in, from then until he says goodbye or is forgotten. Its tunnel comes
// and goes.
type session struct {
	id     string
	table  *sessionTable
	public string // the ID that people see: the begin of id

	connecting sync.Mutex // held by a CONNECT, from looking at the record to having a tunnel

	mu      sync.Mutex
	rec     *record // nil until it is loaded, and never again
	raw     []byte  // rec as the store has it
	tunnel  *tunnel // nil: no client now
	ended   bool
	left    time.Time // when the tunnel was lost, or the session made
	touched time.Time // when the store was last told that it lives
	asked   time.Time // when Users were last asked about it
	packets uint64    // data packets when last looked at
	active  time.Time // when packets was last another number
}

// sessionTable has the sessions of this server: those with a tunnel, and those that had one not long ago.
type sessionTable struct {
	s *Server

	mu    sync.Mutex
	byID  map[string]*session
	inUse map[netip.Addr]string // address -> ID
	busy  map[netip.Addr]time.Time
}

func newSessionTable(s *Server) *sessionTable {
	return &sessionTable{s: s, byID: map[string]*session{}, inUse: map[netip.Addr]string{}, busy: map[netip.Addr]time.Time{}}
}

// publicID is how people see a session: enough of its ID to tell it from others, and no
// help in guessing a cookie, of which the ID is a hash.
func publicID(id string) string { return id[:8] }

// signInLife is how long a cookie is good before its first CONNECT.
const signInLife = 5 * time.Minute

// create makes a session for user, whose oldest one without a client gives way if he has too many. It
// returns an *openconnect.UnavailableError when all of them have one.
func (t *sessionTable) create(ctx context.Context, user *User, group string, c *openconnect.Client) (cookie string, err error) {
	store := t.s.cfg.Store
	cookie = newCookie()
	id := idOf(cookie)
	profile, _ := t.s.groups.profile(group)
	now := time.Now()
	rec := &record{User: user.Name, Group: group, Agent: c.UserAgent, Created: now, Remote: c.Remote, Life: int(signInLife / time.Second)}
	if profile.SessionTimeout > 0 {
		rec.Expires = now.Add(profile.SessionTimeout)
	}
	for range retries {
		l, err := loadIDs(ctx, store, user.Name)
		if err != nil {
			return "", err
		}
		ids, again, err := t.makeRoom(ctx, l.ids)
		if err != nil {
			return "", err
		}
		if again {
			continue
		}
		err = store.Update(ctx,
			Change{Key: sessionKey + id, New: rec.marshal(), TTL: rec.ttl()},
			l.change(user.Name, append(ids, id), max(rec.ttl(), profile.DisconnectedTimeout)*2))
		if err == nil {
			return cookie, nil
		}
		if !errors.Is(err, ErrConflict) {
			return "", err
		}
	}
	return "", ErrConflict
}

// makeRoom is the sessions among ids that are to stay when one more comes; again: some were ended, and the
// list is another now.
func (t *sessionTable) makeRoom(ctx context.Context, ids []string) (stay []string, again bool, err error) {
	type candidate struct {
		id      string
		created time.Time
	}
	var idle []candidate
	for _, id := range ids {
		r, _, err := loadRecord(ctx, t.s.cfg.Store, id)
		if err != nil {
			return nil, false, err
		}
		if r == nil {
			continue // expired
		}
		stay = append(stay, id)
		if !r.Connected {
			idle = append(idle, candidate{id, r.Created})
		}
	}
	excess := len(stay) + 1 - t.s.cfg.MaxPerUser
	if excess <= 0 {
		return stay, false, nil
	}
	if excess > len(idle) {
		return nil, false, &openconnect.UnavailableError{Reason: "You have too many sessions already."}
	}
	slices.SortFunc(idle, func(a, b candidate) int { return a.created.Compare(b.created) })
	for _, c := range idle[:excess] {
		if err := t.endID(ctx, c.id, "displaced by a new one of the user"); err != nil {
			return nil, false, err
		}
	}
	return nil, true, nil
}

// endID ends a session that may be known to the store alone.
func (t *sessionTable) endID(ctx context.Context, id, why string) error {
	if s := t.find(id); s != nil {
		s.end(ctx, why)
		return nil
	}
	return endRecord(ctx, t.s.cfg.Store, id)
}

func (t *sessionTable) find(id string) *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byID[id]
}

// open is the session of an ID, which may not exist.
func (t *sessionTable) open(id string) *session {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byID[id]
	if s == nil {
		s = &session{id: id, table: t, public: publicID(id)}
		t.byID[id] = s
	}
	return s
}

// enter is open with connecting held, of a session that is still in the table then.
func (t *sessionTable) enter(id string) *session {
	for {
		s := t.open(id)
		s.connecting.Lock()
		if t.find(id) == s {
			return s
		}
		s.connecting.Unlock()
	}
}

// all are the sessions, in no order.
func (t *sessionTable) all() []*session {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*session, 0, len(t.byID))
	for _, s := range t.byID {
		list = append(list, s)
	}
	return list
}

// forget drops s from the table, with the addresses that it has there.
func (t *sessionTable) forget(s *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[s.id] == s {
		delete(t.byID, s.id)
		t.holdLocked(s, nil)
	}
}

// hold makes addresses those that s keeps others on this server from. One that has been forgotten holds none.
func (t *sessionTable) hold(s *session, addresses []netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[s.id] != s {
		addresses = nil
	}
	t.holdLocked(s, addresses)
}

func (t *sessionTable) holdLocked(s *session, addresses []netip.Addr) {
	maps.DeleteFunc(t.inUse, func(_ netip.Addr, id string) bool { return id == s.id })
	for _, a := range addresses {
		t.inUse[a] = s.id
	}
}

// record is what is known here of the session, and what the store has; a record never changes.
func (s *session) record() (rec *record, raw []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec, s.raw
}

// endHere is end, unless another server has the session by now: it only goes from here then.
func (s *session) endHere(ctx context.Context, why string) {
	rec, _, err := loadRecord(ctx, s.table.s.cfg.Store, s.id)
	switch {
	case err != nil:
		s.drop(why) // it expires by itself
	case rec != nil && rec.Server != "" && rec.Server != s.table.s.cfg.ServerID:
		s.drop("it goes on on another server")
	default:
		s.end(ctx, why)
	}
}

// end ends the session for good: its tunnel, its addresses, its cookie.
func (s *session) end(ctx context.Context, why string) {
	rec, ok := s.drop(why)
	if !ok {
		return
	}
	if err := endRecord(ctx, s.table.s.cfg.Store, s.id); err != nil {
		// It expires by itself.
		s.table.s.log.Error("session not removed from the store", "session", s.public, "error", err)
	}
	if rec != nil {
		s.table.s.log.Info("session ended", "session", s.public, "user", rec.User, "reason", why)
	}
}

// drop ends the session here, but not in the store. ok is false when it had ended.
func (s *session) drop(why string) (rec *record, ok bool) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil, false
	}
	s.ended = true
	tunnel := s.tunnel
	s.tunnel = nil
	rec = s.rec
	s.mu.Unlock()
	if tunnel != nil {
		tunnel.terminate(why)
	}
	s.table.forget(s)
	return rec, true
}
