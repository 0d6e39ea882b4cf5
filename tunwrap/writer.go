package tunwrap

// A writer is the scratch of one Write. The Wrapper keeps a pool of them, because writers
// come and go with goroutines that are not its own.
type writer struct {
	coalescer coalescer
}

// write takes one batch through the inbound path. It borrows bufs and overwrites headers in
// them. No lock is held when a packet is delivered.
func (x *writer) write(w *Wrapper, bufs [][]byte, offset int) {
	var n inboundCounts
	nat := w.nat.Load()
	c := &x.coalescer
	c.begin(len(bufs))
	for _, buf := range bufs {
		if offset > len(buf) {
			w.drops.add(DropMalformed)
			continue
		}
		b := buf[offset:]
		n.segments++
		n.bytes += uint64(len(b))
		b, l, d := verify(b)
		if d != DropNone {
			w.drops.add(d)
			continue
		}
		if nat != nil {
			nat.inbound(b, &l)
		}
		c.add(b, &l)
	}
	for i := range c.groups {
		g := &c.groups[i]
		if g.count > 1 {
			c.merge(g)
			n.superpackets++
		}
		w.link.Deliver(packetBuffer(c, g))
	}
	n.packets = uint64(len(c.groups))
	c.end()
	w.inbound.add(&n)
}
