package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// A helper is the process between the Sandbox and the program, inside the namespace.
type helper struct {
	dec     *json.Decoder
	setup   *setup
	link    *link
	signals *signals

	mu  sync.Mutex // guards enc
	enc *json.Encoder
}

// Helper is the helper's main. It returns the process's exit code, which means nothing.
func Helper() int {
	control, err := unixConn(fdControl)
	if err != nil {
		fmt.Fprintf(os.Stderr, "penstock: error: %s is not for the command line\n", HelperVerb)
		return ExitFailed
	}
	unix.CloseOnExec(fdHandover)
	h := &helper{dec: json.NewDecoder(control), enc: json.NewEncoder(control), signals: newSignals()}
	if f := h.prepare(); f != nil {
		h.report(report{Failed: f})
		return ExitFailed
	}
	var o order
	for !o.Start {
		o = order{}
		if h.dec.Decode(&o) != nil {
			return ExitFailed
		}
		h.setMTU(o.MTU)
	}
	pid, f := h.start()
	if f != nil {
		h.report(report{Failed: f})
		return ExitFailed
	}
	h.signals.begin()
	go h.obey(pid)
	code := h.reap(pid)
	endDescendants()
	h.report(report{Exit: &code})
	return exitFine
}

const exitFine = 0

func (h *helper) report(r report) {
	h.mu.Lock()
	defer h.mu.Unlock()
	_ = h.enc.Encode(r) // a parent that is gone is noticed by obey
}

// prepare makes the namespace what the program is to find and hands the interface over.
func (h *helper) prepare() *failure {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return failed("becoming the reaper", os.NewSyscallError("prctl", err))
	}
	var o order
	if err := h.dec.Decode(&o); err != nil || o.Setup == nil {
		return failed("reading the setup", errors.Join(err, errors.New("no setup")))
	}
	h.setup = o.Setup
	var ready ready
	note := func(what string, err error) {
		if err != nil {
			ready.Notes = append(ready.Notes, what+": "+err.Error())
		}
	}
	var f *failure
	var tun int
	if h.link, tun, f = makeLink(&h.setup.Config); f != nil {
		return f
	}
	note("ping works for programs with CAP_NET_RAW only", h.allowPing())
	note("ports below 1024 cannot be listened on", sysctl("net/ipv4/ip_unprivileged_port_start", "0"))
	if f := isolateMounts(); f != nil {
		return f
	}
	note("names are resolved as on the host", resolve(&h.setup.Config))
	h.publish()
	handover, err := unixConn(fdHandover)
	if err != nil {
		return failed("handing the interface over", err)
	}
	defer handover.Close()
	h.report(report{Ready: &ready})
	if err := sendFile(handover, tun); err != nil {
		return failed("handing the interface over", err)
	}
	if err := unix.Close(tun); err != nil {
		return failed("handing the interface over", err)
	}
	return nil
}

// allowPing lets the program's group ask for echoes without privileges (ICMP sockets).
func (h *helper) allowPing() error {
	groups := "0 2147483647"
	if h.setup.UserNS {
		groups = fmt.Sprintf("%d %d", os.Getgid(), os.Getgid()) // no other group exists there
	}
	return sysctl("net/ipv4/ping_group_range", groups)
}

func sysctl(name, value string) error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) }

// start starts the program without the privileges that making the namespace took. It keeps a
// thread of its own: the program dies with it (PR_SET_PDEATHSIG), so with the helper.
func (h *helper) start() (pid int, f *failure) {
	started := make(chan struct{})
	go func() {
		runtime.LockOSThread() // and never unlocked
		pid, f = h.startHere()
		close(started)
		select {}
	}()
	<-started
	return pid, f
}

func (h *helper) startHere() (int, *failure) {
	if h.setup.UserNS {
		if err := dropPrivileges(); err != nil {
			return 0, failed("dropping privileges", err)
		}
	}
	p, err := os.StartProcess(h.setup.Path, append([]string{h.setup.Program}, h.setup.Args...), &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL},
	})
	if err != nil {
		e := notRunnable(h.setup.Program, err)
		return 0, &failure{Text: e.Error(), Code: e.Code}
	}
	defer p.Release()
	return p.Pid, nil
}

// dropPrivileges takes from what this thread executes the capabilities that the helper has in its user
// namespace. Programs with file capabilities, such as some pings, still get theirs.
func dropPrivileges() error {
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	return os.NewSyscallError("capset", unix.Capset(&header, &data[0]))
}

// obey carries out orders until the parent is gone, and ends everything then.
func (h *helper) obey(pid int) {
	for {
		var o order
		if err := h.dec.Decode(&o); err != nil {
			killDescendants()
			os.Exit(ExitFailed)
		}
		if o.Signal != 0 {
			h.signals.forward(pid, syscall.Signal(o.Signal))
		}
		h.setMTU(o.MTU)
	}
}

func (h *helper) setMTU(mtu int) {
	if mtu > 0 {
		// If the kernel does not want it, packets that do not fit are answered with "too big".
		_ = h.link.setMTU(mtu)
	}
}

// reap waits for the program, and for whatever orphans end meanwhile.
func (h *helper) reap(program int) (code int) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return ExitFailed // cannot be: there is a child
		case pid != program:
		case ws.Signaled():
			return ExitSignal + int(ws.Signal())
		case ws.Exited():
			return ws.ExitStatus()
		}
	}
}
