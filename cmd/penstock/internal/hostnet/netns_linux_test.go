package hostnet

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A sandbox is a network namespace with an interface eth0 that leads to the world, and a mount
// namespace with /etc and /run of its own. The test's thread is in it, and what it starts.
type sandbox struct {
	t      *testing.T
	folder string // of journals
}

const resolvBefore = "# of the host\nnameserver 192.0.2.53\nsearch lan\noptions edns0\n"

// newSandbox skips the test where namespaces cannot be made, unless PENSTOCK_REQUIRE_NETNS=1 says that
// this is a failure.
func newSandbox(t *testing.T) *sandbox {
	t.Helper()
	runtime.LockOSThread() // for good: the thread dies with the test's goroutine
	err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	if err != nil && os.Getenv("PENSTOCK_REQUIRE_NETNS") != "1" {
		t.Skipf("SKIPPED: no namespaces can be made here: %v", err)
	}
	w := &sandbox{t: t, folder: "/run/penstock"}
	w.check(err)
	w.check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	keep := map[string]string{}
	for _, name := range []string{"/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf"} {
		b, _ := os.ReadFile(name)
		keep[name] = string(b)
	}
	for _, dir := range []string{"/etc", "/run"} {
		w.check(unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"))
	}
	w.check(os.Symlink("/proc/self/mounts", "/etc/mtab"))
	for name, text := range keep {
		w.check(os.WriteFile(name, []byte(text), 0o644))
	}
	w.check(os.WriteFile(resolvConfPath, []byte(resolvBefore), 0o644))

	w.ip("link set lo up")
	w.ip("link add eth0 type veth peer name world")
	for _, name := range []string{"eth0", "world"} {
		w.ip("link set " + name + " addrgenmode none")
	}
	w.ip("link set world up")
	w.ip("link set eth0 up")
	w.ip("addr add 192.168.1.10/24 dev eth0")
	w.ip("-6 addr add 2001:db8:1::10/64 dev eth0 nodad")
	w.ip("route add default via 192.168.1.1")
	w.ip("-6 route add default via 2001:db8:1::1")
	w.ip("route add 10.9.8.0/24 via 192.168.1.2") // inside what goes to a peer
	for end := time.Now().Add(5 * time.Second); !strings.Contains(w.ip("-6 route show table local"), "2001:db8:1::10"); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the IPv6 address never works")
		}
	}
	return w
}

func (w *sandbox) check(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// ip runs ip(8).
func (w *sandbox) ip(args string) string {
	w.t.Helper()
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// tun makes an interface that is there until the file is closed.
func openTUN(name string) (*os.File, error) {
	f, err := os.OpenFile(tunFile, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, ifr); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (w *sandbox) tun(name string) *os.File {
	w.t.Helper()
	f, err := openTUN(name)
	w.check(err)
	w.t.Cleanup(func() { f.Close() })
	return f
}

// everything is what hostnet may change, but for the interface itself.
func (w *sandbox) everything() string {
	w.t.Helper()
	var b strings.Builder
	for _, what := range []string{"-4 rule", "-6 rule", "-4 route show table all", "-6 route show table all"} {
		lines := strings.Split(w.ip(what), "\n")
		lines = slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, "dev ps") })
		fmt.Fprintf(&b, "%s:\n%s\n", what, strings.Join(lines, "\n"))
	}
	for _, path := range []string{"all/rp_filter", "eth0/rp_filter", "all/src_valid_mark"} {
		v, err := readSysctl("net/ipv4/conf/" + path)
		w.check(err)
		fmt.Fprintf(&b, "%s = %s\n", path, v)
	}
	var files []string
	for _, dir := range []string{"/etc", w.folder} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() == ".hostnet.lock" {
				continue
			}
			path := filepath.Join(dir, e.Name())
			st, err := os.Lstat(path)
			w.check(err)
			link, _ := os.Readlink(path)
			files = append(files, fmt.Sprintf("%s %v %s", path, st.Mode(), link))
		}
	}
	sort.Strings(files)
	text, _ := os.ReadFile(resolvConfPath)
	fmt.Fprintf(&b, "%s\n%s", strings.Join(files, "\n"), text)
	return b.String()
}

func (w *sandbox) same(before, when string) {
	w.t.Helper()
	if now := w.everything(); now != before {
		w.t.Errorf("%s the host is not as it was:\n%s\nbefore:\n%s", when, now, before)
	}
}

// wayTo is the interface for packets with a mark, as the kernel says.
func (w *sandbox) wayTo(to string, mark uint32) string {
	w.t.Helper()
	a := netip.MustParseAddr(to)
	routes, err := netlink.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{Mark: mark})
	if err != nil {
		return err.Error()
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	w.check(err)
	return link.Attrs().Name
}

func (w *sandbox) ways(mark uint32, want map[string]string) {
	w.t.Helper()
	for to, name := range want {
		if got := w.wayTo(to, mark); got != name {
			w.t.Errorf("with mark %d, %s is by %s, want %s", mark, to, got, name)
		}
	}
}

func (w *sandbox) config() Config {
	return Config{
		Interface: "ps0", Owner: "/etc/penstock/a.toml", Folder: w.folder,
		Addresses: prefixes("10.66.0.1/24", "fd66::1/64"), MTU: 1380,
		Routes: prefixes("10.66.0.2/32", "fd66::2/128", "0.0.0.0/0", "::/0", "10.9.0.0/16"),
		FwMark: DefaultFwMark,
		DNS:    DNS{Servers: []netip.AddrPort{netip.MustParseAddrPort("10.66.0.2:53")}, Search: []string{"corp.example"}},
	}
}

func (w *sandbox) apply(c Config) *State {
	w.t.Helper()
	w.check(os.MkdirAll(w.folder, 0o755))
	s, err := Apply(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { s.Close() })
	return s
}

func (w *sandbox) resolvConf() string {
	w.t.Helper()
	b, err := os.ReadFile(resolvConfPath)
	w.check(err)
	return string(b)
}
