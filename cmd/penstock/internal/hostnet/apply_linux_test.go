package hostnet

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestFullTunnel: where every packet goes, by the kernel's own word, and that Close takes all back.
func TestFullTunnel(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	before := w.everything()
	w.tun("ps0")
	c := w.config()
	c.Exclude = prefixes("203.0.113.0/24", "2001:db8:77::/48")
	s := w.apply(c)
	w.ways(0, map[string]string{
		"8.8.8.8": "ps0", "10.66.0.2": "ps0", "10.66.0.77": "ps0", "10.9.1.1": "ps0", "10.10.0.1": "ps0",
		"10.9.8.1": "eth0", "192.168.1.77": "eth0", "203.0.113.9": "eth0", "10.66.0.1": "lo",
		"2001:db8:2::1": "ps0", "fd66::2": "ps0", "fd66::77": "ps0", "2001:db8:1::77": "eth0", "2001:db8:77::1": "eth0",
	})
	w.ways(DefaultFwMark, map[string]string{
		"8.8.8.8": "eth0", "10.66.0.2": "eth0", "10.9.1.1": "eth0", "10.9.8.1": "eth0", "192.168.1.77": "eth0",
		"2001:db8:2::1": "eth0", "fd66::2": "eth0", "2001:db8:1::77": "eth0",
	})
	if got := w.ip("-4 -o addr show dev ps0"); !strings.Contains(got, "10.66.0.1/24") {
		t.Errorf("address: %s", got)
	}
	if got := w.ip("-6 -o addr show dev ps0"); !strings.Contains(got, "fd66::1/64") || strings.Contains(got, "fe80") || strings.Contains(got, "tentative") {
		t.Errorf("address: %s", got)
	}
	if got := w.ip("link show dev ps0"); !strings.Contains(got, "mtu 1380") || !strings.Contains(got, "UP") {
		t.Errorf("interface: %s", got)
	}
	if got, want := w.ip("-4 rule show not fwmark 5182"), 3; strings.Count(got, "\n") < want {
		t.Errorf("rules: %s", got)
	}
	w.check(s.SetMTU(1300))
	if got := w.ip("link show dev ps0"); !strings.Contains(got, "mtu 1300") {
		t.Errorf("interface: %s", got)
	}
	if got := w.resolvConf(); !strings.Contains(got, "\nnameserver 10.66.0.2\nsearch corp.example\noptions edns0\n") || strings.Contains(got, "192.0.2.53") {
		t.Errorf("resolv.conf: %s", got)
	}
	w.check(s.Close())
	w.same(before, "after Close")
	w.check(s.Close())
	if err := s.SetMTU(1400); !errors.Is(err, os.ErrClosed) {
		t.Errorf("SetMTU after Close: %v", err)
	}
}

// TestEndpointWithinRoutes: without a full tunnel the tunnel's packets stay out of it too.
func TestEndpointWithinRoutes(t *testing.T) {
	w := newSandbox(t)
	w.tun("ps0")
	c := w.config()
	c.Routes = prefixes("198.51.100.0/24", "2001:db8:5::/48", "192.168.1.0/24")
	w.apply(c)
	w.ways(0, map[string]string{"198.51.100.7": "ps0", "2001:db8:5::7": "ps0", "8.8.8.8": "eth0", "192.168.1.7": "ps0", "2001:db8:6::1": "eth0"})
	w.ways(DefaultFwMark, map[string]string{"198.51.100.7": "eth0", "2001:db8:5::7": "eth0", "192.168.1.7": "eth0"})
}

// TestSeveralNodes: their routes mix by length, and none is sent through another.
func TestSeveralNodes(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	before := w.everything()
	w.tun("ps0")
	w.tun("ps1")
	full := w.config()
	full.DNS = DNS{}
	one := w.apply(full)
	part := full
	part.Interface, part.Addresses, part.Routes = "ps1", prefixes("10.77.0.1/24"), prefixes("10.9.8.0/23", "10.66.0.2/31")
	two := w.apply(part)
	if one.Table() == two.Table() {
		t.Fatalf("both have table %d", one.Table())
	}
	want := map[string]string{"8.8.8.8": "ps0", "10.9.7.1": "ps0", "10.9.8.1": "eth0", "10.9.9.1": "ps1", "10.66.0.2": "ps0", "10.66.0.3": "ps1", "10.77.0.9": "ps1"}
	w.ways(0, want)
	w.ways(DefaultFwMark, map[string]string{"8.8.8.8": "eth0", "10.9.9.1": "eth0", "10.66.0.3": "eth0"})
	if _, err := Apply(part); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "a.toml") {
		t.Errorf("a second time for one interface: %v", err)
	}
	if did, err := Recover(w.folder, nil); err != nil || len(did) > 0 {
		t.Errorf("Recover took back from the living: %+v, %v", did, err)
	}
	w.ways(0, want)
	w.check(one.Close())
	w.ways(0, map[string]string{"8.8.8.8": "eth0", "10.9.9.1": "ps1", "10.66.0.2": "ps1"})
	w.check(two.Close())
	w.same(before, "after Close")
}

