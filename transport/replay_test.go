package transport

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"unsafe"
)

// naiveWindow is the oracle: it remembers every number.
type naiveWindow struct {
	seen   map[uint64]bool
	newest uint64
}

func (n *naiveWindow) check(seq uint64) bool {
	return !n.seen[seq] && (len(n.seen) == 0 || seq+replayWindowSize > n.newest)
}

func (n *naiveWindow) mark(seq uint64) bool {
	newest := len(n.seen) == 0 || seq > n.newest
	n.seen[seq] = true
	n.newest = max(n.newest, seq)
	return newest
}

func TestReplayWindow(t *testing.T) {
	const w = replayWindowSize
	type step struct {
		seq          uint64
		pass, newest bool
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"in order", []step{{0, true, true}, {1, true, true}, {2, true, true}}},
		{"zero twice", []step{{0, true, true}, {0, false, false}}},
		{"begins late", []step{{300, true, true}, {299, true, false}, {0, true, false}, {300, false, false}}},
		{"reordered", []step{{5, true, true}, {3, true, false}, {4, true, false}, {3, false, false}, {6, true, true}}},
		{"oldest that fits", []step{{w, true, true}, {1, true, false}, {0, false, false}}},
		{"just beyond", []step{{w - 1, true, true}, {0, true, false}, {w, true, true}, {0, false, false}, {1, true, false}}},
		{"a word is entered", []step{{63, true, true}, {64, true, true}, {63, false, false}, {w + 64, true, true}, {64, false, false}, {65, true, false}}},
		{"jump over everything", []step{{1, true, true}, {1 << 40, true, true}, {1, false, false}, {1<<40 - w + 1, true, false}, {1<<40 - w, false, false}}},
		{"jump of exactly the ring", []step{{10, true, true}, {10 + 64*replayWords, true, true}, {10 + 64*replayWords - 5, true, false}}},
		{"end of the epoch", []step{{maxSequence, true, true}, {maxSequence - 1, true, false}, {maxSequence, false, false}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var win replayWindow
			for i, s := range c.steps {
				if got := win.check(s.seq); got != s.pass {
					t.Fatalf("step %d: check(%d) = %v", i, s.seq, got)
				}
				if !s.pass {
					continue
				}
				if got := win.mark(s.seq); got != s.newest {
					t.Fatalf("step %d: mark(%d) = %v", i, s.seq, got)
				}
			}
		})
	}
}

// A check alone changes nothing: the record was not authenticated.
func TestReplayCheckIsPure(t *testing.T) {
	var win replayWindow
	win.mark(10)
	before := win
	win.check(1 << 40)
	win.check(3)
	if win != before {
		t.Fatal("check changed the window")
	}
}

func TestReplayWindowIsSmall(t *testing.T) {
	if size := unsafe.Sizeof(replayWindow{}); size > 600 {
		t.Fatalf("%d bytes for each association", size)
	}
}

// compareWithNaive runs both windows over the same numbers.
func compareWithNaive(t *testing.T, seqs []uint64) {
	t.Helper()
	var win replayWindow
	naive := naiveWindow{seen: map[uint64]bool{}}
	for i, seq := range seqs {
		got, want := win.check(seq), naive.check(seq)
		if got != want {
			t.Fatalf("step %d: check(%d) = %v, want %v (newest %d)", i, seq, got, want, naive.newest)
		}
		if !got {
			continue
		}
		if got, want := win.mark(seq), naive.mark(seq); got != want {
			t.Fatalf("step %d: mark(%d) = %v, want %v", i, seq, got, want)
		}
	}
}

func TestReplayWindowRandomWalk(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		at := rng.Uint64N(1 << 20)
		seqs := make([]uint64, 3000)
		for i := range seqs {
			switch rng.IntN(20) {
			case 0:
				at += rng.Uint64N(3 * replayWindowSize)
			default:
				at += rng.Uint64N(40)
			}
			seqs[i] = at - min(at, rng.Uint64N(replayWindowSize+200))
		}
		compareWithNaive(t, seqs)
	}
}

// FuzzReplayWindow reads moves of the newest number and of the one that arrives: 4
// bytes are a step forward of 0 to 65535 and a step back from there.
func FuzzReplayWindow(f *testing.F) {
	f.Add(uint64(0), []byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1})
	f.Add(uint64(maxSequence-70000), []byte{0xff, 0xff, 0, 0, 0, 0, 0x0f, 0xff, 0, 0, 0x10, 0x00})
	f.Add(uint64(4095), []byte{0, 1, 0x10, 0, 0, 64, 0, 63, 0x10, 0x40, 0, 0})
	f.Fuzz(func(t *testing.T, start uint64, moves []byte) {
		at := start & maxSequence
		var seqs []uint64
		for ; len(moves) >= 4; moves = moves[4:] {
			at = min(at+uint64(binary.BigEndian.Uint16(moves)), maxSequence)
			seqs = append(seqs, at-min(at, uint64(binary.BigEndian.Uint16(moves[2:]))))
		}
		compareWithNaive(t, seqs)
	})
}

func BenchmarkReplayWindow(b *testing.B) {
	var win replayWindow
	var seq uint64
	for b.Loop() {
		seq++
		if !win.check(seq) {
			b.Fatal("refused")
		}
		win.mark(seq)
	}
}
