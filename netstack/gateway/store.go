package gateway

import (
	"context"
	"errors"
	"time"
)

// A Store keeps what outlives a connection: sessions, by the hash of their cookie, and
// who has which address. The values are small, some hundred bytes, and there are about three for each
// session. Several servers that share a Store share their sessions: see docs/server.md.
//
// [NewMemoryStore], [OpenBoltStore] and [OpenRedisStore] make one. All methods may be called from any
// goroutine.
type Store interface {
	// Get returns what is kept under key; nil when there is nothing, or it has expired. The
	// caller may keep it.
	Get(ctx context.Context, key string) ([]byte, error)

	// Update makes all changes or none. It returns [ErrConflict] when a key does not hold
	// what its change expects: somebody else was there first.
	Update(ctx context.Context, changes ...Change) error

	// List returns everything under keys that begin with prefix.
	List(ctx context.Context, prefix string) (map[string][]byte, error)

	// Close lets go of the store. Nothing is called after it.
	Close() error
}

// A Change replaces the value of one key.
type Change struct {
	Key string
	Old []byte        // what is there now; nil: nothing
	New []byte        // what is to be there; nil: nothing
	TTL time.Duration // after which New is gone; 0: never
}

// ErrConflict is an [Store.Update] that found other values than it expected. Nothing was
// changed, and the caller looks again.
var ErrConflict = errors.New("gateway: the store holds another value")

// sweepEvery is how often a store that has to do so itself removes what has expired.
const sweepEvery = time.Minute
