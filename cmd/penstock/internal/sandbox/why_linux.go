package sandbox

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const devTUN = "/dev/net/tun"

// checkTUN finds out early what would fail late.
func checkTUN() error {
	fd, err := unix.Open(devTUN, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
		return nil
	}
	if why := whyNoTUN(err); why != "" {
		return failf("%s: %w: %s", devTUN, err, why)
	}
	return failf("%s: %w", devTUN, err)
}

func whyNoTUN(err error) string {
	switch err {
	case unix.ENOENT, unix.ENODEV, unix.ENXIO:
		return "the kernel's tun module is not loaded (modprobe tun), or a container is without the device (--device " + devTUN + ")"
	case unix.EACCES, unix.EPERM:
		return "everyone has to be allowed to read and write it (chmod 666), and a container needs --device " + devTUN
	}
	return ""
}

// failed makes a failure of the helper.
func failed(step string, err error) *failure {
	f := &failure{Step: step, Text: err.Error(), Code: ExitFailed}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		f.Errno = int(errno)
	}
	return f
}

// asError is what the user is told of f.
func (f *failure) asError() *Error {
	if f.Step == "" {
		return &Error{Code: f.Code, Err: errors.New(f.Text)}
	}
	errno := syscall.Errno(f.Errno)
	if f.Errno != 0 && (errno == unix.EPERM || errno == unix.EACCES) {
		return forbidden(f.Step, fmt.Errorf("%s%w", strings.TrimSuffix(f.Text, errno.Error()), errno))
	}
	return &Error{Code: f.Code, Err: fmt.Errorf("%s: %s", f.Step, f.Text)}
}

// forbidden explains why something with namespaces did not work, by the switches that forbid it.
func forbidden(step string, err error) *Error {
	if why := whyForbidden(err, readSwitch); why != "" {
		return failf("%s: %w: %s", step, err, why)
	}
	return failf("%s: %w", step, err)
}

// readSwitch is the text of a file below /proc; "" if there is none.
func readSwitch(name string) string {
	b, _ := os.ReadFile("/proc/" + name)
	return strings.TrimSpace(string(b))
}

// whyForbidden names the switch that has to be set.
func whyForbidden(err error, read func(string) string) string {
	for _, kind := range []string{"user", "net", "mnt"} {
		if read("sys/user/max_"+kind+"_namespaces") == "0" {
			return fmt.Sprintf("no such namespaces are allowed: sysctl user.max_%s_namespaces is 0", kind)
		}
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return "there are as many namespaces as sysctl user.max_user_namespaces, user.max_net_namespaces and user.max_mnt_namespaces allow"
	case errors.Is(err, unix.EINVAL):
		return "the kernel is built without user namespaces (CONFIG_USER_NS)"
	case !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES):
		return ""
	}
	if read("sys/kernel/unprivileged_userns_clone") == "0" {
		return "ordinary users may not make user namespaces: sysctl kernel.unprivileged_userns_clone=1 lets them"
	}
	if v := read("sys/kernel/apparmor_restrict_unprivileged_userns"); v != "" && v != "0" {
		return "AppArmor allows user namespaces only to programs whose profile says so: give penstock a profile with \"userns,\", or set sysctl kernel.apparmor_restrict_unprivileged_userns=0"
	}
	if strings.Contains(read("self/status"), "\nSeccomp:\t2") {
		return "a seccomp filter, as containers have one, forbids new namespaces: --security-opt seccomp=unconfined, or a profile that allows clone and mount"
	}
	return "something forbids user namespaces here: a chroot, SELinux or another security module"
}
