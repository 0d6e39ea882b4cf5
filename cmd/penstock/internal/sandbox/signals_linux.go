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

// jobTime is how long the helper's own copy of a signal to the whole job may be later than the parent's.
const jobTime = 100 * time.Millisecond

// startTime is how long after the program's start a signal may still reach the helper that was sent before. A program that
// has one twice then is better off than one that has none.
const startTime = 20 * time.Millisecond

// signals are those that the helper has had lately itself, and with it the program.
type signals struct {
	mu   sync.Mutex
	from time.Time // the program has had none of those before; zero: there is no program yet
	had  map[syscall.Signal]int
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
		if !s.from.IsZero() && time.Now().After(s.from) {
			s.had[sig.(syscall.Signal)]++
			time.AfterFunc(2*jobTime, func() { s.take(sig.(syscall.Signal)) })
		}
		s.mu.Unlock()
	}
}

// begin is called when the program is there.
func (s *signals) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.from = time.Now().Add(startTime)
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

// forward sends to the program what the parent was sent, unless that was sent to the whole job: by the terminal, the
// shell or timeout(1). A signal does not say to whom it was sent, but the helper has a copy of it then, and so has the
// program, if it has not left the job.
func (s *signals) forward(pid int, sig syscall.Signal) {
	time.AfterFunc(jobTime, func() {
		group, err := unix.Getpgid(pid)
		if had := s.take(sig); !had || err == nil && group != unix.Getpgrp() {
			unix.Kill(pid, sig)
		}
	})
}

// StopFor does to this process what sig does to one that does not handle it, if that is to stop it: until the shell
// continues the job. Where there is no shell that could, in an orphaned process group, the kernel lets nobody stop for a
// terminal's sake, and nor does this. (The kernel cannot be left to it: Go's handler stays once there was one.)
func StopFor(sig os.Signal) {
	if sig == unix.SIGTSTP && !orphaned() {
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP) // an error is for a process that does not exist
	}
}

// orphaned tells whether the parent of this process's group is not of its session.
func orphaned() bool {
	session, err := unix.Getsid(0)
	if err != nil {
		return true
	}
	for pid := os.Getppid(); pid > 0; pid = parentOf(pid) {
		if group, err := unix.Getpgid(pid); err != nil || group != unix.Getpgrp() {
			its, err := unix.Getsid(pid)
			return err != nil || its != session
		}
	}
	return true // it is not in this PID namespace
}
