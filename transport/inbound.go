package transport

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/gaissmai/bart"
	"golang.org/x/time/rate"
)

const (
	// receiveBatch is the number of receives in one system call. Each has a buffer
	// of receiveBuffer bytes, which never truncates a coalesced receive.
	receiveBatch  = 16
	receiveBuffer = 64 << 10
	// deviceOffset is the room that Device.Write finds before each packet: what the
	// shortest record header and the frame type have left, enough for a virtio-net header.
	deviceOffset = recordHeaderSize + frameHeaderSize
	// trialRate bounds the records from unknown addresses that are tried against every
	// association, in opens per second: about a hundredth of a core.
	trialRate = 10000
	// searchRate bounds the records from unknown addresses for which the peers are
	// looked through at all, per second. What a flood starves of this finds its
	// peer again by a new handshake.
	searchRate = 500
	// sharedRate bounds the records, per second, for which it is asked who else lives at an
	// address where a peer is known: some 10 µs each with 1,000 peers.
	sharedRate = 5000
	// newcomerRate bounds how many records a second that look like replays at a known address take of
	// searchRate.
	newcomerRate = 10
	// bulkPacket is the size in bytes from which a packet is taken for one of a flow that sends as much
	// as it can.
	bulkPacket = 500
	// doubtTime is how long records from an address are looked at with care after one
	// that was not of the peer known there: a copy each, and another peer may have sent it.
	doubtTime = time.Second
)

// inboundPump carries packets from one socket to the Device until the socket is
// closed.
func (t *Transport) inboundPump(conn PacketConn) {
	in, batch := newInbound(t, conn), newBatch()
	for {
		n, err := conn.ReadBatch(batch)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			t.log.Debug("receive failed", "local", conn.LocalAddr(), "err", err)
			time.Sleep(time.Millisecond) // an error that stays must not burn a core
			continue
		}
		in.receive(batch[:n])
	}
}

// inbound is a pump's scratch.
type inbound struct {
	t         *Transport
	conn      PacketConn
	packets   [][]byte // for Device.Write; slices of the receive buffers
	scratch   cryptoScratch
	second    []byte // a record's copy, for a second try
	trials    *rate.Limiter
	search    *rate.Limiter
	shared    *rate.Limiter
	newcomers *rate.Limiter
	now       int64

	drop *earlyDrop // nil: nobody minds how much waits

	doubt   netip.AddrPort // an address from where a record came that was not of the peer known there
	doubted int64          // clock reading of that

	held    *association // whose inMu is held
	heard   bool         // held has opened a record in this receive
	newest  bool         // and one newer than any before
	counted struct{ packets, bytes int }

	source sourceCheck

	// What must wait until inMu is released.
	echoes  [][]byte // records of DPD-REQs, opened; slices of the receive buffers
	wire    []Run    // scratch of echo
	answers []dpdAnswer
	later   []func()
}

// dpdAnswer is a DPD-RESP: when it was asked for, by our clock, and the size of its body.
type dpdAnswer struct {
	sent int64
	size int
}

func newInbound(t *Transport, conn PacketConn) *inbound {
	in := &inbound{
		t: t, conn: conn,
		packets:   make([][]byte, 0, receiveBatch*MaxRunSegments),
		second:    make([]byte, receiveBuffer),
		trials:    rate.NewLimiter(trialRate, trialRate/10),
		search:    rate.NewLimiter(searchRate, searchRate/5),
		shared:    rate.NewLimiter(sharedRate, sharedRate/10),
		newcomers: rate.NewLimiter(newcomerRate, newcomerRate),
	}
	if n := t.cfg.EarlyDrop; n > 0 {
		in.drop = &earlyDrop{limit: n}
	}
	return in
}

// newBatch makes the receive buffers of a pump.
func newBatch() []Inbound {
	batch := make([]Inbound, receiveBatch)
	for i := range batch {
		batch[i].Buf = make([]byte, receiveBuffer)
	}
	return batch
}

