package hostnet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	resolvConfPath = "/etc/resolv.conf"
	// resolvedFolder has the files that systemd-resolved(8) writes.
	resolvedFolder = "/run/systemd/resolve"
)

// helperTimeout bounds one call of resolvectl or resolvconf. The latter waits up to 10 s for
// its lock.
var helperTimeout = 15 * time.Second

// dns tells the host's resolver: systemd-resolved or resolvconf if /etc/resolv.conf is theirs, else
// by that file.
func (s *State) dns(d *DNS, log *slog.Logger) error {
	if d.empty() {
		return nil
	}
	if ctl := resolvectl(); ctl != "" {
		servers, domains, notes := d.link()
		warn(log, notes)
		if len(servers) == 0 && len(domains) == 0 {
			return nil
		}
		return s.resolved(ctl, servers, domains)
	}
	servers, search, notes := d.file()
	warn(log, notes)
	if len(servers) == 0 && len(search) == 0 {
		return nil
	}
	if program, record := resolvconf(s.host.name); program != "" {
		call := &resolvconfCall{Program: program, Record: record}
		return s.take(step{Resolvconf: call}, func() error { return call.add(servers, search) })
	}
	return s.resolvFile(servers, search)
}

func warn(log *slog.Logger, notes []string) {
	for _, n := range notes {
		log.Warn("dns", "not_possible", n)
	}
}

// helper runs a program of the system. Its standard error is in the error.
func helper(stdin string, program string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.WaitDelay = time.Second
	// A signal of the terminal is for the node, which then wants this to go on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stderr, &stderr
	err := cmd.Run()
	if ctx.Err() != nil {
		err = fmt.Errorf("no answer in %v", helperTimeout)
	}
	if err != nil {
		text := strings.Join(strings.Fields(stderr.String()), " ")
		return fmt.Errorf("%s: %w: %.300s", strings.Join(append([]string{filepath.Base(program)}, args...), " "), err, text)
	}
	return nil
}

// find finds a program in $PATH or where those of the administrator are.
func find(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// resolvectl is the path of that program if systemd-resolved is what /etc/resolv.conf names: by a
// link into its folder, or by the address of its stub.
func resolvectl() string {
	ctl := find("resolvectl")
	if ctl == "" {
		return ""
	}
	target, err := filepath.EvalSymlinks(resolvConfPath)
	ours := err == nil && (filepath.Dir(target) == resolvedFolder || target == "/usr/lib/systemd/resolv.conf" || target == "/lib/systemd/resolv.conf")
	if b, err := os.ReadFile(resolvConfPath); err == nil && !ours {
		servers := nameservers(string(b))
		ours = len(servers) > 0
		for _, a := range servers {
			ip := a.Addr().String()
			ours = ours && (ip == "127.0.0.53" || ip == "127.0.0.54")
		}
	}
	if !ours {
		return ""
	}
	return ctl
}

func (s *State) resolved(ctl string, servers, domains []string) error {
	return s.take(step{Resolved: ctl}, func() error {
		if err := helper("", ctl, slices.Concat([]string{"dns", s.host.name}, servers)...); err != nil {
			return err
		}
		if len(domains) == 0 {
			return nil
		}
		return helper("", ctl, slices.Concat([]string{"domain", s.host.name}, domains)...)
	})
}

// revertResolved makes systemd-resolved forget what it was told about the interface. It does so by
// itself when the interface is gone.
func (h *host) revertResolved(ctl string) error {
	if h.link() == nil {
		return nil
	}
	return helper("", ctl, "revert", h.name)
}

// resolvconfCall is a record in the hands of resolvconf(8), openresolv's or Debian's.
type resolvconfCall struct {
	Program string `json:"program"`
	Record  string `json:"record"`
}

// resolvconf is the program and the name of the record for an interface; "" if resolv.conf is not
// its business. The one that is resolvectl by another name is not meant: resolv.conf is not
// systemd-resolved's, or we would not ask.
func resolvconf(name string) (program, record string) {
	program = find("resolvconf")
	if program == "" {
		return "", ""
	}
	ctx, cancel := context.WithTimeout(context.Background(), helperTimeout)
	defer cancel()
	version, err := exec.CommandContext(ctx, program, "--version").Output()
	switch {
	case err != nil:
		return "", ""
	case bytes.Contains(version, []byte("openresolv")):
		return program, name
	case bytes.Contains(version, []byte("Debian resolvconf")):
		// It writes a file of its own, to which /etc/resolv.conf is a link where it is used.
		target, err := os.Readlink(resolvConfPath)
		if err != nil || !strings.Contains(target, "resolvconf/") {
			return "", ""
		}
		return program, "tun." + name // sorts before all but loopback, whatever the name (interface-order(5))
	}
	return "", ""
}

func (c *resolvconfCall) add(servers, search []string) error {
	var b strings.Builder
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(search) > 0 {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	args := []string{"-a", c.Record}
	if len(servers) > 0 {
		// openresolv: first of all, and no other's servers. Debian's takes no notice.
		args = append(args, "-m", "0", "-x")
	}
	return helper(b.String(), c.Program, args...)
}

func (c *resolvconfCall) undo(*host) error {
	if _, err := os.Stat(c.Program); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := helper("", c.Program, "-d", c.Record, "-f") // -f, openresolv: no error if there is no such record
	if err != nil {
		err = errors.Join(err, errors.New("the resolver may ask the servers of the VPN still"))
	}
	return err
}
