package transport

import "time"

// pathMTU searches for the largest inner packet that a path carries, in the
// spirit of RFC 8899: padded DPD-REQs are the probes, their echoes the proof.
// A path is taken to carry the configured size until probes of that size
// stay unanswered; then a ladder of sizes is sent at once, and again between the
// largest answered and the smallest unanswered one, until the step is small.
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
	due   int64      // next send, or the end of the round; never when settled
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
	m.begin(now, m.max)
}

// suspect checks that the path still carries what is in use.
func (m *pathMTU) suspect(now int64) {
	if m.searching() {
		return
	}
	m.good = min(minInnerMTU, m.max)
	m.begin(now, m.use)
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

func (m *pathMTU) begin(now int64, sizes ...int) {
	m.round = m.round[:0]
	for _, s := range sizes {
		m.round = append(m.round, mtuProbe{size: s})
	}
	m.sends, m.due = 0, now
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
	m.sends, m.due = 0, now
}

// answered takes the echo of a probe; step publishes what it proves.
func (m *pathMTU) answered(size int, now int64) {
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
}

// step sends probes that are due through ask and returns when it wants to be
// called again.
func (m *pathMTU) step(now int64, rtt time.Duration, ask func(size int)) (due int64) {
	if now < m.due {
		return m.due
	}
	if !m.searching() { // the raise timer
		m.bad = m.max + 1
		m.begin(now, m.max)
	}
	open := false
	for _, p := range m.round {
		open = open || !p.answered
	}
	if open && m.sends < mtuSends {
		for _, p := range m.round {
			if !p.answered {
				ask(p.size)
			}
		}
		m.sends++
		m.due = now + int64(min(max(2*rtt+50*time.Millisecond, 150*time.Millisecond), 2*time.Second))
		return m.due
	}
	m.concludeRound(now)
	return max(m.due, now)
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
			m.due = now + int64(mtuRaise)
		}
		return
	}
	// What is in use stays so until the ladder says how far down: connections keep a
	// lower MTU for good, and the ladder needs but two round trips.
	m.beginLadder(now)
}