// receive deals with one batch of the socket.
func (in *inbound) receive(batch []Inbound) {
	in.now = in.t.clock.now()
	bytes := 0
	for i := range batch {
		bytes += batch[i].N
		in.message(&batch[i])
	}
	if in.drop != nil && in.drop.now(bytes, in.now) {
		in.shed()
	}
	in.deliver()
}

// deliver gives the packets to the Device; they are valid until the buffers are
// received into again.
func (in *inbound) deliver() {
	if len(in.packets) == 0 {
		return
	}
	n, err := in.t.cfg.Device.Write(in.packets, deviceOffset)
	if err != nil && n < len(in.packets) {
		in.t.drops.add(DropDevice, len(in.packets)-n)
	}
	in.packets = in.packets[:0]
}

// shed drops the oldest packet of a bulk flow: from whichever flow sends most, mostly. What is
// small and rare (a ping, a name, a key that was pressed, an acknowledgement) did not fill the queue.
func (in *inbound) shed() {
	for i, p := range in.packets {
		if len(p) >= deviceOffset+bulkPacket {
			in.packets = slices.Delete(in.packets, i, i+1)
			in.t.drops.add(DropEarly, 1)
			return
		}
	}
}

// single deals with one datagram outside the pump.
func (in *inbound) single(p *peer, at path, datagram []byte) {
	in.now = in.t.clock.now()
	in.datagram(p, at, datagram)
	in.release(at)
}

// message deals with one receive: datagrams of one remote.
func (in *inbound) message(m *Inbound) {
	p := in.t.remotes.get(m.Remote)
	at := path{conn: in.conn, remote: m.Remote, local: m.Local}
	size := max(m.SegmentSize, 1)
	for off := 0; off < m.N; off += size {
		in.datagram(p, at, m.Buf[off:min(off+size, m.N)])
	}
	in.release(at)
}

// release lets go of the association held and does what had to wait for that.
func (in *inbound) release(at path) {
	a := in.held
	if a == nil {
		return
	}
	in.held = nil
	a.inMu.Unlock()
	p := a.peer
	p.in.add(in.counted.packets, in.counted.bytes)
	if in.counted.packets > 0 && p.session != nil {
		p.session.heardDatagrams(a, in.now)
	}
	in.counted.packets, in.counted.bytes = 0, 0
	if in.heard {
		a.lastInbound.Store(in.now)
		p.lastInbound.Store(in.now)
		if in.newest && *a.path.Load() != at {
			to := at // only here does a path have to live on
			p.roam(a, &to)
		}
		if a.lingering.Load() {
			p.confirm(a)
		}
	}
	in.heard, in.newest = false, false
	in.echo(a)
	for _, r := range in.answers {
		p.answered(r)
	}
	in.answers = in.answers[:0]
	for _, do := range in.later {
		do()
	}
	in.later = in.later[:0]
}

// echo answers the DPD-REQs of a's peer: the records that brought them are sealed again where
// they lie. A peer may send as many as it likes, so this allocates nothing. No
// answer is larger than what it answers.
func (in *inbound) echo(a *association) {
	if len(in.echoes) == 0 {
		return
	}
	seq, ok := a.reserve(len(in.echoes))
	if !ok {
		in.t.drops.add(DropExhausted, len(in.echoes))
		in.echoes = in.echoes[:0]
		return
	}
	to := a.path.Load()
	in.wire = in.wire[:0]
	for i, record := range in.echoes {
		record[a.sealer.headroom()] = byte(frameDPDReply)
		a.sealer.seal(record, contentApplicationData, seq+uint64(i), &in.scratch)
		in.wire = append(in.wire, Run{Remote: to.remote, Local: to.local, Segments: in.echoes[i : i+1 : i+1]})
	}
	for wire := in.wire; len(wire) > 0; {
		n, err := to.conn.WriteBatch(wire)
		if err == nil {
			a.peer.lastOutbound.Store(in.now)
			break
		}
		if !errors.Is(err, ErrDatagramTooBig) { // a probe that our side of the path does not carry is no loss
			in.t.drops.add(DropSend, 1)
		}
		wire = wire[min(n, len(wire)-1)+1:]
	}
	in.echoes = in.echoes[:0]
}