func TestOtherTables(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	before := w.everything()
	w.tun("ps0")
	c := w.config()
	c.Routes = prefixes("10.9.0.0/16", "fd99::/16")
	c.Table, c.FwMark = tableMain, 0
	s := w.apply(c)
	w.ways(0, map[string]string{"10.9.1.1": "ps0", "10.9.8.1": "eth0", "fd99::1": "ps0", "8.8.8.8": "eth0"})
	w.check(s.Close())
	w.same(before, "after Close, main")

	c.Routes = prefixes("10.9.8.0/24") // which somebody else has routed
	if _, err := Apply(c); !errors.Is(err, syscall.EEXIST) || !strings.Contains(err.Error(), "route 10.9.8.0/24 table 254") {
		t.Errorf("a route that is there: %v", err)
	}
	w.same(before, "after a route that is there")

	c.Table = 777
	s = w.apply(c)
	if got := w.ip("route show table 777"); !strings.Contains(got, "10.9.8.0/24 dev ps0") || !strings.Contains(got, "10.66.0.0/24 dev ps0") {
		t.Errorf("table 777: %s", got)
	}
	w.ways(0, map[string]string{"10.9.8.1": "eth0"})
	w.check(s.Close())
	w.same(before, "after Close, 777")

	c.Table = TableNone
	s = w.apply(c)
	w.ways(0, map[string]string{"10.66.0.2": "ps0", "10.9.1.1": "eth0"}) // the kernel's own, of the address
	w.check(s.Close())
	w.same(before, "after Close, none")
}

// TestReversePath: strict filtering is made loose as long as it would drop what peers send.
func TestReversePath(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	w.tun("ps0")
	const all = "net/ipv4/conf/all/rp_filter"
	for _, tt := range []struct {
		all, eth0 string
		routes    []netip.Prefix
		endpoint  string
		want      string
	}{
		{"1", "0", prefixes("0.0.0.0/0"), "198.51.100.9", "2"},
		{"0", "1", prefixes("0.0.0.0/0"), "", "2"},
		{"0", "0", prefixes("0.0.0.0/0"), "", "0"},
		{"2", "1", prefixes("0.0.0.0/0"), "", "2"},
		{"1", "1", prefixes("198.51.100.0/24"), "198.51.100.9", "2"},
		{"1", "1", prefixes("198.51.100.0/24"), "203.0.113.9", "1"},
		{"1", "1", prefixes("198.51.100.0/24"), "a name", "2"},
		{"1", "1", prefixes("10.0.0.0/8", "172.20.1.0/24", "192.168.0.0/16", "100.64.0.0/10", "::/0"), "a name", "1"},
		{"1", "1", prefixes("10.0.0.0/7"), "a name", "2"},
		{"1", "1", prefixes("::/0"), "", "1"},
	} {
		w.check(writeSysctl(all, tt.all))
		w.check(writeSysctl("net/ipv4/conf/eth0/rp_filter", tt.eth0))
		before := w.everything()
		c := w.config()
		c.Routes = tt.routes
		if c.Anywhere = tt.endpoint == "a name"; !c.Anywhere && tt.endpoint != "" {
			c.Endpoints = []netip.Addr{netip.MustParseAddr(tt.endpoint)}
		}
		s := w.apply(c)
		if got, _ := readSysctl(all); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
		w.check(s.Close())
		w.same(before, fmt.Sprintf("after %+v", tt))
	}
	// What somebody else sets meanwhile stays.
	w.check(writeSysctl(all, "1"))
	s := w.apply(w.config())
	w.check(writeSysctl(all, "0"))
	w.check(s.Close())
	if got, _ := readSysctl(all); got != "0" {
		t.Errorf("%s = %s", all, got)
	}
}

// TestErrorUndoes: whichever step fails, what was before it is taken back.
func TestErrorUndoes(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	w.check(writeSysctl("net/ipv4/conf/all/rp_filter", "1"))
	before := w.everything()
	w.tun("ps0")
	c := w.config()
	c.Exclude = prefixes("203.0.113.0/24")
	steps := 0
	testStep = func(*step) error { steps++; return nil }
	defer func() { testStep = nil }()
	w.check(w.apply(c).Close())
	if steps < 25 {
		t.Fatalf("%d steps in all", steps)
	}
	for n := 1; n <= steps; n++ {
		i, name := 0, ""
		testStep = func(s *step) error {
			if i++; i == n {
				name = s.String()
				return unix.EIO
			}
			return nil
		}
		if s, err := Apply(c); !errors.Is(err, unix.EIO) || s != nil || !strings.Contains(err.Error(), name) {
			t.Errorf("step %d, %s: %v", n, name, err)
		}
		w.same(before, "after the failure of "+name)
	}
}

