package netstack

import (
	"testing"
	"time"
)

func TestSendBudget(t *testing.T) {
	b := newSendBudget(BufferSizes{Default: 1 << 20, Max: 6 << 20})
	at := func(ms int) time.Time { return b.start.Add(time.Duration(ms) * time.Millisecond) }
	meters := make([]bulkMeter, 40)
	// bulk makes n connections send in bulk at one time and returns the size that the
	// last of them is told.
	bulk := func(n, ms int) (resize int) {
		for i := range n {
			resize = b.add(&meters[i], bulkBytes, at(ms))
		}
		return resize
	}
	if got := bulk(1, 0); got != 0 {
		t.Errorf("one sender: %d, want the stack's own tuning", got)
	}
	for i := range meters { // small ones do not count
		if got := b.add(&meters[i], 1000, at(1100)); got != 0 {
			t.Errorf("a small sender: %d", got)
		}
	}
	if got := bulk(8, 1200); got != 1<<20 {
		t.Errorf("eight senders: %d, want %d", got, 1<<20)
	}
	if got := b.add(&meters[0], 1, at(1300)); got != 1<<20 {
		t.Errorf("the first of eight, at its next write: %d", got)
	}
	if got := b.add(&meters[0], 1, at(1310)); got != 0 {
		t.Errorf("told twice: %d", got)
	}
	if got := bulk(40, 2100); got != minSendShare {
		t.Errorf("forty senders: %d, want the least share %d", got, minSendShare)
	}
	// A second after the others have stopped the one that is left has all.
	bulk(1, 3500)
	if got := bulk(1, 4100); got != 6<<20 {
		t.Errorf("one sender again: %d, want the maximum", got)
	}
	// And after a pause too.
	bulk(8, 5100)
	if got := b.add(&meters[0], 1, at(5200)); got != 1<<20 {
		t.Errorf("the first of eight again: %d", got)
	}
	if got := bulk(1, 9000); got != 6<<20 {
		t.Errorf("one sender after a pause: %d, want the maximum", got)
	}
}
