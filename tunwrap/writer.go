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
	filter, now := w.filter.Load(), int64(0)
	if filter != nil {
		now = filter.now()
	}
	for i := range c.groups {
		g := &c.groups[i]
		if filter != nil {
			if d := filter.inbound(c.packets[g.first].b, &g.layout, g.total, now); d != DropNone {
				w.drops.addN(d, int(g.count))
				continue
			}
		}
		n.packets++
		if g.count > 1 {
			c.merge(g)
			n.superpackets++
		}
		w.link.Deliver(packetBuffer(c, g))
	}
	c.end()
	w.inbound.add(&n)
}
