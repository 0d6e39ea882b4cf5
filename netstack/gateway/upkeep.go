package gateway

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/penstock-vpn/penstock/transport"
)

// upkeepEvery is how often sessions are looked at.
const upkeepEvery = 2 * time.Second

// upkeep looks at all sessions now and then: ends those whose time is over, and tells the store which
// live. It ends with ctx.
func (s *Server) upkeep(ctx context.Context) {
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, session := range s.sessions.all() {
			if ctx.Err() != nil {
				return
			}
			session.look(ctx, time.Now())
		}
	}
}

// look is what upkeep does for one session.
func (s *session) look(ctx context.Context, now time.Time) {
	if !s.connecting.TryLock() {
		return // it changes right now
	}
	defer s.connecting.Unlock()
	s.mu.Lock()
	rec, ended := s.rec, s.ended
	s.mu.Unlock()
	if ended || rec == nil {
		return
	}
	profile, _ := s.table.s.groups.profile(rec.Group)
	online, left := s.presence(now, &profile)
	switch {
	case !rec.Expires.IsZero() && now.After(rec.Expires):
		s.end(ctx, "session timeout")
		return
	case online && profile.IdleTimeout > 0 && s.idle(now) > profile.IdleTimeout:
		s.end(ctx, "idle timeout")
		return
	case !online && now.Sub(left) > profile.DisconnectedTimeout:
		s.endHere(ctx, "the client is gone")
		return
	}
	s.mu.Lock()
	check := now.Sub(s.asked) > s.table.s.cfg.SessionCheck
	touch := now.Sub(s.touched) > rec.ttl()/3 || rec.Connected != online
	if check {
		s.asked = now
	}
	s.mu.Unlock()
	if check {
		user, err := s.table.s.cfg.Users.User(ctx, rec.User)
		if why := s.table.s.groups.shut(user, err, rec.Group); why != "" {
			s.end(ctx, why)
			return
		}
	}
	away := time.Now().Before(s.table.s.storeBack())
	switch {
	case touch && (online || rec.Connected):
		if !away {
			s.touch(ctx, online)
		}
	case check && !away:
		s.asStored(ctx) // another server may have ended it, or have it
	}
}

// presence tells whether the client is there; left is when it was last heard if it is not.
func (s *session) presence(now time.Time, profile *Profile) (online bool, left time.Time) {
	s.mu.Lock()
	t, left := s.tunnel, s.left
	stream := t != nil && t.stream
	s.mu.Unlock()
	if t == nil {
		return false, left
	}
	if stream {
		return true, time.Time{}
	}
	// Datagrams may go on without the TLS connection. The client is asked after DPD at the latest.
	st := t.handle.Status()
	if st.LastInbound.After(left) {
		left = st.LastInbound
	}
	return st.Path == transport.PathDatagrams && now.Sub(left) < 2*profile.DPD+time.Second, left
}

// idle is for how long no packet has come or gone. DPD and keepalive are none.
func (s *session) idle(now time.Time) time.Duration {
	s.mu.Lock()
	t := s.tunnel
	s.mu.Unlock()
	var n uint64
	if t != nil {
		st := t.handle.Status()
		n = st.InboundPackets + st.OutboundPackets
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n != s.packets {
		s.packets, s.active = n, now
	}
	return now.Sub(s.active)
}

// touch tells the store that the session lives, and whether its client is connected. If another server has taken
// over, or the session has ended elsewhere, it ends here.
func (s *session) touch(ctx context.Context, online bool) {
	store := s.table.s.cfg.Store
	for range retries {
		s.mu.Lock()
		rec, raw := *s.rec, s.raw
		s.mu.Unlock()
		rec.Connected = online
		fresh := rec.marshal()
		changes := []Change{{Key: sessionKey + s.id, Old: raw, New: fresh, TTL: rec.ttl()}}
		for _, a := range rec.Address {
			changes = append(changes, Change{Key: leaseKey + a.String(), Old: []byte(s.id), New: []byte(s.id), TTL: rec.ttl()})
		}
		l, err := loadIDs(ctx, store, rec.User)
		switch {
		case err != nil:
		case slices.Contains(l.ids, s.id):
			changes = append(changes, Change{Key: userKey + rec.User, Old: l.raw, New: l.raw, TTL: 2 * rec.ttl()})
		default: // it has expired, as the session had
			changes = append(changes, l.change(rec.User, append(l.ids, s.id), 2*rec.ttl()))
		}
		if err == nil {
			err = store.Update(ctx, changes...)
		}
		if err == nil {
			s.mu.Lock()
			s.rec, s.raw, s.touched = &rec, fresh, time.Now()
			s.mu.Unlock()
			return
		}
		if !errors.Is(err, ErrConflict) {
			if ctx.Err() == nil {
				s.table.s.log.Error("the store does not answer", "session", s.public, "error", err)
				s.table.s.storeIsAway()
			}
			return
		}
		if !s.reconcile(ctx) {
			return
		}
	}
}

// asStored looks whether the store has the session as it is known here, and reconciles the two if not.
func (s *session) asStored(ctx context.Context) {
	stored, err := s.table.s.cfg.Store.Get(ctx, sessionKey+s.id)
	if err != nil {
		s.table.s.storeIsAway()
	} else if _, raw := s.record(); !bytes.Equal(stored, raw) {
		s.reconcile(ctx)
	}
}

// awayTime is how long upkeep lets a store alone that does not answer: each call waits for some seconds, and the sessions that are to end
// would wait behind those that are to be written down.
const awayTime = 10 * time.Second

func (s *Server) storeIsAway() { s.away.Store(time.Now().Add(awayTime).UnixNano()) }

// storeBack is when the store may be asked again.
func (s *Server) storeBack() time.Time { return time.Unix(0, s.away.Load()) }

// reconcile finds out why the store has something else, and whether to try again.
func (s *session) reconcile(ctx context.Context) (again bool) {
	store, srv := s.table.s.cfg.Store, s.table.s
	rec, raw, err := loadRecord(ctx, store, s.id)
	if err != nil {
		return false
	}
	s.mu.Lock()
	mine, touched := s.rec, s.touched
	s.mu.Unlock()
	switch {
	case rec == nil && time.Since(touched) < mine.ttl():
		s.drop("it has ended on another server")
		return false
	case rec == nil:
		return s.revive(ctx, mine)
	case rec.Server != srv.cfg.ServerID:
		s.drop("it goes on on another server")
		return false
	}
	for _, a := range rec.Address {
		owner, err := store.Get(ctx, leaseKey+a.String())
		if err != nil {
			return false
		}
		if string(owner) != s.id {
			s.end(ctx, "its address is another session's")
			return false
		}
	}
	s.mu.Lock()
	s.rec, s.raw = rec, raw
	s.mu.Unlock()
	return true
}

// revive writes a session into the store that has expired there while the store was out of reach. It goes on unless
// others have its addresses by now.
func (s *session) revive(ctx context.Context, rec *record) (again bool) {
	raw := rec.marshal()
	changes := []Change{{Key: sessionKey + s.id, New: raw, TTL: rec.ttl()}}
	for _, a := range rec.Address {
		changes = append(changes, Change{Key: leaseKey + a.String(), New: []byte(s.id), TTL: rec.ttl()})
	}
	switch err := s.table.s.cfg.Store.Update(ctx, changes...); {
	case errors.Is(err, ErrConflict):
		s.drop("its address is another session's")
	case err == nil:
		s.mu.Lock()
		s.raw, s.touched = raw, time.Now()
		s.mu.Unlock()
		return true
	}
	return false
}
