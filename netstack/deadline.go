package netstack

import (
	"sync"
	"time"
)

// A deadline is a point in time that a waiting operation can be woken by, and
// that can be moved while it waits. The zero value is not ready; see init.
type deadline struct {
	mu     sync.Mutex
	timer  *time.Timer
	passed chan struct{} // closed once the deadline has passed; replaced when it is moved
}

func (d *deadline) init() { d.passed = make(chan struct{}) }

// set moves the deadline to t; zero means never.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil && !d.timer.Stop() {
		<-d.passed // the timer has fired: let it finish before its channel is replaced
	}
	d.timer = nil
	over := isClosed(d.passed)
	if t.IsZero() {
		if over {
			d.passed = make(chan struct{})
		}
		return
	}
	if wait := time.Until(t); wait > 0 {
		if over {
			d.passed = make(chan struct{})
		}
		passed := d.passed
		d.timer = time.AfterFunc(wait, func() { close(passed) })
		return
	}
	if !over {
		close(d.passed)
	}
}

// done returns a channel that is closed when the deadline passes, also if it is moved
// in the meantime: set replaces the channel only when it is closed already.
func (d *deadline) done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.passed
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
