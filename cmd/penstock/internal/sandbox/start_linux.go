package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Sandbox is a namespace with a program in it, or one to be. Its methods may be called from any
// goroutine.
type Sandbox struct {
	cmd     *exec.Cmd
	control *net.UnixConn
	notes   []string

	mu  sync.Mutex // guards enc and tun
	enc *json.Encoder
	tun int // -1 once taken

	done chan struct{} // closed when the helper is gone
	code int           // of the program, valid after done
	err  error         // valid after done
}

// Start makes the namespace and the interface, and with them everything but the program, which
// waits for Go. Errors are *[Error]s.
//
// The process becomes a reaper of orphans (PR_SET_CHILD_SUBREAPER): should the helper be killed, its
// processes are ended from here.
func Start(c Config) (*Sandbox, error) {
	path, err := exec.LookPath(c.Program)
	if err != nil {
		var e *exec.Error
		if errors.As(err, &e) {
			err = e.Err
		}
		if errors.Is(err, exec.ErrNotFound) {
			return nil, &Error{ExitNotFound, fmt.Errorf("%s: not found in PATH", c.Program)}
		}
		return nil, notRunnable(c.Program, err)
	}
	if err := checkTUN(); err != nil {
		return nil, err
	}
	s := &Sandbox{tun: -1, done: make(chan struct{})}
	if err := s.launch(c, path); err != nil {
		return nil, err
	}
	return s, nil
}

// launch starts the helper and waits until it is ready.
func (s *Sandbox) launch(c Config, path string) *Error {
	control, theirControl, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return failf("%w", err)
	}
	handover, theirHandover, err := socketPair(unix.SOCK_DGRAM)
	if err != nil {
		control.Close()
		theirControl.Close()
		return failf("%w", err)
	}
	defer handover.Close()
	files := []*os.File{theirControl, theirHandover}
	listeners, failed := listen(c.Publish)
	files = append(files, listeners...)
	userNS := !privileged()
	if failed == nil {
		if s.cmd, err = startHelper(files, userNS); err != nil {
			failed = forbidden("making the namespaces", err)
		}
	}
	for _, f := range files {
		f.Close()
	}
	if failed != nil {
		control.Close()
		return failed
	}
	s.control, s.enc = control, json.NewEncoder(control)
	s.order(order{Setup: &setup{Config: c, Path: path, UserNS: userNS}})
	dec := json.NewDecoder(control)
	var r report
	if err := dec.Decode(&r); err != nil {
		s.abort()
		return failf("the helper has ended before it was ready (%v)", s.cmd.ProcessState)
	}
	if r.Failed != nil {
		s.abort()
		return r.Failed.asError()
	}
	if s.tun, err = receiveFile(handover); err != nil || r.Ready == nil {
		s.abort()
		return failf("the interface did not arrive: %v", err)
	}
	s.notes = r.Ready.Notes
	go s.follow(dec)
	return nil
}

// startHelper starts this executable again in new namespaces.
func startHelper(files []*os.File, userNS bool) (*exec.Cmd, error) {
	// A program with file capabilities is not dumpable, and then its own files in /proc are not
	// its own. The error is for a value that does not exist.
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, os.NewSyscallError("prctl", err)
	}
	self, done, err := executable()
	if err != nil {
		return nil, err
	}
	defer done()
	cmd := &exec.Cmd{
		Path: self, Args: []string{os.Args[0], HelperVerb},
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: files,
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS},
	}
	if userNS {
		a := cmd.SysProcAttr
		a.Cloneflags |= unix.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		a.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		if os.Getuid() != 0 { // root gets them anyway
			a.AmbientCaps = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN, unix.CAP_NET_RAW}
		}
	}
	return cmd, cmd.Start()
}

