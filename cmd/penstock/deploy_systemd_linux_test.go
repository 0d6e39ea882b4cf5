package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A box is a running systemd: the first process of a place with processes, network, control groups and name of its own,
// and files that are this machine's until something writes to them.
type box struct {
	t    *testing.T
	pid  string // of its systemd, out here
	root string // its files
}

// boxOuter makes the control group, and takes everything away when its standard input ends.
const boxOuter = `
mount -t tmpfs tmpfs "$BOX"
mkdir "$BOX/cg" "$BOX/up" "$BOX/work" "$BOX/root"
mount -t cgroup2 cgroup2 "$BOX/cg"
mine=$BOX/cg/penstock-test-$$
mkdir "$mine"
(echo 0 >"$mine/cgroup.procs" && exec unshare --mount --propagation private --cgroup --pid --net --ipc --uts --fork --kill-child sh -euc "$BOX_INNER") </dev/null &
echo $!
read -r _ || true
kill -KILL $! || true
wait $! || true
for _ in $(seq 50); do
	find "$mine" -depth -type d -exec rmdir {} + 2>/dev/null || true
	[ -e "$mine" ] || break
	sleep 0.1
done`

// boxInner lays out the files and becomes systemd.
const boxInner = `
root=$BOX/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$BOX/up,workdir=$BOX/work" "$root"
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys" # the machine's knobs are not the box's
mount -o remount,bind,ro "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
mount -o remount,bind,rw "$root/proc/sys/net"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
cd "$root/dev"
mkdir shm pts mqueue hugepages net
for device in null zero full random urandom tty net/tun; do
	touch "$device"
	mount --bind "/dev/$device" "$device"
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts pts
mount -t tmpfs tmpfs shm
ln -s pts/ptmx ptmx
ln -s /proc/self/fd fd
rm -rf "$root"/etc/systemd/system/*.wants "$root/var/lib/penstock"
ip link set lo up
cd "$root"
mkdir -p before
pivot_root . before
umount -l /before
mount --make-rshared /
exec env -i container=penstock-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target --show-status=no`

// newBox skips the test where there can be none, unless PENSTOCK_REQUIRE_NETNS=1 says that this is a failure.
func newBox(t *testing.T) *box {
	t.Helper()
	required(t, "systemd-analyze", "unshare", "nsenter", "ip")
	refuse := t.Skipf
	if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
		refuse = t.Fatalf
	}
	if os.Getuid() != 0 {
		refuse("SKIPPED: a systemd of its own needs root")
	}
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		refuse("SKIPPED: %v", err)
	}
	dir := t.TempDir()
	outer := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-euc", boxOuter)
	outer.Env = append(os.Environ(), "BOX="+dir, "BOX_INNER="+boxInner)
	log, err := os.Create(filepath.Join(t.TempDir(), "log")) // a pipe would be held open by the box
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	outer.Stderr = log
	in, err := outer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := outer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := outer.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		late := time.AfterFunc(20*time.Second, func() { outer.Process.Kill() })
		defer late.Stop()
		outer.Wait()
	})
	b := &box{t: t}
	parent, _ := bufio.NewReader(out).ReadString('\n')
	parent = strings.TrimSpace(parent)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		children, _ := os.ReadFile(fmt.Sprintf("/proc/%s/task/%[1]s/children", parent))
		b.pid = strings.TrimSpace(string(children))
		if name, _ := os.ReadFile("/proc/" + b.pid + "/comm"); b.pid != "" && string(name) == "systemd\n" {
			b.root = "/proc/" + b.pid + "/root"
			if out, _ := b.run("systemctl", "is-system-running"); out == "running\n" || out == "degraded\n" {
				return b
			}
		}
		if time.Now().After(end) {
			words, _ := os.ReadFile(log.Name())
			refuse("SKIPPED: no systemd comes up here: %s", words)
		}
	}
}

