package transport

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// wire answers probes up to a size after a round trip, as a path would.
type mtuWire struct {
	carries int
	rtt     time.Duration
	loss    float64
	rng     *rand.Rand
	echoes  []echo
	probes  int
	largest int
}

type echo struct {
	at   int64
	size int
	sent int64
}

// run plays d of time against m and returns how long the search took.
func (w *mtuWire) run(m *pathMTU, now *int64, d time.Duration) (settled time.Duration) {
	begin := *now
	end := begin + int64(d)
	for *now < end {
		due := m.step(*now, w.rtt, func(size int) {
			w.probes++
			w.largest = max(w.largest, size)
			if size <= w.carries && w.rng.Float64() >= w.loss {
				w.echoes = append(w.echoes, echo{*now + int64(w.rtt), max(size, dpdBodySize), *now})
			}
		})
		if !m.searching() && settled == 0 {
			settled = time.Duration(*now - begin)
		}
		for len(w.echoes) > 0 && w.echoes[0].at <= *now {
			m.answered(w.echoes[0].size, w.echoes[0].sent, *now)
			w.echoes = w.echoes[1:]
			due = *now
		}
		next := min(due, end)
		if len(w.echoes) > 0 {
			next = min(next, w.echoes[0].at)
		}
		*now = max(next, *now+int64(time.Microsecond))
	}
	return settled
}

func TestPathMTUFindsWhatThePathCarries(t *testing.T) {
	for _, carries := range []int{1400, 1399, 1396, 1380, 1300, 1281, 1280, 1220, minInnerMTU + 1, minInnerMTU} {
		for _, rtt := range []time.Duration{0, time.Millisecond, 80 * time.Millisecond, 300 * time.Millisecond} {
			t.Run(fmt.Sprintf("%d/%v", carries, rtt), func(t *testing.T) {
				w := &mtuWire{carries: carries, rtt: rtt, rng: rand.New(rand.NewPCG(1, 2))}
				var m pathMTU
				m.init(1400)
				now := int64(time.Second)
				m.restart(now)
				if m.inner() != 1400 {
					t.Fatalf("before any proof inner is %d, want the configured 1400", m.inner())
				}
				took := w.run(&m, &now, 30*time.Second)
				if m.searching() {
					t.Fatal("still searching after 30 s")
				}
				if m.inner() > carries || m.inner() < carries-mtuStep {
					t.Errorf("inner is %d, the path carries %d", m.inner(), carries)
				}
				if took > 10*time.Second {
					t.Errorf("search took %v", took)
				}
				if w.probes > 80 {
					t.Errorf("search sent %d probes", w.probes)
				}
			})
		}
	}
}

func TestPathMTUOneInTenLost(t *testing.T) {
	for seed := range uint64(20) {
		w := &mtuWire{carries: 1333, rtt: 20 * time.Millisecond, loss: 0.1, rng: rand.New(rand.NewPCG(seed, 7))}
		var m pathMTU
		m.init(1400)
		now := int64(1)
		m.restart(now)
		w.run(&m, &now, 30*time.Second)
		// Three sends each: one size in a thousand is misjudged, and then only downward.
		if m.inner() > 1333 || m.inner() < 1280 {
			t.Errorf("seed %d: inner is %d, the path carries 1333", seed, m.inner())
		}
	}
}

func TestPathMTUFollowsThePath(t *testing.T) {
	w := &mtuWire{carries: 1400, rtt: 10 * time.Millisecond, rng: rand.New(rand.NewPCG(1, 2))}
	var m pathMTU
	m.init(1400)
	now := int64(1)
	m.restart(now)
	w.run(&m, &now, time.Second)
	if m.inner() != 1400 {
		t.Fatalf("inner is %d on a wide path", m.inner())
	}
	w.carries = 1300 // the route changes; liveness suspects it
	m.suspect(now)
	w.run(&m, &now, 10*time.Second)
	if m.inner() > 1300 || m.inner() < 1300-mtuStep {
		t.Fatalf("inner is %d after the path shrank to 1300", m.inner())
	}
	w.carries = 1400
	w.run(&m, &now, mtuRaise+10*time.Second)
	if m.inner() != 1400 {
		t.Fatalf("inner is %d although the path is wide again", m.inner())
	}
}

func TestPathMTURefusedBySystem(t *testing.T) {
	w := &mtuWire{carries: 1250, rtt: time.Millisecond, rng: rand.New(rand.NewPCG(1, 2))}
	var m pathMTU
	m.init(1400)
	now := int64(1)
	m.restart(now)
	if !m.refused(1400, now) {
		t.Fatal("a refusal of the size in use changes nothing")
	}
	if m.refused(1400, now) {
		t.Error("the same refusal again starts the search anew")
	}
	w.run(&m, &now, 10*time.Second)
	if m.inner() > 1250 || m.inner() < 1250-mtuStep {
		t.Errorf("inner is %d, the path carries 1250", m.inner())
	}
}

