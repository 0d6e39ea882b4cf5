package transport

import "time"

// pathMTU searches for the largest inner packet that a path carries, in the
// spirit of RFC 8899: padded DPD-REQs are the probes, their echoes the proof.
// A path is taken to carry the configured size until probes of that size
// stay unanswered; then a ladder of sizes is sent at once, and again between the
// largest answered and the smallest unanswered one, until the step is small.
//
// Silence alone proves nothing about sizes: every send has the smallest request beside
// it, and a round counts only if something of its last send was answered. On a
// new path nothing but that request leaves before it is answered, so that who
// sends us small records from a false address cannot draw large ones there.
//
// It is a plain state machine: time comes in, probes go out through a function.
// The owner guards it.
type pathMTU struct {
	max  int // the configured inner MTU: never probed beyond
	good int // largest size proven, or minInnerMTU unproven
	bad  int // smallest size that failed; max+1: none
	use  int // what inner reports

	round []mtuProbe // under way
	sends int        // times this round was sent
	tries int        // times it will be
	due   int64      // next send, or the end of the round; never when settled
	raise int64      // when a path found small is tried again; 0: not set

	since   int64 // when the path was new; what was asked before does not count
	contact bool  // something was answered on this path, and lately
	heard   bool  // something of the last send was
	silent  int   // rounds in a row that ended in silence
}

type mtuProbe struct {
	size     int
	answered bool
}

const (
	// minInnerMTU fits every path that carries IPv6: 1280 less the outer IPv6 and UDP
	// headers, the record with its nonce and tag, and the frame type.
	minInnerMTU = 1280 - 40 - 8 - recordHeaderSize - 8 - tagSize - frameHeaderSize
	// mtuStep ends the search: what is left between good and bad is not worth more probes.
	mtuStep = 8
	// mtuLadder is the number of sizes tried at once.
	mtuLadder = 8
	// mtuSends is how often an unanswered size is tried (MAX_PROBES, RFC 8899 5.1.2).
	mtuSends = 3
	// mtuCheckSends is the same for the size in use, which is checked again and again: with a fifth of
	// the exchanges lost, a wrong verdict comes once in 3,000 checks.
	mtuCheckSends = 5
	// mtuCheck is the pause between two checks of the size in use while packets leave
	// (CONFIRMATION_TIMER, RFC 8899 5.1.1): a path that has become smaller says nothing by itself, and small packets
	// inbound may go on.
	mtuCheck = 15 * time.Second
	// mtuPause is how long a search rests that has met with silence, doubling up to mtuPauseMax.
	mtuPause    = time.Second
	mtuPauseMax = time.Minute
	// mtuRaise is when a path that was found small is tried again (PMTU_RAISE_TIMER, RFC 8899 5.1.1).
	mtuRaise = 10 * time.Minute
)

func (m *pathMTU) init(inner int) {
	*m = pathMTU{max: inner, good: min(minInnerMTU, inner), bad: inner + 1, use: inner, due: never}
}

// inner is the largest packet to send now.
func (m *pathMTU) inner() int { return m.use }

// restart begins anew on a new path.
func (m *pathMTU) restart(now int64) {
	use := m.use
	m.init(m.max)
	m.use = use // until proven otherwise
	m.since = now
	m.begin(now, mtuSends, m.max)
}

// suspect checks that the path still carries what is in use.
func (m *pathMTU) suspect(now int64) {
	if m.searching() {
		return
	}
	m.good = min(minInnerMTU, m.max)
	m.begin(now, mtuCheckSends, m.use)
}

// refused is told that the system does not send packets of this size at all.
// It reports whether the search has changed.
func (m *pathMTU) refused(size int, now int64) bool {
	if size >= m.bad || size <= minInnerMTU {
		return false
	}
	m.bad = size
	if m.good >= size {
		m.good = min(minInnerMTU, m.max)
	}
	m.beginLadder(now)
	return true
}

func (m *pathMTU) searching() bool { return len(m.round) != 0 }

func (m *pathMTU) begin(now int64, tries int, sizes ...int) {
	m.round = m.round[:0]
	for _, s := range sizes {
		m.round = append(m.round, mtuProbe{size: s})
	}
	m.sends, m.tries, m.due = 0, tries, now
}

func (m *pathMTU) beginLadder(now int64) {
	m.round = m.round[:0]
	gap := m.bad - m.good
	n := min(mtuLadder, max(gap/mtuStep, 1))
	for i := 1; i <= n; i++ {
		size := m.good + gap*i/(n+1)
		if size > m.good && (len(m.round) == 0 || m.round[len(m.round)-1].size != size) {
			m.round = append(m.round, mtuProbe{size: size})
		}
	}
	m.sends, m.tries, m.due = 0, mtuSends, now
}

// answered takes the echo of a request of this size made at sent; step publishes what it
// proves. It reports whether step has something to do now.
func (m *pathMTU) answered(size int, sent, now int64) bool {
	if sent < m.since {
		return false
	}
	m.heard, m.silent = true, 0
	if !m.contact {
		m.contact = true
		m.sends, m.due = 0, min(m.due, now)
	}
	largest := true
	for i := range m.round {
		if m.round[i].size == size {
			m.round[i].answered = true
		}
		largest = largest && m.round[i].answered
	}
	if size > m.good && size <= m.max && size < m.bad {
		m.good = size
	}
	if m.searching() && largest {
		m.due = now // no need to wait out the round
	}
	return m.due <= now
}

// step sends probes that are due through ask and returns when it wants to be
// called again.
func (m *pathMTU) step(now int64, rtt time.Duration, ask func(size int)) (due int64) {
	if now < m.due {
		return m.due
	}
	if !m.searching() { // the raise timer
		m.bad, m.raise = m.max+1, 0
		m.begin(now, mtuSends, m.max)
	}
	open := false
	for _, p := range m.round {
		open = open || !p.answered
	}
	switch {
	case !open:
		m.concludeRound(now)
	case m.sends < m.tries:
		m.heard = false
		ask(0)
		for _, p := range m.round {
			if m.contact && !p.answered {
				ask(p.size)
			}
		}
		m.sends++
		m.due = now + int64(min(max(2*rtt+50*time.Millisecond, 150*time.Millisecond), 2*time.Second))
	case m.heard:
		m.concludeRound(now)
	default:
		m.rest(now)
	}
	return max(m.due, now)
}

// rest puts off a round that nobody has heard. It begins again with the first answer.
func (m *pathMTU) rest(now int64) {
	m.contact = false
	m.sends, m.due = 0, now+int64(min(mtuPause<<min(m.silent, 10), mtuPauseMax))
	m.silent++
	if m.use >= m.bad { // this much the system has said, whether anybody answers or not
		m.use = m.good
	}
}

// concludeRound takes what the round has shown: the unanswered sizes above the
// largest answered one have failed.
func (m *pathMTU) concludeRound(now int64) {
	for _, p := range m.round {
		if !p.answered && p.size > m.good && p.size < m.bad {
			m.bad = p.size
		}
	}
	m.round = m.round[:0]
	if m.good >= m.max || m.bad-m.good <= mtuStep {
		m.use = min(m.good, m.max)
		m.due = never
		if m.use < m.max {
			if m.raise == 0 { // a check does not put it off
				m.raise = now + int64(mtuRaise)
			}
			m.due = m.raise
		}
		return
	}
	// What is in use stays so until the ladder says how far down: connections keep a
	// lower MTU for good, and the ladder needs but two round trips.
	m.beginLadder(now)
}
