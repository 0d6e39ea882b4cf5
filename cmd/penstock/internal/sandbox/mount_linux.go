package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const resolvConf = "/etc/resolv.conf"

// hostResolvers are where the C library reaches resolvers of the host by sockets, which no network
// namespace holds back: systemd-resolved's and the name service cache's.
var hostResolvers = []string{"/run/systemd/resolve", "/run/nscd", "/var/run/nscd"}

// isolateMounts keeps the mounts to come from the host.
func isolateMounts() *failure {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return failed("separating the mounts", os.NewSyscallError("mount", err))
	}
	return nil
}

// resolve makes the namespace's programs ask the servers of c, if it has any.
func resolve(c *Config) error {
	if len(c.Servers) == 0 {
		return nil
	}
	target, err := filepath.EvalSymlinks(resolvConf)
	if errors.Is(err, os.ErrNotExist) {
		if target, err = os.Readlink(resolvConf); err == nil && !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(resolvConf), target)
		}
	}
	if err != nil {
		return fmt.Errorf("%s cannot be replaced: %w", resolvConf, err)
	}
	text := resolvText(c)
	written := false
	for _, dir := range hostResolvers {
		if real, err := filepath.EvalSymlinks(dir); err != nil || real != dir {
			continue // not there, or the same as another
		}
		if err := unix.Mount("penstock", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=64k,mode=755"); err != nil {
			return fmt.Errorf("%s cannot be hidden: %w", dir, os.NewSyscallError("mount", err))
		}
		if filepath.Dir(target) == dir {
			if err := os.WriteFile(target, []byte(text), 0o644); err != nil {
				return err
			}
			written = true
		}
	}
	if written {
		return nil
	}
	f, err := os.CreateTemp("", "penstock-resolv-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // what is mounted stays
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := unix.Mount(f.Name(), target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("%s cannot be replaced: %w", resolvConf, os.NewSyscallError("mount", err))
	}
	return nil
}

// maxServers is how many of resolv.conf the C library asks (MAXNS).
const maxServers = 3

// resolvText is the text of resolv.conf(5).
func resolvText(c *Config) string {
	var b strings.Builder
	b.WriteString("# by penstock run\n")
	for _, s := range c.Servers[:min(len(c.Servers), maxServers)] {
		fmt.Fprintf(&b, "nameserver %v\n", s)
	}
	if len(c.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Search, " "))
	}
	return b.String()
}
