package transport

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// burstSize is how many bytes of a stream are taken apart together: two superpackets or more.
	burstSize = 128 << 10
	// burstPackets is how many packets are given to the Device at once, at most.
	burstPackets = 256
	// frameGap is the room between two reads into a burst that makes, with the next frame's header, the room
	// that Device.Write finds before a packet.
	frameGap = deviceOffset - streamHeaderSize
)

// A burst is what the inbound pump of a stream needs while there is something to read, and gives back
// when there is not.
//
//	buf   ... | packet ─ packet ─ gap ─ packet | frames not taken apart | free
//	                                          free'd  r                  w
type burst struct {
	buf     []byte
	aside   []byte // packets that had no room before them, copied: those behind the first of a TLS record
	packets [][]byte
	r, w    int
	spent   int // where the last packet ends that is for the Device
	source  sourceCheck
}

var bursts = sync.Pool{New: func() any {
	return &burst{buf: make([]byte, burstSize), packets: make([][]byte, 0, burstPackets)}
}}

// inboundPump carries packets from the stream to the Device, answers the far end, and ends with the stream. Between two
// bursts it waits in the kernel, with no buffer of its own.
func (st *stream) inboundPump() {
	err := st.burst() // what was read with the answer to CONNECT, by us or by crypto/tls
	for err == nil {
		if st.wire != nil {
			err = st.wire.wait()
		}
		if err == nil {
			err = st.burst()
		}
	}
	st.ended(err)
}

// burst reads until nothing more is there. A stream that cannot tell that, for want of a StreamConn, returns
// after each read.
func (st *stream) burst() error {
	b := bursts.Get().(*burst)
	b.reset()
	b.w += copy(b.buf[b.w:], st.partial)
	st.partial = nil
	err := st.fill(b)
	st.deliver(b)
	if b.r < b.w && err == nil { // a frame whose rest is under way may take its time
		st.partial = append([]byte(nil), b.buf[b.r:b.w]...)
	}
	b.source = sourceCheck{}
	bursts.Put(b)
	return err
}

func (b *burst) reset() {
	b.r, b.w, b.spent = frameGap, frameGap, 0
	b.aside, b.packets = b.aside[:0], b.packets[:0]
}

func (st *stream) fill(b *burst) error {
	if b.w > b.r {
		if err := st.frames(b); err != nil {
			return err
		}
	}
	for {
		st.makeRoom(b)
		n, err := st.conn.Read(b.buf[b.w:])
		if n > 0 {
			b.w += n
			st.lastInbound.Store(st.t.clock.now())
			if err := st.frames(b); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, errWouldBlock):
			return nil
		case err != nil:
			return streamError(err)
		case st.wire == nil || !st.wire.canWait():
			return nil
		}
	}
}

// makeRoom sees to it that the largest frame has room behind what b holds.
func (st *stream) makeRoom(b *burst) {
	if len(b.buf)-b.w >= streamHeaderSize+maxStreamBody && len(b.packets) < burstPackets/2 {
		return
	}
	st.deliver(b)
	rest := b.buf[b.r:b.w]
	b.reset()
	b.w += copy(b.buf[b.w:], rest)
}

// streamError gives the end of a stream a name.
func streamError(err error) error {
	if errors.Is(err, io.EOF) {
		return errStreamEOF
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errStreamSilent
	}
	return err
}

// frames takes apart what lies in b whole.
func (st *stream) frames(b *burst) error {
	for b.w-b.r >= streamHeaderSize {
		typ, n, ok := parseStreamHeader(b.buf[b.r:b.w])
		if !ok {
			return ErrStreamProtocol
		}
		if b.w-b.r < streamHeaderSize+n {
			return nil
		}
		start := b.r + streamHeaderSize
		b.r = start + n
		if err := st.frame(b, typ, start, b.r); err != nil {
			return err
		}
	}
	if b.r == b.w { // the next record begins with a frame: leave room before it
		b.r += frameGap
		b.w += frameGap
	}
	return nil
}

// frame takes the frame whose body is b.buf[start:end].
func (st *stream) frame(b *burst, typ frameType, start, end int) error {
	body := b.buf[start:end]
	switch typ {
	case frameData:
		st.packet(b, start, end)
	case frameDPDRequest:
		st.send(frameDPDReply, body)
	case frameDPDReply:
		if len(body) >= dpdBodySize {
			st.answered(int64(binary.BigEndian.Uint64(body)))
		}
	case frameDisconnect, frameTerminate:
		g := newGoodbye(typ, body)
		st.deliver(b)
		st.s.goodbye(st, nil, g)
		return g
	case frameKeepalive:
	default:
		st.t.drops.add(DropUnknownFrame, 1)
	}
	return nil
}

// packet queues a packet for the Device, if its source is the session's.
func (st *stream) packet(b *burst, start, end int) {
	packet := b.buf[start:end:end]
	src, ok := source(packet)
	if !ok || !b.source.allowed(st.t, st.s.peer, src) {
		st.t.drops.add(DropSource, 1)
		return
	}
	if len(b.packets) == cap(b.packets) {
		st.deliver(b)
	}
	if start-b.spent >= deviceOffset {
		b.packets = append(b.packets, b.buf[start-deviceOffset:end:end])
		b.spent = end
		return
	}
	if b.aside == nil {
		b.aside = make([]byte, 0, burstSize+burstSize/4)
	}
	at := len(b.aside)
	if at+deviceOffset+len(packet) > cap(b.aside) {
		st.deliver(b)
		at = 0
	}
	b.aside = append(b.aside[:at+deviceOffset], packet...)
	b.packets = append(b.packets, b.aside[at:len(b.aside):len(b.aside)])
}

// deliver gives the packets to the Device; they lie in b until it returns.
func (st *stream) deliver(b *burst) {
	if len(b.packets) == 0 {
		return
	}
	bytes := 0
	for _, p := range b.packets {
		bytes += len(p) - deviceOffset
	}
	p := st.s.peer
	p.in.add(len(b.packets), bytes)
	st.s.byStream.in.add(len(b.packets), bytes)
	n, err := st.t.cfg.Device.Write(b.packets, deviceOffset)
	if err != nil && n < len(b.packets) {
		st.t.drops.add(DropDevice, len(b.packets)-n)
	}
	b.packets, b.aside = b.packets[:0], b.aside[:0]
	b.spent = b.r
	if p.detour.Load() == nil {
		st.s.heardStream(st.t.clock.now())
	}
}

// answered takes the DPD-RESP to a request made at sent.
func (st *stream) answered(sent int64) {
	now := st.t.clock.now()
	if sent <= 0 || sent > now {
		return // a stranger's
	}
	p := st.s.peer
	p.mu.Lock()
	defer p.mu.Unlock()
	st.s.streamRTT = time.Duration(now - sent)
}
