package sandbox

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// graceTime is what processes that the program has left behind get to end by themselves after
	// SIGTERM.
	graceTime = 500 * time.Millisecond
	// killTime bounds how long a process may take to die: one that waits for a disk or a server in the
	// kernel does not.
	killTime = 5 * time.Second
)

// endDescendants asks the children of this process, orphans among them, to end, and kills what is left.
func endDescendants() {
	signalChildren(unix.SIGTERM)
	if reapAll(graceTime) {
		return
	}
	killDescendants()
}

// killDescendants kills every descendant of this reaper: with each child that dies its own children
// become this process's.
func killDescendants() {
	for end := time.Now().Add(killTime); time.Now().Before(end); {
		signalChildren(unix.SIGKILL)
		if reapAll(10 * time.Millisecond) {
			return
		}
	}
}

// reapAll waits until there is no child left, and tells whether it is so.
func reapAll(limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		switch {
		case err == unix.ECHILD:
			return true
		case pid > 0 || err == unix.EINTR:
		case time.Now().After(end):
			return false
		default:
			time.Sleep(time.Millisecond)
		}
	}
}

// signalChildren sends sig to the children of this process.
func signalChildren(sig unix.Signal) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	self := os.Getpid()
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if parentOf(pid) == self {
			unix.Kill(pid, sig)
			unix.Kill(pid, unix.SIGCONT) // one that is stopped would not see it
		}
	}
}

// parentOf reads the fourth field of proc_pid_stat(5). The second, the name, may contain anything.
func parentOf(pid int) int {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return -1
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 2 {
		return -1
	}
	ppid, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return -1
	}
	return ppid
}
