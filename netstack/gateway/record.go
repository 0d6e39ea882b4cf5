package gateway

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"time"
)

// What is in the store:
//
//	session/ID   a record, ID being the hash of the cookie: who reads the store cannot use it
//	lease/ADDR   the ID of the session that has the address
//	user/NAME    the IDs of the user's sessions
//	totp/NAME    the time step of the last code
//	secret       by which the state of sign-ins is sealed
//
// The first three expire unless the server that has the session says every now and then
// that it lives: a server that is gone leaves nothing for ever.
const (
	sessionKey = "session/"
	leaseKey   = "lease/"
	userKey    = "user/"
	secretKey  = "secret"
)

// cookieBytes are the random bytes of a cookie.
const cookieBytes = 32

// newCookie makes a session's cookie. base64 without padding is what every client carries.
func newCookie() string {
	b := make([]byte, cookieBytes)
	rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}

// idOf is the session that a cookie names.
func idOf(cookie string) string {
	sum := sha256.Sum256([]byte(cookie))
	return hex.EncodeToString(sum[:])
}

// A record is a session as it is in the store.
type record struct {
	User    string       `json:"user"`
	Group   string       `json:"group,omitempty"`
	Agent   string       `json:"agent,omitempty"`
	Created time.Time    `json:"created"`
	Expires time.Time    `json:"expires,omitzero"` // by the session timeout; zero: never
	Address []netip.Addr `json:"address,omitempty"`
	// Server has the client's tunnel, or had it last; Connected tells which.
	Server    string         `json:"server,omitempty"`
	Connected bool           `json:"connected,omitempty"`
	Remote    netip.AddrPort `json:"remote,omitzero"`
	// Life is in seconds: how long the record lives without being touched.
	Life int `json:"life"`
}

func (r *record) ttl() time.Duration { return time.Duration(r.Life) * time.Second }

func (r *record) marshal() []byte {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain values
	}
	return b
}

// loadRecord reads a session; nil when there is none. raw is what the store has.
func loadRecord(ctx context.Context, store Store, id string) (r *record, raw []byte, err error) {
	raw, err = store.Get(ctx, sessionKey+id)
	if raw == nil || err != nil {
		return nil, nil, err
	}
	r = new(record)
	if json.Unmarshal(raw, r) != nil {
		return nil, nil, nil // of another version: sign in again
	}
	return r, raw, nil
}

// An idList is the value of user/NAME.
type idList struct {
	ids []string
	raw []byte // as in the store
}

func loadIDs(ctx context.Context, store Store, user string) (l idList, err error) {
	if l.raw, err = store.Get(ctx, userKey+user); err == nil && l.raw != nil {
		if json.Unmarshal(l.raw, &l.ids) != nil {
			l.ids = nil
		}
	}
	return l, err
}

// change makes ids the sessions of user.
func (l idList) change(user string, ids []string, ttl time.Duration) Change {
	c := Change{Key: userKey + user, Old: l.raw, TTL: ttl}
	if len(ids) > 0 {
		b, err := json.Marshal(ids)
		if err != nil {
			panic(err)
		}
		c.New = b
	}
	return c
}

// retries bounds attempts at an update that others are in the way of.
const retries = 8

// endRecord takes a session and all that is its out of the store. What has another owner by now stays.
func endRecord(ctx context.Context, store Store, id string) error {
	for range retries {
		r, raw, err := loadRecord(ctx, store, id)
		if r == nil || err != nil {
			return err
		}
		changes := []Change{{Key: sessionKey + id, Old: raw}}
		for _, a := range r.Address {
			if owner, err := store.Get(ctx, leaseKey+a.String()); err != nil {
				return err
			} else if string(owner) == id {
				changes = append(changes, Change{Key: leaseKey + a.String(), Old: owner})
			}
		}
		l, err := loadIDs(ctx, store, r.User)
		if err != nil {
			return err
		}
		if slices.Contains(l.ids, id) {
			rest := slices.DeleteFunc(slices.Clone(l.ids), func(other string) bool { return other == id })
			changes = append(changes, l.change(r.User, rest, r.ttl()))
		}
		if err = store.Update(ctx, changes...); !errors.Is(err, ErrConflict) {
			return err
		}
	}
	return ErrConflict
}

// sharedSecret finds the secret in the store, or puts one there.
func sharedSecret(ctx context.Context, store Store) ([]byte, error) {
	for range retries {
		b, err := store.Get(ctx, secretKey)
		if err != nil {
			return nil, err
		}
		if len(b) >= 32 {
			return b, nil
		}
		fresh := make([]byte, 32)
		rand.Read(fresh) // never fails
		if err := store.Update(ctx, Change{Key: secretKey, Old: b, New: fresh}); err == nil {
			return fresh, nil
		} else if !errors.Is(err, ErrConflict) {
			return nil, err
		}
	}
	return nil, ErrConflict
}
