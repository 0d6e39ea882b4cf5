package netstack

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// splice carries a and b to each other until both halves have ended, and closes
// both. aToB and bToA count the bytes as they go.
//
// The end of one half is passed on as the end of that half alone. An error on
// either side, a reset for one, resets both.
func splice(a, b net.Conn, aToB, bToA *atomic.Uint64) {
	half := func(dst, src net.Conn, moved *atomic.Uint64) {
		if err := copyHalf(dst, src, moved); err != nil {
			reset(dst) // which ends the other half too
			reset(src)
		}
	}
	var other sync.WaitGroup
	other.Add(1)
	go func() {
		defer other.Done()
		half(b, a, aToB)
	}()
	half(a, b, bToA)
	other.Wait()
	a.Close()
	b.Close()
}

// copyHalf carries src to dst and passes the end on.
func copyHalf(dst, src net.Conn, moved *atomic.Uint64) error {
	receive := blockReader(src)
	for {
		block, n, err := receive()
		if n > 0 {
			var sent int
			sent, err = dst.Write(block[:n])
			moved.Add(uint64(sent))
		}
		if block != nil {
			blocks.Put(block)
		}
		switch err {
		case nil:
		case io.EOF:
			return closeWrite(dst)
		default:
			return err
		}
	}
}

func closeWrite(c net.Conn) error {
	if c, ok := c.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return c.Close() // no half-close in this kind of connection
}

// A block is what one read of a relay can take: two superpackets. Smaller ones
// would cut superpackets in pieces; larger ones leave the cache.
type block [128 << 10]byte

// blocks lends blocks to connections with data to move, and only as long as they
// move it: the relay of 4,096 idle connections holds none.
var blocks = sync.Pool{New: func() any { return new(block) }}

// blockReader returns a function that waits for data on c, takes a block, reads
// into it and gives both. The caller puts the block back into the pool unless it
// is nil. n is 0 whenever err is not nil.
func blockReader(c net.Conn) func() (b *block, n int, err error) {
	if w, ok := c.(readableWaiter); ok {
		return func() (*block, int, error) {
			if err := w.waitReadable(); err != nil {
				return nil, 0, err
			}
			return readBlock(c)
		}
	}
	if receive := systemBlockReader(c); receive != nil {
		return receive
	}
	return func() (*block, int, error) { return readBlock(c) }
}

// readableWaiter is a connection inside the VPN.
type readableWaiter interface {
	// waitReadable waits until Read would not.
	waitReadable() error
}

func readBlock(c net.Conn) (*block, int, error) {
	b := blocks.Get().(*block)
	n, err := c.Read(b[:])
	if n > 0 {
		err = nil // what it is will be told again by the next read
	}
	return b, n, err
}