func (in *inbound) datagram(p *peer, at path, d []byte) {
	for rest := d; len(rest) > 0; {
		hdr, record, after, ok := nextRecord(rest)
		if !ok {
			in.t.drops.add(DropMalformed, 1)
			return
		}
		if hdr.typ != contentApplicationData && (hdr.epoch == 0 || hdr.typ != contentAlert) {
			in.release(at)
			in.t.handshakeDatagram(at, rest, p)
			return
		}
		in.protected(p, at, hdr, record)
		rest = after
	}
}

// protected opens a record of the traffic keys.
func (in *inbound) protected(p *peer, at path, hdr recordHeader, record []byte) {
	if hdr.epoch == 0 {
		in.t.drops.add(DropMalformed, 1)
		return
	}
	if p == nil {
		if !in.early(at, record) {
			in.stranger(at, hdr, record)
		}
		return
	}
	s := p.slots.Load()
	doubt := in.doubt == at.remote && in.now-in.doubted < int64(doubtTime)
	if a := s.single(); a != nil && !doubt {
		got := in.open(a, at, hdr, record)
		if got != opened {
			in.doubt, in.doubted = at.remote, in.now
		}
		in.count(got)
		return
	}
	// Two or three associations are alive, a rekey is under way; or two peers have been
	// heard from this address, or a forger. The record does not say whose it is, and a failed open destroys it.
	copied := in.second[:copy(in.second, record)]
	worst := opened
	for a := range s.each {
		got := in.open(a, at, hdr, record)
		if got == opened {
			return
		}
		if got == forged {
			copy(record, copied)
		}
		worst = max(worst, got)
	}
	if now := time.Now(); doubt && in.shared.AllowN(now, 1) {
		// What looks like a replay mostly is one, but may be a newcomer's with small numbers.
		wide := worst == forged || in.newcomers.AllowN(now, 1)
		if _, ok := in.find(p, wide, at, hdr, record); ok {
			return
		}
	}
	in.doubt, in.doubted = at.remote, in.now
	in.count(worst)
}

// early keeps a record that may belong to a handshake just ending here: the
// client has our last flight and sends, we are not done with it yet. During a rekey nothing need
// be kept: the client goes on under the old association until we have answered.
func (in *inbound) early(at path, record []byte) bool {
	pend := in.t.halfOpen.get(at.remote)
	return pend != nil && pend.conn.push(record)
}

// stranger looks for the association of a record from an address where no peer
// is known: a peer behind a NAT that has given it another port, or on another
// network.
func (in *inbound) stranger(at path, hdr recordHeader, record []byte) {
	if why, ok := in.find(nil, true, at, hdr, record); !ok {
		in.t.drops.add(why, 1)
	}
}

// find looks for the association of a record among all peers but the one that is
// known at its address, and gives the address to the peer found, else says why
// there is none. Only associations for which the record would be the newest are tried, and
// unless wide only those that live at the address.
func (in *inbound) find(known *peer, wide bool, at path, hdr recordHeader, record []byte) (why DropReason, ok bool) {
	in.release(at)
	now := time.Now()
	wide = wide && in.search.AllowN(now, 1)
	if !wide && known == nil {
		return DropTrialLimit, false
	}
	copied := in.second[:copy(in.second, record)]
	for _, p := range *in.t.searchList.Load() {
		if p == known {
			continue
		}
		for a := range p.slots.Load().each {
			if !wide && a.path.Load().remote != at.remote {
				continue
			}
			a.inMu.Lock()
			fits := a.replay.ahead(hdr.seq)
			a.inMu.Unlock()
			if !fits {
				continue
			}
			if !in.trials.AllowN(now, 1) {
				return DropTrialLimit, false
			}
			if in.open(a, at, hdr, record) == opened {
				in.release(at)
				p.reclaim(a, at.remote) // it may never have left: another peer was heard from there
				return 0, true
			}
			copy(record, copied)
			in.release(at) // two pumps that meet associations in another order would wait for each other
		}
	}
	return DropUnknownRemote, false
}