// executable is where a child finds this program's file, or a copy in memory if it has file
// capabilities: those would take the place of the ones that the helper is given.
func executable() (path string, done func(), err error) {
	const exe = "/proc/self/exe"
	if n, err := unix.Getxattr(exe, "security.capability", nil); err != nil || n <= 0 {
		return exe, func() {}, nil
	}
	self, err := os.Open(exe)
	if err != nil {
		return "", nil, err
	}
	defer self.Close()
	fd, err := unix.MemfdCreate("penstock", unix.MFD_CLOEXEC)
	if err != nil {
		return "", nil, os.NewSyscallError("memfd_create", err)
	}
	copied := os.NewFile(uintptr(fd), "penstock")
	defer copied.Close()
	if _, err := io.Copy(copied, self); err != nil {
		return "", nil, err
	}
	// Above the numbers that the child's files are given before it looks.
	high, err := unix.FcntlInt(copied.Fd(), unix.F_DUPFD_CLOEXEC, 500)
	if err != nil {
		return "", nil, os.NewSyscallError("fcntl", err)
	}
	return fmt.Sprintf("/proc/self/fd/%d", high), func() { unix.Close(high) }, nil
}

// privileged tells whether the namespaces can be made without a user namespace, by a helper that has the capabilities for it
// of its own: those of root and ambient ones, but not the file's, which end with exec here.
func privileged() bool {
	return hasCapability(unix.CAP_SYS_ADMIN) && hasCapability(unix.CAP_NET_ADMIN)
}

func hasCapability(c int) bool {
	if os.Geteuid() != 0 {
		set, err := unix.PrctlRetInt(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_IS_SET, uintptr(c), 0, 0)
		return err == nil && set == 1
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[c/32].Effective&(1<<(c%32)) != 0
}

// follow waits for the end of the program and of the helper.
func (s *Sandbox) follow(dec *json.Decoder) {
	defer close(s.done)
	ended := false
	for {
		var r report
		if err := dec.Decode(&r); err != nil {
			break // the helper has ended
		}
		switch {
		case r.Exit != nil:
			s.code, ended = *r.Exit, true
		case r.Failed != nil:
			s.err, ended = r.Failed.asError(), true
		}
	}
	s.control.Close()
	s.cmd.Wait()
	killDescendants() // if it was killed
	if !ended {
		s.err = failf("the helper has ended (%v) and the program with it", s.cmd.ProcessState)
	}
}

// abort ends a helper that is not followed yet.
func (s *Sandbox) abort() {
	s.control.Close()
	late := time.AfterFunc(killTime, func() { s.cmd.Process.Kill() })
	defer late.Stop()
	s.cmd.Wait()
	if fd := s.TakeTUN(); fd >= 0 {
		unix.Close(fd)
	}
}

func (s *Sandbox) order(o order) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A helper that is gone is noticed by follow.
	_ = s.enc.Encode(o)
}

// TakeTUN is the open file of the interface, with IFF_NO_PI and IFF_VNET_HDR. The caller takes it;
// a second call returns -1.
func (s *Sandbox) TakeTUN() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd := s.tun
	s.tun = -1
	return fd
}

// Notes are what could not be had, for the user to know.
func (s *Sandbox) Notes() []string { return s.notes }

// Go starts the program.
func (s *Sandbox) Go() { s.order(order{Start: true}) }

// Signal sends a signal to the program. One that was sent to the whole job, as a terminal does, is not sent again to
// a program that has had it.
func (s *Sandbox) Signal(sig syscall.Signal) { s.order(order{Signal: int(sig)}) }

// SetMTU sets the interface's MTU in bytes.
func (s *Sandbox) SetMTU(mtu int) { s.order(order{MTU: mtu}) }

// Wait waits for the program, and until nothing is left of it. The code is the program's, or 128
// and the number of the signal that it has died of. An error, an *[Error], means that there is none.
func (s *Sandbox) Wait() (code int, err error) {
	<-s.done
	return s.code, s.err
}

// Done is closed when Wait does not wait any more.
func (s *Sandbox) Done() <-chan struct{} { return s.done }

// Close kills what is left of the program and waits for that.
func (s *Sandbox) Close() error {
	s.control.CloseWrite() // the helper sees the end
	<-s.done
	if fd := s.TakeTUN(); fd >= 0 {
		unix.Close(fd)
	}
	return nil
}
