package tunwrap

// rememberFragment notes that the first fragment p has passed, by the rule given.
func (f *Filter) rememberFragment(t *filterTable, p *filterPacket, rule int32, now int64) refusal {
	h := f.hash(&p.frags)
	s := f.shard(h)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := f.live(s, h, &p.frags, t, now)
	if e == nil {
		if e = f.insert(s, h, &p.frags, t.peerOf(p.farAddr())); e == nil {
			return refusedFull
		}
	}
	e.class, e.opener, e.rule, e.generation = classLater, p.direction, rule, t.generation
	e.header, e.got, e.end = uint16(p.header), uint32(p.length), 0
	e.deadline = now + int64(patienceFragments)
	return notRefused
}

// later decides about a fragment that is not the first: it follows the first if that has passed, and
// leaves alone what was looked at there (RFC 1858 4, RFC 3128). The datagram is
// forgotten when all its bytes have been seen.
func (f *Filter) later(t *filterTable, p *filterPacket, now int64) Drop {
	h := f.hash(&p.key)
	s := f.shard(h)
	s.mu.Lock()
	e := f.live(s, h, &p.key, t, now)
	if e == nil || p.at < int(e.header) || p.at+p.length > maxPacket {
		s.mu.Unlock()
		return f.refuse(refusedUnknown, p)
	}
	rule := e.rule
	e.got += uint32(p.length)
	if p.last {
		e.end = uint32(p.at + p.length)
	}
	if e.end != 0 && e.got >= e.end {
		f.remove(s, e)
	}
	s.mu.Unlock()
	f.count[rule].add(p)
	return DropNone
}
