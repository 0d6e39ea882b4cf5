package gateway

import (
	"container/list"
	"hash/maphash"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// BanConfig says how long a client's address may misbehave. What an address does costs points, which are
// forgotten Reset after the last. With Limit points or more it is banned: its connections are closed
// before a byte is read. IPv6 addresses are taken together by /64. 0 is a default; a negative number of points is none.
type BanConfig struct {
	Off           bool
	WrongPassword int           // points of a wrong password, code or certificate, given back when its user signs in; 10
	Connection    int           // points of a connection, given back when somebody signs in; 1
	Limit         int           // 80
	Reset         time.Duration // 20 minutes
	// Exempt are never banned, nor limited as to their rate: an office behind one address, say.
	Exempt []netip.Prefix

	// Rate are connections a second from one address, in the long run, and Burst how many may come at once; 20 and 200.
	Rate, Burst int
	// PerAddress are connections at one time from one address on which nobody has signed in yet, and Unknown those of all
	// addresses; 64 and 4096. Over the second the oldest gives way.
	PerAddress, Unknown int
}

func (c BanConfig) orDefaults() BanConfig {
	or := func(v *int, d int) {
		switch {
		case *v == 0:
			*v = d
		case *v < 0:
			*v = 0
		}
	}
	or(&c.WrongPassword, 10)
	or(&c.Connection, 1)
	or(&c.Limit, 80)
	or(&c.Rate, 20)
	or(&c.Burst, 200)
	or(&c.PerAddress, 64)
	or(&c.Unknown, 4096)
	if c.Reset == 0 {
		c.Reset = 20 * time.Minute
	}
	return c
}

// source is what an address is known by: itself, or its /64.
func source(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	b := 32
	if a.Is6() {
		b = 64
	}
	p, _ := a.Prefix(b)
	return p
}

// A scoreboard counts what sources have done. It has room for so many; the one heard of
// longest ago gives way, so an attacker needs as many addresses to be forgotten.
type scoreboard struct {
	cfg  BanConfig
	max  int
	seed maphash.Seed

	mu     sync.Mutex
	order  list.List // of *score, the newest first
	scores map[netip.Prefix]*list.Element
	bans   uint64 // how many have been
}

type score struct {
	source netip.Prefix
	points int
	seen   time.Time // when points were last added
	banned bool
	tokens float64 // of the rate limit
	filled time.Time
	open   int // connections on which nobody has signed in
	blames []blame
}

// A blame is the part of a source's points that wrong passwords of one user have cost.
type blame struct {
	user   uint64 // a hash of the name; 0: several, and nobody's to be forgiven
	points int
}

// maxBlames are the users that are told apart: with the defaults there is a ban before there are as many.
const maxBlames = 16

func (s *score) blame(user uint64, points int) {
	for i := range s.blames {
		if s.blames[i].user == user {
			s.blames[i].points += points
			return
		}
	}
	if len(s.blames) < maxBlames {
		s.blames = append(s.blames, blame{user, points})
		return
	}
	last := &s.blames[maxBlames-1]
	last.user, last.points = 0, last.points+points
}

// maxScores is how many sources are remembered: 64 Ki of some 200 bytes.
const maxScores = 64 << 10

func newScoreboard(cfg BanConfig) *scoreboard {
	return &scoreboard{cfg: cfg.orDefaults(), max: maxScores, seed: maphash.MakeSeed(), scores: map[netip.Prefix]*list.Element{}}
}

func (b *scoreboard) exempt(a netip.Addr) bool {
	a = a.Unmap()
	return slices.ContainsFunc(b.cfg.Exempt, func(p netip.Prefix) bool { return p.Contains(a) })
}

// of is the score of a, after what has expired. mu is held.
func (b *scoreboard) of(a netip.Addr, now time.Time) *score {
	key := source(a)
	if e, ok := b.scores[key]; ok {
		b.order.MoveToFront(e)
		s := e.Value.(*score)
		if now.Sub(s.seen) >= b.cfg.Reset {
			s.points, s.banned, s.blames = 0, false, nil
		}
		return s
	}
	if b.order.Len() >= b.max {
		oldest := b.order.Back()
		b.order.Remove(oldest)
		delete(b.scores, oldest.Value.(*score).source)
	}
	s := &score{source: key, seen: now, tokens: float64(b.cfg.Burst), filled: now}
	b.scores[key] = b.order.PushFront(s)
	return s
}

// An admission is a verdict on a new connection.
type admission uint8

const (
	admitted admission = iota
	refusedBanned
	refusedRate
	refusedTooMany
)

// connection asks for a new one of a. The caller calls settled when somebody has signed in on it or it has ended.
func (b *scoreboard) connection(a netip.Addr, now time.Time) admission {
	if b.exempt(a) {
		return admitted
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.of(a, now)
	s.tokens = math.Min(float64(b.cfg.Burst), s.tokens+now.Sub(s.filled).Seconds()*float64(b.cfg.Rate))
	s.filled = now
	switch {
	case s.banned:
		return refusedBanned
	case s.tokens < 1:
		return refusedRate
	case s.open >= b.cfg.PerAddress:
		return refusedTooMany
	}
	s.tokens--
	s.open++
	b.addLocked(s, b.cfg.Connection, now)
	return admitted // one that has just become too many was still allowed
}

// settled ends the wait for a sign-in on a connection that was admitted; good tells that there was one.
func (b *scoreboard) settled(a netip.Addr, good bool, now time.Time) {
	if b.exempt(a) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.of(a, now)
	s.open = max(0, s.open-1)
	if good && !s.banned {
		s.points = max(0, s.points-b.cfg.Connection)
	}
}

// wrong counts a wrong password of user. It tells whether a is banned now.
func (b *scoreboard) wrong(a netip.Addr, user string, now time.Time) (banned bool) {
	if b.exempt(a) {
		return false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.of(a, now)
	if b.addLocked(s, b.cfg.WrongPassword, now) {
		s.blame(maphash.String(b.seed, user)|1, b.cfg.WrongPassword)
	}
	return s.banned
}

// good forgets the points of a, from where user has now got in, but for what wrong passwords of others have cost: who has an
// account of his own could guess for ever at another's.
func (b *scoreboard) good(a netip.Addr, user string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.scores[source(a)]
	if !ok || e.Value.(*score).banned {
		return
	}
	s, who := e.Value.(*score), maphash.String(b.seed, user)|1
	s.blames = slices.DeleteFunc(s.blames, func(l blame) bool { return l.user == who })
	s.points = 0
	for _, l := range s.blames {
		s.points += l.points
	}
}

// banned tells whether a is.
func (b *scoreboard) banned(a netip.Addr, now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	e, ok := b.scores[source(a)]
	return ok && e.Value.(*score).banned && now.Sub(e.Value.(*score).seen) < b.cfg.Reset
}

func (b *scoreboard) addLocked(s *score, points int, now time.Time) (added bool) {
	if points == 0 || b.cfg.Off {
		return false
	}
	s.points += points
	s.seen = now
	if !s.banned && s.points >= b.cfg.Limit {
		s.banned = true
		b.bans++
	}
	return true
}

// BanStatus is an address that may not connect.
type BanStatus struct {
	Source netip.Prefix `json:"source"` // an IPv4 address, or an IPv6 /64
	Until  time.Time    `json:"until"`
}

// status lists those banned now.
func (b *scoreboard) status(now time.Time) (list []BanStatus, total uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for e := b.order.Front(); e != nil; e = e.Next() {
		if s := e.Value.(*score); s.banned && now.Sub(s.seen) < b.cfg.Reset {
			list = append(list, BanStatus{s.source, s.seen.Add(b.cfg.Reset)})
		}
	}
	return list, b.bans
}