// TestPersistentInterface: what was set before Apply is there after Close.
func TestPersistentInterface(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	w.ip("tuntap add dev ps0 mode tun")
	w.ip("addr add 10.66.0.1/24 dev ps0 noprefixroute")
	w.ip("addr add 10.5.0.1/24 dev ps0 noprefixroute")
	w.check(Check(w.config()))
	show := func() string {
		text := w.ip("addr show dev ps0")
		for _, qdisc := range []string{"noop", "pfifo_fast", "fq_codel", "fq"} { // the first up gives it one
			text = strings.Replace(text, "qdisc "+qdisc+" ", "", 1)
		}
		return text
	}
	before, all := show(), w.everything()
	s := w.apply(w.config())
	if now := show(); now == before || !strings.Contains(now, "fd66::1/64") {
		t.Errorf("after Apply: %s", now)
	}
	w.check(s.Close())
	if now := show(); now != before {
		t.Errorf("after Close:\n%s\nbefore:\n%s", now, before)
	}
	w.same(all, "after Close")
}

// crashEnv makes this test binary a node that is to be killed.
const crashEnv = "PENSTOCK_TEST_HOSTNET"

// TestCrashProcess is no test: it is the node of TestCrash.
func TestCrashProcess(t *testing.T) {
	text := os.Getenv(crashEnv)
	if text == "" {
		return
	}
	var c Config
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	f, err := openTUN(c.Interface)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := Apply(c); err != nil {
		t.Fatal(err)
	}
	fmt.Println("applied")
	select {} // to be killed
}

// crash runs a node up to Apply and kills it.
func (w *sandbox) crash(c Config) {
	w.t.Helper()
	text, err := json.Marshal(c)
	w.check(err)
	self, err := os.Executable()
	w.check(err)
	cmd := exec.Command(self, "-test.run=^TestCrashProcess$", "-test.v=false")
	cmd.Env = append(os.Environ(), crashEnv+"="+string(text))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	w.check(err)
	w.check(cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "applied\n" {
		cmd.Process.Kill()
		cmd.Wait()
		w.t.Fatalf("the node said %q, %v", line, err)
	}
	if _, err := Recover(w.folder, nil); err != nil {
		w.t.Error(err)
	}
	if got := w.wayTo("8.8.8.8", 0); got != "ps0" {
		w.t.Errorf("of the living node something was taken back: 8.8.8.8 is by %s", got)
	}
	w.check(cmd.Process.Kill())
	cmd.Wait()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat("/sys/class/net/ps0"); err != nil || time.Now().After(end) {
			return
		}
	}
}

// TestCrash: what a killed node leaves, and that Recover takes it back, even when that is killed
// in turn.
func TestCrash(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	w.check(writeSysctl("net/ipv4/conf/all/rp_filter", "1"))
	before := w.everything()
	c := w.config()
	c.Exclude = prefixes("203.0.113.0/24")
	w.crash(c)
	w.ways(0, map[string]string{"8.8.8.8": "eth0", "2001:db8:2::1": "eth0"}) // the routes went with the interface
	if now := w.everything(); now == before || !strings.Contains(now, "not from all fwmark 0x143e") {
		t.Errorf("the node left nothing:\n%s", now)
	}
	if did, err := Recover(w.folder, func(string, string) bool { return false }); err != nil || len(did) > 0 {
		t.Errorf("of others: %+v, %v", did, err)
	}
	did, err := Recover(w.folder, func(name, owner string) bool { return name == "ps0" && owner == c.Owner })
	if err != nil || len(did) != 1 || did[0].Err != nil || did[0].Steps < 25 {
		t.Errorf("Recover: %+v, %v", did, err)
	}
	w.same(before, "after Recover")
	if did, err := Recover(w.folder, nil); err != nil || len(did) > 0 {
		t.Errorf("Recover a second time: %+v, %v", did, err)
	}

	// Taken back already, but for the journal: by a Recover that was killed.
	w.crash(c)
	path := w.journal(c.Interface)
	text, err := os.ReadFile(path)
	w.check(err)
	_, err = Recover(w.folder, nil)
	w.check(err)
	w.check(os.WriteFile(path, text, 0o600))
	w.tun("ps0") // of another program by now
	w.ip("addr add 10.66.0.1/24 dev ps0")
	if did, err := Recover(w.folder, nil); err != nil || len(did) != 1 || did[0].Err != nil {
		t.Errorf("Recover once more: %+v, %v", did, err)
	}
	if got := w.ip("addr show dev ps0"); !strings.Contains(got, "10.66.0.1/24") {
		t.Errorf("another program's address was taken: %s", got)
	}
}