// verdict is what open has found.
type verdict int

const (
	opened   verdict = iota
	replayed         // seen before or too old, untouched
	forged           // not sealed with these keys; destroyed by the attempt
)

func (in *inbound) count(v verdict) {
	switch v {
	case replayed:
		in.t.drops.add(DropReplay, 1)
	case forged:
		in.t.drops.add(DropAuthentication, 1)
	}
}

// open tries record under a, in place, and takes its frame.
func (in *inbound) open(a *association, at path, hdr recordHeader, record []byte) verdict {
	if in.held != a {
		in.release(at)
		in.held = a
		a.inMu.Lock()
	}
	if !a.replay.check(hdr.seq) {
		return replayed
	}
	plain, err := a.opener.open(record, hdr, &in.scratch)
	if err != nil {
		return forged
	}
	in.heard = true
	if a.replay.mark(hdr.seq) {
		in.newest = true
	}
	if hdr.typ == contentAlert {
		in.alert(a, plain)
	} else {
		in.frame(a, record, plain)
	}
	return opened
}

// frame takes the plaintext of a record, which lies inside record.
func (in *inbound) frame(a *association, record, plain []byte) {
	if len(plain) == 0 {
		in.t.drops.add(DropEmptyRecord, 1)
		return
	}
	body := plain[frameHeaderSize:]
	switch frameType(plain[0]) {
	case frameData:
		in.packet(a.peer, record, len(body))
	case frameDPDRequest:
		in.echoes = append(in.echoes, record)
	case frameDPDReply:
		if len(body) >= dpdBodySize {
			in.answers = append(in.answers, dpdAnswer{int64(binary.BigEndian.Uint64(body)), len(body)})
		} else if s := a.peer.session; s != nil {
			in.later = append(in.later, s.answeredShortly)
		} // else a stranger's
	case frameDisconnect, frameTerminate:
		if s := a.peer.session; s != nil {
			g := newGoodbye(frameType(plain[0]), body)
			in.later = append(in.later, func() { s.goodbye(nil, a, g) })
		} else {
			in.later = append(in.later, func() { a.peer.goodbye(a) })
		}
	case frameKeepalive:
	default:
		in.t.drops.add(DropUnknownFrame, 1)
	}
}

func (in *inbound) alert(a *association, plain []byte) {
	if al, ok := parseAlert(plain); ok && al.ends() {
		in.later = append(in.later, func() { a.peer.goodbye(a) })
	}
}

// packet checks the source of the packet of n bytes that ends the plaintext of
// record and queues it for the Device.
func (in *inbound) packet(p *peer, record []byte, n int) {
	end := len(record) - tagSize
	packet := record[end-n : end]
	src, ok := source(packet)
	if !ok || !in.source.allowed(in.t, p, src) {
		in.t.drops.add(DropSource, 1)
		return
	}
	in.counted.packets++
	in.counted.bytes += n
	in.packets = append(in.packets, record[end-n-deviceOffset:end:end])
}

// sourceCheck tells which sources a peer may send from. Neighbours mostly share one, so the last answer is kept.
type sourceCheck struct {
	src  netip.Addr         // last source found to be allowed
	peer *peer              // for this peer
	from *bart.Table[*peer] // in this table
}

func (c *sourceCheck) allowed(t *Transport, p *peer, src netip.Addr) bool {
	routes := t.routes.Load()
	if src == c.src && p == c.peer && c.from == routes {
		return true
	}
	owner, _ := routes.Lookup(src)
	if owner != p {
		return false
	}
	c.src, c.peer, c.from = src, p, routes
	return true
}
