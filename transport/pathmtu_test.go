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
}

type echo struct {
	at   int64
	size int
}

// run plays d of time against m and returns how long the search took.
func (w *mtuWire) run(m *pathMTU, now *int64, d time.Duration) (settled time.Duration) {
	begin := *now
	end := begin + int64(d)
	for *now < end {
		due := m.step(*now, w.rtt, func(size int) {
			w.probes++
			if size <= w.carries && w.rng.Float64() >= w.loss {
				w.echoes = append(w.echoes, echo{*now + int64(w.rtt), size})
			}
		})
		if !m.searching() && settled == 0 {
			settled = time.Duration(*now - begin)
		}
		for len(w.echoes) > 0 && w.echoes[0].at <= *now {
			m.answered(w.echoes[0].size, *now)
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