// TestCutJournal: killed at any byte of a journal, Recover takes back what was written whole.
func TestCutJournal(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	before := w.everything()
	c := w.config()
	c.Routes = prefixes("0.0.0.0/0")
	w.tun("ps0")
	s := w.apply(c)
	path := w.journal(c.Interface)
	text, err := os.ReadFile(path)
	w.check(err)
	w.check(s.Close())
	for n := 0; n < len(text); n += 37 {
		w.check(os.WriteFile(path, text[:n], 0o600))
		if _, err := Recover(w.folder, nil); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
		w.same(before, fmt.Sprintf("after %d bytes of a journal", n))
	}
}

// TestJournalOfAnotherNamespace: who cannot tell the first namespace from others, as an ordinary user or in containers, has
// interfaces of the same name in two of them all the same.
func TestJournalOfAnotherNamespace(t *testing.T) {
	w := newSandbox(t)
	w.check(unix.Mount("tmpfs", "/proc/1/ns", "tmpfs", 0, ""))
	c := w.dnsOnly()
	c.DNS = DNS{} // /etc is shared
	w.tun("ps0")
	one := w.apply(c)
	if _, err := Apply(c); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "a.toml") {
		t.Errorf("twice in one namespace: %v", err)
	}
	home, err := os.Open("/proc/thread-self/ns/net")
	w.check(err)
	defer home.Close()
	w.check(unix.Unshare(unix.CLONE_NEWNET))
	w.tun("ps0")
	two := w.apply(c)
	if did, err := Recover(w.folder, nil); err != nil || len(did) > 0 {
		t.Errorf("Recover took back from the living: %+v, %v", did, err)
	}
	two.journal.file.Close() // which gives the lock up, as death does
	if did, err := Recover(w.folder, nil); err != nil || len(did) != 1 || did[0].Err != nil {
		t.Errorf("Recover: %+v, %v", did, err)
	}
	w.check(w.apply(c).Close())
	w.check(unix.Setns(int(home.Fd()), unix.CLONE_NEWNET))
	w.check(one.Close())
	if left, _ := filepath.Glob(filepath.Join(w.folder, "*"+journalEnd)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func (w *sandbox) journal(name string) string {
	w.t.Helper()
	ns, err := thisNetNS()
	w.check(err)
	return journalPath(w.folder, name, ns)
}

// TestCheck: what is wrong is said before anything is opened.
func TestCheck(t *testing.T) {
	w := newSandbox(t)
	c := w.config()
	w.check(Check(c))
	wrong := func(name, want string) {
		t.Helper()
		c := c
		c.Interface = name
		if err := Check(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	wrong("eth0", "interface eth0 is there already and is no TUN (veth): choose another name")
	w.tun("ps0")
	wrong("ps0", "interface ps0 is there already, of another program: choose another name")
	w.ip("tuntap add dev tap0 mode tap")
	wrong("tap0", "is no TUN")
	w.check(unix.Mount("tmpfs", "/dev/net", "tmpfs", 0, ""))
	wrong("ps1", "/dev/net/tun is not there: load the module (modprobe tun), or give the container the device (--device /dev/net/tun)")
	w.check(unix.Unmount("/dev/net", 0))
	if _, err := Apply(Config{Interface: "ps9", Folder: w.folder}); err == nil || !strings.Contains(err.Error(), "interface ps9") {
		t.Errorf("no interface: %v", err)
	}
}

// TestIPv6Off: where new interfaces have no IPv6, ours gets it if it has an IPv6 address, and else has
// no route of IPv6.
func TestIPv6Off(t *testing.T) {
	w := newSandbox(t)
	w.check(writeSysctl("net/ipv6/conf/default/disable_ipv6", "1"))
	w.tun("ps0")
	before := w.everything()
	c := w.config()
	s := w.apply(c)
	w.ways(0, map[string]string{"2001:db8:2::1": "ps0", "fd66::2": "ps0", "8.8.8.8": "ps0"})
	w.check(s.Close())
	w.check(writeSysctl("net/ipv6/conf/ps0/disable_ipv6", "1"))
	c.Addresses = prefixes("10.66.0.1/24")
	s = w.apply(c)
	w.ways(0, map[string]string{"2001:db8:2::1": "eth0", "8.8.8.8": "ps0"})
	w.check(s.Close())
	w.same(before, "after Close")
}
