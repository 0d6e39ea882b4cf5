package sandbox

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Each switch that forbids namespaces is named, and the one that is set wins over guesses.
func TestWhyForbidden(t *testing.T) {
	for _, c := range []struct {
		err      error
		switches map[string]string
		want     string
	}{
		{unix.EPERM, map[string]string{"sys/kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone"},
		{unix.EPERM, map[string]string{"sys/kernel/unprivileged_userns_clone": "1"}, "something forbids"},
		{unix.EPERM, map[string]string{"sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, "apparmor_restrict_unprivileged_userns"},
		{unix.EACCES, map[string]string{"sys/kernel/apparmor_restrict_unprivileged_userns": "1"}, "apparmor_restrict_unprivileged_userns"},
		{unix.EPERM, map[string]string{"sys/kernel/apparmor_restrict_unprivileged_userns": "0"}, "something forbids"},
		{unix.EPERM, map[string]string{"self/status": "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1"}, "seccomp"},
		{unix.ENOSPC, map[string]string{"sys/user/max_user_namespaces": "0"}, "user.max_user_namespaces is 0"},
		{unix.ENOSPC, map[string]string{"sys/user/max_net_namespaces": "0"}, "user.max_net_namespaces is 0"},
		{unix.ENOSPC, map[string]string{"sys/user/max_user_namespaces": "100"}, "there are as many"},
		{unix.EINVAL, nil, "CONFIG_USER_NS"},
		{unix.EIO, nil, ""},
	} {
		got := whyForbidden(fmt.Errorf("fork/exec: %w", c.err), func(name string) string { return c.switches[name] })
		if !strings.Contains(got, c.want) || c.want == "" && got != "" {
			t.Errorf("%v, %v: %q, want %q", c.err, c.switches, got, c.want)
		}
	}
	for err, want := range map[error]string{unix.ENOENT: "modprobe tun", unix.EACCES: "chmod 666", unix.EIO: ""} {
		if got := whyNoTUN(err); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}

// A failure of the helper keeps its step, its text and the advice.
func TestFailureAsError(t *testing.T) {
	f := failed("opening the interface", fmt.Errorf("TUNSETIFF: %w", syscall.EPERM))
	got := f.asError()
	if s := got.Error(); !strings.HasPrefix(s, "opening the interface: TUNSETIFF: operation not permitted: ") || got.Code != ExitFailed {
		t.Errorf("%q, code %d", s, got.Code)
	}
	if s := failed("a step", fmt.Errorf("broken")).asError().Error(); s != "a step: broken" {
		t.Errorf("%q", s)
	}
}

func TestResolvText(t *testing.T) {
	c := &Config{Search: []string{"a.test", "b.test"}}
	for i := range 5 {
		c.Servers = append(c.Servers, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
	}
	want := "# by penstock run\nnameserver 10.0.0.0\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nsearch a.test b.test\n"
	if got := resolvText(c); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestOfFamilies(t *testing.T) {
	p := netip.MustParsePrefix
	routes := []netip.Prefix{p("0.0.0.0/0"), p("::/0")}
	if got := ofFamilies(routes, []netip.Prefix{p("10.0.0.1/32")}); fmt.Sprint(got) != "[0.0.0.0/0]" {
		t.Errorf("%v", got)
	}
	if got := ofFamilies(routes, []netip.Prefix{p("fd00::1/64"), p("10.0.0.1/32")}); len(got) != 2 {
		t.Errorf("%v", got)
	}
}
