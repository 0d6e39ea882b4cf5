//go:build !linux

package tunwrap

import (
	"errors"
	"fmt"
	"os"

	"golang.zx2c4.com/wireguard/tun"
)

// tunPlatform is the half of a [TUN] where the interface is wireguard's.
type tunPlatform struct {
	device tun.Device
	queue  chan []byte // fragments from TooBig, ready to go out
}

// A TUNReader is the stream of outbound packets of a [TUN]. It is for one goroutine at a time.
type TUNReader struct {
	t      *TUN
	counts outboundCounts
}

func (t *TUN) open(o TUNOptions) (err error) {
	if o.FD > 0 {
		t.device, err = tunFromFD(o.FD, o.MTU)
	} else {
		t.device, err = tun.CreateTUN(o.Name, o.MTU)
	}
	if err != nil {
		return err
	}
	if t.name, err = t.device.Name(); err != nil {
		t.device.Close()
		return err
	}
	off := abilityOff("not on this system")
	t.abilities = TUNCapabilities{VnetHdr: off, TSO: off, USO: off, GROTCP: off, GROUDP: off, Queues: 1}
	t.batchSize = max(t.device.BatchSize(), 1)
	t.queue = make(chan []byte, maxPending)
	t.readers = []*TUNReader{{t: t}}
	return nil
}

// maxPending bounds the fragments that wait to be read. They come from a pump, which reads next.
const maxPending = 256

// Read waits for at least one outbound packet and writes the i-th to bufs[i][offset:], its length
// to sizes[i]. It borrows bufs and sizes until it returns. A packet that cannot be sent is counted and
// skipped. After Close the error wraps [os.ErrClosed].
func (r *TUNReader) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	for n == 0 && len(bufs) > 0 {
		if r.t.closed.Load() {
			return 0, errTUNClosed("read")
		}
		if n = r.takePending(bufs, sizes, offset); n > 0 {
			break
		}
		got, err := r.t.device.Read(bufs, sizes, offset)
		n = r.finish(bufs, sizes, offset, got)
		if err != nil && n == 0 {
			if r.t.closed.Load() {
				return 0, errTUNClosed("read")
			}
			return 0, fmt.Errorf("tunwrap: read: %w", err)
		}
	}
	r.t.outbound.add(&r.counts)
	r.counts = outboundCounts{}
	return n, nil
}

// finish translates the first n packets and closes the gaps that bad ones leave.
func (r *TUNReader) finish(bufs [][]byte, sizes []int, offset, n int) (kept int) {
	nat, filter, now := r.t.nat.Load(), r.t.filter.Load(), int64(0)
	if filter != nil {
		now = filter.now()
	}
	for i := range n {
		b := bufs[i][offset : offset+sizes[i]]
		r.counts.packets++
		if d := finishFiltered(b, &GSO{}, nat, filter, now); d != DropNone {
			r.t.drops.add(d)
			continue
		}
		if kept < i {
			copy(bufs[kept][offset:], b)
			sizes[kept] = sizes[i]
		}
		r.counts.segments++
		r.counts.bytes += uint64(sizes[i])
		kept++
	}
	return kept
}

// requeueFragments leaves the fragments of b to the reader. NAT has been done. A reader that waits
// for the system takes them when it has got its next packet.
func (t *TUN) requeueFragments(b []byte, l *layout, mtu int) {
	ok := fragment(b, mtu, func(head, payload []byte) {
		select {
		case t.queue <- append(append(make([]byte, 0, len(head)+len(payload)), head...), payload...):
			t.tooBig.frags.Add(1)
		default:
			t.drops.add(DropTooBig)
		}
	})
	if !ok {
		t.drops.add(DropTooBig)
	}
}

// deviceRoom is the room before a packet that the BSDs and macOS want for the address family, and more.
const deviceRoom = 16

// takeMessage gives b to the system.
func (t *TUN) takeMessage(b []byte) {
	room := append(make([]byte, deviceRoom, deviceRoom+len(b)), b...)
	if _, err := t.device.Write([][]byte{room}, deviceRoom); err != nil {
		t.drops.add(DropKernel)
	}
}

// takePending writes fragments out.
func (r *TUNReader) takePending(bufs [][]byte, sizes []int, offset int) (n int) {
	for n < len(bufs) {
		select {
		case b := <-r.t.queue:
			if len(b) > len(bufs[n])-offset {
				r.t.drops.add(DropOversize)
				continue
			}
			sizes[n] = copy(bufs[n][offset:], b)
			r.counts.segments++
			r.counts.bytes += uint64(len(b))
			n++
		default:
			return n
		}
	}
	return n
}

// Write takes the inbound packets bufs[i][offset:] in order, reverses NAT and gives them to the
// system, which verifies them. It borrows bufs and may overwrite them, and offset is at least 4. Bad packets, and
// those that the system refuses, are counted and skipped, so n is always len(bufs) until Close.
func (t *TUN) Write(bufs [][]byte, offset int) (n int, err error) {
	if t.closed.Load() {
		return 0, errTUNClosed("write")
	}
	nat, filter, now := t.nat.Load(), t.filter.Load(), int64(0)
	if filter != nil {
		now = filter.now()
	}
	var counts inboundCounts
	var one [1][]byte
	for _, buf := range bufs {
		if offset > len(buf) {
			t.drops.add(DropMalformed)
			continue
		}
		b := buf[offset:]
		counts.segments++
		counts.bytes += uint64(len(b))
		l, d := locate(b, len(b))
		if d != DropNone {
			t.drops.add(d)
			continue
		}
		if nat != nil {
			nat.inbound(b[:l.total], &l)
		}
		if filter != nil {
			if d := filter.inbound(b[:l.total], &l, l.total, now); d != DropNone {
				t.drops.add(d)
				continue
			}
		}
		one[0] = buf[:offset+l.total]
		switch _, err := t.device.Write(one[:], offset); {
		case err == nil:
			counts.packets++
		case errors.Is(err, os.ErrClosed) && t.closed.Load():
			return 0, errTUNClosed("write")
		default:
			t.drops.add(DropKernel)
		}
	}
	t.inbound.add(&counts)
	return len(bufs), nil
}

// SetMTU notes the MTU. The interface's own is the caller's to set.
func (t *TUN) SetMTU(mtu int) error {
	t.mtu.Store(int64(mtu))
	return nil
}

// MTU is the MTU of the interface in bytes.
func (t *TUN) MTU() (int, error) { return t.device.MTU() }

// File is the file behind the interface, if there is one.
func (t *TUN) File() *os.File { return t.device.File() }

func (t *TUN) closePlatform() error { return t.device.Close() }
