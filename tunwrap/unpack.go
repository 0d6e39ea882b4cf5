package tunwrap

// An unpacker makes packets of what the reads of a TUN with a vnet header give: plain ones are
// left where the kernel has put them and their checksum is finished, superpackets are split.
// It is the part of a [TUNReader] that knows no system.
type unpacker struct {
	header vnetHeader
	seg    segmenter
	views  [2][]byte

	// spill is where a packet goes on that is longer than the buffer it was read to. The
	// part before spillStart takes what of the payload in that buffer is not the first segment's.
	spill [spillStart + maxPacket + 1]byte

	counts outboundCounts
	now    int64 // of the packets at hand, for the filter
}

// spillStart is also the most of a packet that is read into a record buffer, in bytes: no record
// holds more (RFC 5246 6.2.1).
const spillStart = 1 << 14

// direct cuts dst, a buffer for one packet, to what the kernel may write to. The rest of a packet goes
// to rest.
func (u *unpacker) direct(dst []byte) []byte { return dst[:min(len(dst), spillStart)] }

// rest lends the room for what of a packet is beyond direct.
func (u *unpacker) rest() []byte { return u.spill[spillStart:] }

// take begins with a packet of size bytes that was read, after its header, to direct(dst) and rest.
// A superpacket is loaded into seg, whose first segment must be written to dst before
// anything else is written there. Any other packet is finished in dst, its length returned. It borrows dst.
func (u *unpacker) take(dst []byte, size int, t *TUN) (written int) {
	u.counts.packets++
	g := u.header.get()
	nat, filter := t.nat.Load(), t.filter.Load()
	d := DropNone
	if g.kind() == GSONone {
		b := u.whole(dst, size)
		d = u.finish(b, &g, nat, filter)
		switch {
		case d != DropNone:
		case size > len(dst):
			t.TooBig(b, len(dst))
		default:
			u.counts.segments++
			u.counts.bytes += uint64(size)
			return size
		}
	} else {
		d = u.load(dst, size, g, nat, filter)
	}
	if d != DropNone {
		t.drops.add(d)
	}
	return 0
}

// whole lends the plain packet of size bytes in one piece: in dst, or in spill if it does not fit there.
func (u *unpacker) whole(dst []byte, size int) []byte {
	head := u.direct(dst)
	switch {
	case size <= len(head):
		return dst[:size]
	case size <= len(dst):
		copy(dst[len(head):], u.spill[spillStart:spillStart+size-len(head)])
		return dst[:size]
	}
	start := spillStart - copy(u.spill[spillStart-len(head):], head)
	return u.spill[start : start+size]
}

// finish completes the plain packet b.
func (u *unpacker) finish(b []byte, g *GSO, nat *natTable, filter *Filter) Drop {
	if g.NeedsCsum {
		// First, because the checksum need not be that of the outer transport header: the
		// kernel leaves that of a tunnelled packet to us too, and NAT would not find it.
		if d := g.finishChecksum(b); d != DropNone {
			return d
		}
	}
	return finishFiltered(b, &GSO{}, nat, filter, u.now)
}

// load begins with the superpacket of size bytes in dst and spill.
func (u *unpacker) load(dst []byte, size int, g GSO, nat *natTable, filter *Filter) Drop {
	head := u.direct(dst)
	head = head[:min(len(head), size)]
	u.views = [2][]byte{head, u.spill[spillStart : spillStart+size-len(head)]}
	if !g.NeedsCsum {
		// The headers' checksum is computed anew anyway.
		g.NeedsCsum, g.CsumStart, g.CsumOffset = true, 0, tcpChecksum
		if g.kind() == GSOUDPL4 {
			g.CsumOffset = udpChecksum
		}
	}
	if d := u.seg.load(u.views[:], size, g); d != DropNone {
		return d
	}
	if filter != nil {
		if d := filter.outbound(u.seg.headers(), &u.seg.layout, size, u.now); d != DropNone {
			u.seg.reset()
			return d
		}
	}
	if first := u.seg.segmentLen(); first < len(head) {
		// The next segments may be written when dst is no longer ours.
		n := len(head) - first
		copy(u.spill[spillStart-n:], head[first:])
		u.views = [2][]byte{head[:first], u.spill[spillStart-n : spillStart+size-len(head)]}
		u.seg.views = u.views[:] // and at is behind the headers, which are all in head
	}
	if nat != nil {
		nat.outbound(u.seg.headers(), &u.seg.layout, &u.seg.gso)
	}
	u.seg.prime()
	if u.seg.left > int(u.seg.gso.GSOSize) {
		u.counts.superpackets++
	}
	return DropNone
}

// split writes segments of the superpacket in seg until bufs are full, to bufs[i][offset:], their lengths to
// sizes, and returns how many. Some do not fit if somebody has given the interface a larger MTU than the tunnel's.
func (u *unpacker) split(bufs [][]byte, sizes []int, offset int, t *TUN) (n int) {
	for u.seg.busy && n < len(bufs) {
		size := u.seg.segmentLen()
		if fits := len(bufs[n]) - offset; size > fits {
			u.seg.tooLong(fits, &t.drops, t.TooBig)
			continue
		}
		u.seg.next(bufs[n][offset:])
		sizes[n] = size
		u.counts.bytes += uint64(size)
		n++
	}
	u.counts.segments += uint64(n)
	return n
}