// settled is a search that has found what w carries.
func settled(t *testing.T, w *mtuWire) (m *pathMTU, now int64) {
	t.Helper()
	m, now = new(pathMTU), int64(1)
	m.init(1400)
	m.restart(now)
	w.run(m, &now, 10*time.Second)
	if m.searching() {
		t.Fatal("still searching")
	}
	return m, now
}

// An outage is no verdict on sizes: when it is over, all is as before, at once.
func TestPathMTUSurvivesAnOutage(t *testing.T) {
	for _, whole := range []time.Duration{3 * time.Second, 40 * time.Second, 10 * time.Minute} {
		w := &mtuWire{carries: 1400, rtt: 20 * time.Millisecond, rng: rand.New(rand.NewPCG(1, 2))}
		m, now := settled(t, w)
		w.carries, w.probes, w.largest = -1, 0, 0
		for end := now + int64(whole); now < end; {
			m.suspect(now) // as liveness does
			w.run(m, &now, 2500*time.Millisecond)
			if m.inner() != 1400 {
				t.Fatalf("inner is %d in an outage", m.inner())
			}
		}
		if whole == 10*time.Minute && w.probes > 100 {
			t.Errorf("%d probes in an outage of %v", w.probes, whole)
		}
		w.carries = 1300 // and comes back smaller
		m.answered(dpdBodySize, now, now)
		w.run(m, &now, 5*time.Second)
		if m.inner() > 1300 || m.inner() < 1300-mtuStep {
			t.Errorf("inner is %d after an outage of %v, the path carries 1300", m.inner(), whole)
		}
	}
}

// Checks go on while packets leave; the path is tried for more all the same.
func TestPathMTUChecksDoNotPutOffTheRaise(t *testing.T) {
	w := &mtuWire{carries: 1300, rtt: 20 * time.Millisecond, rng: rand.New(rand.NewPCG(1, 2))}
	m, now := settled(t, w)
	w.carries = 1400
	for end := now + int64(mtuRaise); now < end; {
		m.suspect(now)
		w.run(m, &now, mtuCheck)
	}
	if m.inner() != 1400 {
		t.Errorf("inner is still %d after %v", m.inner(), mtuRaise)
	}
}

// A day of checks on a link that loses every tenth datagram each way.
func TestPathMTUOnALossyLinkForADay(t *testing.T) {
	low, dips := 0, 0
	for seed := range uint64(4) {
		w := &mtuWire{carries: 1400, rtt: 20 * time.Millisecond, rng: rand.New(rand.NewPCG(seed, 9))}
		m, now := settled(t, w)
		w.loss = 0.19
		was := 1400
		for end := now + int64(24*time.Hour); now < end; {
			m.suspect(now)
			w.run(m, &now, 20*time.Second)
			if m.inner() < 1300 {
				low++
			}
			if m.inner() < was {
				dips++
			}
			was = m.inner()
		}
	}
	t.Logf("%d dips in 4 days", dips)
	if low > 0 || dips > 20 {
		t.Errorf("inner went down %d times in 4 days, %d times far", dips, low)
	}
}

// Nothing large leaves for an address before something small was answered from there.
func TestPathMTUProbesOnlyWhereSomebodyAnswers(t *testing.T) {
	w := &mtuWire{carries: 1400, rtt: 20 * time.Millisecond, rng: rand.New(rand.NewPCG(1, 2))}
	m, now := settled(t, w)
	w.carries, w.largest, w.probes = -1, 0, 0
	before := now - 1
	m.restart(now)
	if m.answered(1400, before, now) {
		t.Error("an echo of the path before counts for the new one")
	}
	w.run(m, &now, time.Minute)
	if w.largest > dpdBodySize || w.probes > 30 {
		t.Errorf("%d probes of up to %d bytes to an address that never answered", w.probes, w.largest)
	}
	if m.inner() != 1400 {
		t.Errorf("inner is %d", m.inner())
	}
}

// What the system refuses is refused, whether the peer answers probes or not.
func TestPathMTURefusedWithoutAnswers(t *testing.T) {
	w := &mtuWire{carries: -1, rng: rand.New(rand.NewPCG(1, 2))}
	var m pathMTU
	m.init(1400)
	now := int64(1)
	m.restart(now)
	m.refused(1400, now)
	w.run(&m, &now, 10*time.Second)
	if m.inner() != minInnerMTU {
		t.Errorf("inner is %d", m.inner())
	}
}
