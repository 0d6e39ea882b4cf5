package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// OpenBoltStore opens, or makes with mode 0600, a [Store] in one file. What it holds survives the process and,
// since every update is synced, the machine. One process has the file open at a time.
func OpenBoltStore(file string) (Store, error) {
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{Timeout: time.Second})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("gateway: store %s: another process has it open", file)
	}
	if err != nil {
		return nil, fmt.Errorf("gateway: store %s: %w", file, err)
	}
	s := &boltStore{db: db}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(boltBucket)
		if err != nil {
			return err
		}
		return sweepBolt(b, time.Now())
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("gateway: store %s: %w", file, err)
	}
	s.swept.Store(time.Now().Unix())
	return s, nil
}

// boltBucket has every key. A value begins with the time at which it expires, 8 bytes of milliseconds
// since 1970, big-endian, 0 for never.
var boltBucket = []byte("penstock")

type boltStore struct {
	db    *bbolt.DB
	swept atomic.Int64 // Unix time
}

// Get implements [Store].
func (s *boltStore) Get(_ context.Context, key string) (value []byte, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		value = bytes.Clone(boltValue(tx.Bucket(boltBucket).Get([]byte(key)), time.Now()))
		return nil
	})
	return value, err
}

// boltValue is the value in v, which it lends; nil when v is nil or has expired.
func boltValue(v []byte, now time.Time) []byte {
	if len(v) < 8 {
		return nil
	}
	if at := int64(binary.BigEndian.Uint64(v)); at != 0 && now.UnixMilli() >= at {
		return nil
	}
	return v[8:]
}

// Update implements [Store]. Updates at the same time become one transaction, with one sync.
func (s *boltStore) Update(_ context.Context, changes ...Change) error {
	now := time.Now()
	return s.db.Batch(func(tx *bbolt.Tx) error {
		b := tx.Bucket(boltBucket)
		for _, c := range changes {
			if old := boltValue(b.Get([]byte(c.Key)), now); (old == nil) != (c.Old == nil) || !bytes.Equal(old, c.Old) {
				return ErrConflict
			}
		}
		for _, c := range changes {
			if err := putBolt(b, c, now); err != nil {
				return err
			}
		}
		if at := s.swept.Load(); now.Unix()-at > int64(sweepEvery/time.Second) && s.swept.CompareAndSwap(at, now.Unix()) {
			return sweepBolt(b, now)
		}
		return nil
	})
}

func putBolt(b *bbolt.Bucket, c Change, now time.Time) error {
	if c.New == nil {
		return b.Delete([]byte(c.Key))
	}
	v := make([]byte, 8, 8+len(c.New))
	if c.TTL > 0 {
		binary.BigEndian.PutUint64(v, uint64(now.Add(c.TTL).UnixMilli()))
	}
	return b.Put([]byte(c.Key), append(v, c.New...))
}

func sweepBolt(b *bbolt.Bucket, now time.Time) error {
	var gone [][]byte
	err := b.ForEach(func(k, v []byte) error {
		if boltValue(v, now) == nil {
			gone = append(gone, bytes.Clone(k))
		}
		return nil
	})
	for _, k := range gone {
		err = errors.Join(err, b.Delete(k))
	}
	return err
}

// List implements [Store].
func (s *boltStore) List(_ context.Context, prefix string) (map[string][]byte, error) {
	found, now := map[string][]byte{}, time.Now()
	err := s.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(boltBucket).Cursor()
		for k, v := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			if data := boltValue(v, now); data != nil {
				found[string(k)] = bytes.Clone(data)
			}
		}
		return nil
	})
	return found, err
}

// Close implements [Store].
func (s *boltStore) Close() error { return s.db.Close() }
