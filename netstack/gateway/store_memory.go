package gateway

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"time"
)

// NewMemoryStore makes a [Store] that ends with the process.
func NewMemoryStore() Store { return &memoryStore{m: map[string]memoryValue{}, swept: time.Now()} }

type memoryStore struct {
	mu    sync.Mutex
	m     map[string]memoryValue
	swept time.Time
}

type memoryValue struct {
	data    []byte
	expires time.Time // zero: never
}

func (v memoryValue) gone(now time.Time) bool { return !v.expires.IsZero() && !now.Before(v.expires) }

// Get implements [Store].
func (s *memoryStore) Get(_ context.Context, key string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.get(key, time.Now())), nil
}

func (s *memoryStore) get(key string, now time.Time) []byte {
	if v, ok := s.m[key]; ok && !v.gone(now) {
		return v.data
	}
	return nil
}

// Update implements [Store].
func (s *memoryStore) Update(_ context.Context, changes ...Change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for _, c := range changes {
		if old := s.get(c.Key, now); (old == nil) != (c.Old == nil) || !bytes.Equal(old, c.Old) {
			return ErrConflict
		}
	}
	for _, c := range changes {
		if c.New == nil {
			delete(s.m, c.Key)
			continue
		}
		v := memoryValue{data: append([]byte{}, c.New...)}
		if c.TTL > 0 {
			v.expires = now.Add(c.TTL)
		}
		s.m[c.Key] = v
	}
	if now.Sub(s.swept) > sweepEvery {
		s.swept = now
		for k, v := range s.m {
			if v.gone(now) {
				delete(s.m, k)
			}
		}
	}
	return nil
}

// List implements [Store].
func (s *memoryStore) List(_ context.Context, prefix string) (map[string][]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	found, now := map[string][]byte{}, time.Now()
	for k, v := range s.m {
		if strings.HasPrefix(k, prefix) && !v.gone(now) {
			found[k] = bytes.Clone(v.data)
		}
	}
	return found, nil
}

// Close implements [Store].
func (*memoryStore) Close() error { return nil }
