package sandbox

import (
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Forwarded are the signals that are for the program, but for those that this process was started to
// ignore: the program ignores them too, as under nohup(1).
func Forwarded() []os.Signal {
	return slices.DeleteFunc([]os.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM,
		unix.SIGWINCH, unix.SIGCONT, unix.SIGTSTP,
	}, signal.Ignored)
}

// fromTerminal are the signals that a terminal, or the shell at it, sends to a whole job: to the
// parent, the helper and the program alike. A signal does not say where it comes from, but the
// helper has a copy of it if the program has.
var fromTerminal = []os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP, unix.SIGCONT, unix.SIGWINCH}

// terminalTime is how long the helper's own copy of a terminal's signal may be later than the
// parent's.
const terminalTime = 100 * time.Millisecond

// signals are those that the helper has had lately itself.
type signals struct {
	mu  sync.Mutex
	had map[syscall.Signal]int
}

func newSignals() *signals {
	s := &signals{had: make(map[syscall.Signal]int)}
	c := make(chan os.Signal, 32)
	if f := Forwarded(); len(f) > 0 { // none would mean all
		signal.Notify(c, f...) // they do nothing here: the parent forwards its own
	}
	go s.count(c)
	return s
}

func (s *signals) count(c <-chan os.Signal) {
	for sig := range c {
		s.mu.Lock()
		s.had[sig.(syscall.Signal)]++
		s.mu.Unlock()
		time.AfterFunc(2*terminalTime, func() { s.take(sig.(syscall.Signal)) })
	}
}

// take tells whether the helper has had sig lately, once for each time.
func (s *signals) take(sig syscall.Signal) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.had[sig] == 0 {
		return false
	}
	s.had[sig]--
	return true
}

// forward sends to the program what the parent was sent, unless it comes from the terminal, which
// has sent it to the program too.
func (s *signals) forward(pid int, sig syscall.Signal) {
	if !slices.Contains(fromTerminal, os.Signal(sig)) {
		unix.Kill(pid, sig)
		return
	}
	time.AfterFunc(terminalTime, func() {
		if !s.take(sig) {
			unix.Kill(pid, sig)
		}
	})
}
