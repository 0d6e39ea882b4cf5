package transport

import (
	"bytes"
	"context"
	"fmt"
)

// An identity is what tells a peer from others and by which the two sides of a handshake prove who they
// are: the key of a static peer ([pinnedKey]), or a session's shared secret ([Session]).
type identity interface {
	// client runs a handshake with the peer as the DTLS client, over conn, which it takes. It waits until ctx ends.
	client(ctx context.Context, conn *handshakeConn) (*agreement, error)

	// calls tells whether we may begin a handshake with the peer at all.
	calls() bool

	// prevails tells whether, of two handshakes at once, the one that we began goes
	// on. Both sides go by it. Where both calls use the
	// same two addresses the half-open table sees to that; else, as with a NAT or IPv4 one way and IPv6 the
	// other, both complete, in another order on each side, and the one that stands must still be the same.
	prevails() bool
}

// pinnedKey is the identity of a static peer.
type pinnedKey struct {
	t   *Transport
	key PublicKey
}

var _ identity = pinnedKey{}

// client admits no other key.
func (k pinnedKey) client(ctx context.Context, conn *handshakeConn) (*agreement, error) {
	return k.t.handshaker.client(ctx, conn, func(got PublicKey) error {
		if got != k.key {
			return fmt.Errorf("%w: %v", errOtherKey, got)
		}
		return nil
	})
}

// calls: either side may.
func (k pinnedKey) calls() bool { return true }

// prevails: the call of the larger key does.
func (k pinnedKey) prevails() bool { return bytes.Compare(k.t.public[:], k.key[:]) > 0 }
