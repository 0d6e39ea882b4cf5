package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// RedisOptions say where a Redis server is, or one that speaks its protocol and runs Lua scripts.
type RedisOptions struct {
	// URL is "redis://[user:password@]host:port/db", or "rediss://" for TLS, or
	// "unix:///path". Parameters are those of go-redis.
	URL string
	// Password is used instead of one in the URL.
	Password string
	// Name keeps the keys of this service apart from others in the same database. Servers that
	// share sessions have the same. Empty: "vpn".
	Name string
}

// OpenRedisStore connects to a [Store] that several servers can share. It fails when nobody answers
// within 5 s; later failures are those of single calls, and connections are made anew as needed.
func OpenRedisStore(o RedisOptions) (Store, error) {
	opts, err := redis.ParseURL(o.URL)
	if err != nil {
		if bad := (*url.Error)(nil); errors.As(err, &bad) {
			err = bad.Err // without the URL, which may have a password
		}
		return nil, fmt.Errorf("gateway: store: URL: %w", err)
	}
	if o.Password != "" {
		opts.Password = o.Password
	}
	if o.Name == "" {
		o.Name = "vpn"
	}
	opts.DialTimeout, opts.ReadTimeout, opts.WriteTimeout = 2*time.Second, 2*time.Second, 2*time.Second
	// Somebody waits. One more try is for a connection that has died while nobody looked.
	opts.MaxRetries, opts.DialerRetries, opts.ContextTimeoutEnabled = 1, 1, true
	// The braces put all keys into one slot of a cluster, where a script can change them together.
	s := &redisStore{c: redis.NewClient(opts), prefix: "penstock:{" + o.Name + "}:"}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.c.Ping(ctx).Err(); err != nil {
		s.c.Close()
		return nil, fmt.Errorf("gateway: store %s: %w", opts.Addr, err)
	}
	return s, nil
}

type redisStore struct {
	c      *redis.Client
	prefix string
}

// Get implements [Store].
func (s *redisStore) Get(ctx context.Context, key string) ([]byte, error) {
	b, err := s.c.Get(ctx, s.prefix+key).Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	return b, err
}

// redisUpdate gets the keys, and for each three arguments: the old value and the new one, each with
// "=" before it, or empty for none, and the milliseconds to live, 0 for ever.
// Redis runs a script as one step.
var redisUpdate = redis.NewScript(`
for i, key in ipairs(KEYS) do
	local is, old = redis.call('GET', key), ARGV[3*i-2]
	if (is and '='..is or '') ~= old then return 0 end
end
for i, key in ipairs(KEYS) do
	local new, ttl = ARGV[3*i-1], ARGV[3*i]
	if new == '' then redis.call('DEL', key)
	elseif ttl == '0' then redis.call('SET', key, string.sub(new, 2))
	else redis.call('SET', key, string.sub(new, 2), 'PX', ttl) end
end
return 1`)

// Update implements [Store].
func (s *redisStore) Update(ctx context.Context, changes ...Change) error {
	keys := make([]string, 0, len(changes))
	args := make([]any, 0, 3*len(changes))
	for _, c := range changes {
		keys = append(keys, s.prefix+c.Key)
		ttl := c.TTL.Milliseconds()
		if c.TTL > 0 && ttl == 0 {
			ttl = 1
		}
		args = append(args, redisArg(c.Old), redisArg(c.New), ttl)
	}
	n, err := redisUpdate.Run(ctx, s.c, keys, args...).Int()
	if err == nil && n == 0 {
		return ErrConflict
	}
	return err
}

func redisArg(v []byte) string {
	if v == nil {
		return ""
	}
	return "=" + string(v)
}

// List implements [Store].
func (s *redisStore) List(ctx context.Context, prefix string) (map[string][]byte, error) {
	found := map[string][]byte{}
	for cursor := uint64(0); ; {
		keys, next, err := s.c.Scan(ctx, cursor, redisGlob(s.prefix+prefix)+"*", 500).Result()
		if err != nil {
			return nil, err
		}
		if len(keys) > 0 {
			values, err := s.c.MGet(ctx, keys...).Result()
			if err != nil {
				return nil, err
			}
			for i, v := range values {
				if v, ok := v.(string); ok { // nil: gone since
					found[strings.TrimPrefix(keys[i], s.prefix)] = []byte(v)
				}
			}
		}
		if cursor = next; cursor == 0 {
			return found, nil
		}
	}
}

// redisGlob is a pattern that means s itself.
func redisGlob(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`).Replace(s)
}

// Close implements [Store].
func (s *redisStore) Close() error { return s.c.Close() }