// run runs a program in the box to its end.
func (b *box) run(args ...string) (string, error) {
	cmd := exec.CommandContext(b.t.Context(), "nsenter", append([]string{"-t", b.pid, "-a", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// sh runs a script that must go well.
func (b *box) sh(format string, args ...any) string {
	b.t.Helper()
	script := fmt.Sprintf(format, args...)
	out, err := b.run("sh", "-euc", script)
	if err != nil {
		journal, _ := b.run("journalctl", "--no-pager", "-n", "60")
		b.t.Fatalf("%s: %v\n%s\n%s", script, err, out, journal)
	}
	return strings.TrimSpace(out)
}

func (b *box) write(path, text string) {
	b.t.Helper()
	if err := os.WriteFile(b.root+path, []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// show is a property of a unit.
func (b *box) show(unit, property string) string {
	b.t.Helper()
	return b.sh("systemctl show --value -p %s %s", property, unit)
}

// await waits until a property is as it should be.
func (b *box) await(unit, property, want string) {
	b.t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		got := b.show(unit, property)
		if got == want {
			return
		}
		if time.Now().After(end) {
			b.t.Fatalf("%s of %s is %q, want %q\n%s", property, unit, got, want, b.sh("journalctl --no-pager -u %s", unit))
		}
	}
}

// kill sends a signal to the main process of a unit.
func (b *box) kill(unit string, s syscall.Signal) {
	b.t.Helper()
	b.sh("kill -%d %s", s, b.show(unit, "MainPID"))
}

// sub is t.Run for what fails with it.
func (b *box) sub(t *testing.T, name string, do func(t *testing.T)) {
	defer func() { b.t = t }()
	t.Run(name, func(t *testing.T) {
		b.t = t
		do(t)
	})
}

// TestSystemd: the units of docs/ do under a running systemd what docs/deploy.md says.
func TestSystemd(t *testing.T) {
	b := newBox(t)
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(b.root+"/usr/local/bin/penstock", self, 0o755)
	}
	for _, name := range []string{"penstock@.service", "penstock-serve@.service", "penstock-tun.conf"} {
		text, readErr := os.ReadFile("../../docs/" + name)
		if err == nil {
			err = readErr
		}
		if err == nil {
			err = os.WriteFile(b.root+"/etc/systemd/system/"+name, text, 0o644)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	b.sh("install -d -m 700 /etc/penstock")
	key := b.sh("penstock genkey")
	peer := b.sh("penstock genkey | penstock pubkey")
	node := "[node]\nprivate_key = \"" + key + "\"\naddress = [\"10.66.0.1/24\", \"fd66::1/64\"]\n%s" +
		"[[peer]]\nname = \"b\"\npublic_key = \"" + peer + "\"\nallowed_ips = [\"10.66.0.2/32\", \"fd66::2/128\"]\n"

	b.sub(t, "node", func(t *testing.T) {
		b.write("/etc/penstock/home.toml", fmt.Sprintf(node, "listen = \":5182\"\n"))
		const unit = "penstock@home"
		b.sh("systemctl daemon-reload; systemctl enable --now %s", unit)
		if got := b.show(unit, "StatusText"); got != "0 of 1 peers established" {
			t.Errorf("status %q", got)
		}
		pid := b.show(unit, "MainPID")
		if state := b.sh("cat /proc/%s/status", pid); strings.Contains(state, "\nUid:\t0") || !strings.Contains(state, "\nCapBnd:\t0000000000000000\n") {
			t.Errorf("not without privileges:\n%s", state)
		}
		if out := b.sh("penstock status"); !strings.Contains(out, "10.66.0.1") {
			t.Errorf("status:\n%s", out)
		}
		b.kill(unit, syscall.SIGKILL)
		b.await(unit, "NRestarts", "1")
		b.await(unit, "ActiveState", "active")
		// Who is stuck is not heard of, and does not end as a mistake in the configuration does.
		b.sh("mkdir -p /run/systemd/system/%s.service.d; printf '[Service]\\nWatchdogSec=2\\nRestartSec=0\\n' >/run/systemd/system/%[1]s.service.d/quick.conf", unit)
		b.sh("systemctl daemon-reload; systemctl restart %s", unit)
		b.kill(unit, syscall.SIGSTOP)
		b.await(unit, "NRestarts", "1")
		b.await(unit, "ActiveState", "active")
		b.sh("systemctl stop %s", unit)
		if got := b.show(unit, "Result"); got != "success" {
			t.Errorf("it ends with %s", got)
		}
		if left := b.sh("ls /run/penstock/home"); left != "" {
			t.Errorf("left behind: %s", left)
		}
	})
	b.sub(t, "mistake", func(t *testing.T) {
		b.write("/etc/penstock/wrong.toml", "[node]\n")
		const unit = "penstock@wrong"
		if _, err := b.run("systemctl", "start", unit); err == nil {
			t.Error("it starts")
		}
		if state, code, again := b.show(unit, "ActiveState"), b.show(unit, "ExecMainStatus"), b.show(unit, "NRestarts"); state != "failed" || code != "2" || again != "0" {
			t.Errorf("%s, exit code %s, %s restarts", state, code, again)
		}
		if said := b.sh("journalctl --no-pager -u %s", unit); !strings.Contains(said, "wrong.toml:1: node.private_key: is missing") {
			t.Errorf("the journal has\n%s", said)
		}
	})
	b.sub(t, "tun", func(t *testing.T) {
		b.write("/etc/penstock/tun.toml", fmt.Sprintf(node, "listen = \":5182\"\ndevice = \"tun\"\n"))
		const unit = "penstock@tun"
		b.sh("install -d /etc/systemd/system/%s.service.d; cp /etc/systemd/system/penstock-tun.conf /etc/systemd/system/%[1]s.service.d/tun.conf", unit)
		b.sh("systemctl daemon-reload; systemctl start %s", unit)
		has := func() string {
			return b.sh("ip addr show penstock0; ip route show table all; ip -6 route show table all")
		}
		for _, want := range []string{"10.66.0.1/24", "fd66::1/64", "10.66.0.2 dev penstock0", "fd66::2 dev penstock0"} {
			if got := has(); !strings.Contains(got, want) {
				t.Errorf("no %s in\n%s", want, got)
			}
		}
		if state := b.sh("cat /proc/%s/status", b.show(unit, "MainPID")); !strings.Contains(state, "\nCapBnd:\t0000000000001000\n") || strings.Contains(state, "\nUid:\t0") {
			t.Errorf("more than CAP_NET_ADMIN:\n%s", state)
		}
		b.kill(unit, syscall.SIGKILL)
		b.await(unit, "NRestarts", "1")
		b.await(unit, "ActiveState", "active")
		if got := has(); !strings.Contains(got, "10.66.0.1/24") {
			t.Errorf("after SIGKILL\n%s", got)
		}
		b.sh("systemctl stop %s", unit)
		if out, err := b.run("ip", "link", "show", "penstock0"); err == nil {
			t.Errorf("left behind: %s", out)
		}
	})
	b.sub(t, "server", func(t *testing.T) {
		b.write("/etc/penstock/corp.toml", "[server]\nlisten = \"[::]:443\"\naddress = [\"10.9.0.1/24\", \"fd09::1/64\"]\n"+
			"[auth]\nusers = \"/var/lib/penstock/corp/users\"\n[clients]\npool = [\"10.9.0.0/24\", \"fd09::/64\"]\n"+
			"[router]\nallow = \"192.0.2.0/24\"\n[store]\nengine = \"bbolt\"\n")
		const unit = "penstock-serve@corp"
		add := func(name string) {
			b.sh("echo secret of %s | penstock user add -c /etc/penstock/corp.toml --passwd-on-stdin %[1]s", name)
		}
		// Tried by hand first, as root.
		b.sh("timeout 2 penstock serve --quick --state /var/lib/penstock/tried || [ $? = 124 ]")
		b.sh("install -d -m 700 /var/lib/penstock/corp")
		add("alice")
		b.sh("systemctl enable --now %s", unit)
		if got := b.show(unit, "StatusText"); got != "0 clients connected, 0 sessions" {
			t.Errorf("status %q", got)
		}
		if state := b.sh("cat /proc/%s/status", b.show(unit, "MainPID")); !strings.Contains(state, "\nCapBnd:\t0000000000000400\n") || strings.Contains(state, "\nUid:\t0") {
			t.Errorf("more than CAP_NET_BIND_SERVICE:\n%s", state)
		}
		add("bob") // while it runs; the file stays the service's
		pin := b.sh("journalctl --no-pager -u %s | grep -o 'pin-sha256:[A-Za-z0-9+/=]*' | head -n 1", unit)
		signIn := func(user string) string {
			return b.sh("echo secret of %s | penstock connect https://127.0.0.1 -u %[1]s --passwd-on-stdin --servercert %s --cookieonly", user, pin)
		}
		cookies := []string{signIn("alice")}
		b.kill(unit, syscall.SIGKILL)
		b.await(unit, "NRestarts", "1")
		b.await(unit, "ActiveState", "active")
		cookies = append(cookies, signIn("bob"))
		list := b.sh("penstock sessions")
		if !strings.Contains(list, "alice") || !strings.Contains(list, "bob") {
			t.Errorf("cookies %q, sessions\n%s", cookies, list)
		}
		b.sh("systemctl stop %s", unit)
		if got := b.show(unit, "Result"); got != "success" {
			t.Errorf("it ends with %s", got)
		}
	})
}
