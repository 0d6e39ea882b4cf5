package hostnet

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// dnsOnly is a configuration without routes.
func (w *sandbox) dnsOnly() Config {
	c := w.config()
	c.Routes, c.Table = nil, TableNone
	return c
}

// withDNS applies it, looks, and closes. With crash it dies instead, and Recover is called.
func (w *sandbox) withDNS(crash bool, look func()) {
	w.t.Helper()
	c := w.dnsOnly()
	if crash {
		c = w.config() // which crash needs
		w.crash(c)
		look()
		did, err := Recover(w.folder, nil)
		if err != nil || len(did) != 1 || did[0].Err != nil {
			w.t.Errorf("Recover: %+v, %v", did, err)
		}
		return
	}
	f, err := openTUN(c.Interface)
	w.check(err)
	defer f.Close()
	s := w.apply(c)
	look()
	w.check(s.Close())
}

// TestResolvConfFile: every kind of file comes back as it was.
func TestResolvConfFile(t *testing.T) {
	const target = "/run/NetworkManager/resolv.conf"
	for name, prepare := range map[string]func(w *sandbox){
		"a file": func(*sandbox) {},
		"a file of another mode": func(w *sandbox) {
			w.check(os.Chmod(resolvConfPath, 0o664))
			w.check(os.Chown(resolvConfPath, 0, 65534))
		},
		"none": func(w *sandbox) { w.check(os.Remove(resolvConfPath)) },
		"a link": func(w *sandbox) {
			w.check(os.MkdirAll(filepath.Dir(target), 0o755))
			w.check(os.Remove(resolvConfPath))
			w.check(os.WriteFile(target, []byte(resolvBefore), 0o644))
			w.check(os.Symlink(".."+target, resolvConfPath))
		},
		"a dangling link": func(w *sandbox) {
			w.check(os.Remove(resolvConfPath))
			w.check(os.Symlink("../nowhere/resolv.conf", resolvConfPath))
		},
		"a mount": func(w *sandbox) {
			w.check(os.WriteFile("/run/resolv.conf", []byte(resolvBefore), 0o600))
			w.check(unix.Mount("/run/resolv.conf", resolvConfPath, "", unix.MS_BIND, ""))
		},
		"a mount in a folder that cannot be written to": func(w *sandbox) {
			w.check(os.WriteFile("/run/resolv.conf", []byte(resolvBefore), 0o644))
			w.check(unix.Mount("tmpfs", "/etc", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			w.check(unix.Mount("/run/resolv.conf", resolvConfPath, "", unix.MS_BIND, ""))
		},
	} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, crash %v", name, crash), func(t *testing.T) {
				w := newSandbox(t)
				w.check(os.MkdirAll(w.folder, 0o755))
				prepare(w)
				before := w.everything()
				stat := func() string {
					out, _ := exec.Command("stat", "-c", "%A %u %g %s", resolvConfPath).CombinedOutput()
					return string(out)
				}
				was := stat()
				w.withDNS(crash, func() {
					if got := w.resolvConf(); !strings.Contains(got, "\nnameserver 10.66.0.2\nsearch corp.example\n") || strings.Contains(got, "192.0.2.53") {
						t.Errorf("resolv.conf:\n%s", got)
					}
					if text, err := os.ReadFile(target); err == nil && string(text) != resolvBefore {
						t.Errorf("the link's target was written to:\n%s", text)
					}
				})
				w.same(before, "at the end")
				if now := stat(); now != was {
					t.Errorf("the file is %s, was %s", now, was)
				}
			})
		}
	}
}

// TestResolvConfIsAnothers: what somebody else writes while the node runs stays.
func TestResolvConfIsAnothers(t *testing.T) {
	w := newSandbox(t)
	const theirs = "nameserver 203.0.113.53\n"
	w.withDNS(false, func() { w.check(os.WriteFile(resolvConfPath, []byte(theirs), 0o644)) })
	if got := w.resolvConf(); got != theirs {
		t.Errorf("resolv.conf:\n%s", got)
	}
	if names, _ := filepath.Glob("/etc/*resolv*"); len(names) != 1 {
		t.Errorf("there are %v", names)
	}
}

// TestResolvConfAfterRestart: the machine loses power; the journal is gone, the file is not.
func TestResolvConfAfterRestart(t *testing.T) {
	for name, prepare := range map[string]func(w *sandbox){
		"a file": func(*sandbox) {},
		"none":   func(w *sandbox) { w.check(os.Remove(resolvConfPath)) },
		"a link": func(w *sandbox) {
			w.check(os.Rename(resolvConfPath, "/etc/real.conf"))
			w.check(os.Symlink("real.conf", resolvConfPath))
		},
		"a mount": func(w *sandbox) {
			w.check(os.WriteFile("/run/resolv.conf", []byte(resolvBefore), 0o600))
			w.check(unix.Mount("/run/resolv.conf", resolvConfPath, "", unix.MS_BIND, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newSandbox(t)
			prepare(w)
			before := w.everything()
			c := w.config()
			w.crash(c)
			w.ip("-4 rule flush")
			w.ip("-6 rule flush")
			for _, table := range []string{"main", "default"} {
				w.ip("-4 rule add lookup " + table + " pref " + map[string]string{"main": "32766", "default": "32767"}[table])
			}
			w.ip("-6 rule add lookup main pref 32766")
			w.check(os.RemoveAll(w.folder))
			if did, err := Recover(w.folder, func(name, _ string) bool { return name == "ps7" }); err != nil || len(did) > 0 {
				t.Errorf("of another interface: %+v, %v", did, err)
			}
			did, err := Recover(w.folder, nil)
			if err != nil || len(did) != 1 || did[0].Err != nil || did[0].Interface != "ps0" {
				t.Errorf("Recover: %+v, %v", did, err)
			}
			w.same(before, "after Recover")
		})
	}
}

// TestEndpointServers: the names of endpoints are asked of the servers that the host had, also of one that
// the tunnel has too.
func TestEndpointServers(t *testing.T) {
	for name, tunnels := range map[string]string{"others": "10.66.0.2:53", "the same": "192.0.2.53:53"} {
		w := newSandbox(t)
		c := w.config()
		c.DNS = DNS{Servers: []netip.AddrPort{netip.MustParseAddrPort(tunnels)}}
		e := NewEndpoints(c.FwMark, c.DNS)
		f := w.tun("ps0")
		s := w.apply(c)
		if got := fmt.Sprint(e.uplinks()); got != "[192.0.2.53:53]" {
			t.Errorf("%s: %s", name, got)
		}
		w.check(s.Close())
		w.check(f.Close())
	}
}

// TestResolvConfOfAnotherNamespace: a node in another network namespace that shares /etc lives, and its
// file is left alone; when it is dead, it is not.
func TestResolvConfOfAnotherNamespace(t *testing.T) {
	w := newSandbox(t)
	before := w.resolvConf()
	f, err := openTUN("ps0")
	w.check(err)
	defer f.Close()
	s := w.apply(w.config())
	w.check(unix.Unshare(unix.CLONE_NEWNET))
	if did, err := Recover(w.folder, nil); err != nil || len(did) > 0 {
		t.Errorf("while it lives: %+v, %v", did, err)
	}
	if got := w.resolvConf(); !strings.Contains(got, "10.66.0.2") {
		t.Errorf("resolv.conf:\n%s", got)
	}
	s.journal.file.Close() // which gives the lock up, as death does
	if did, err := Recover(w.folder, nil); err != nil || len(did) != 1 || did[0].Err != nil {
		t.Errorf("when it is dead: %+v, %v", did, err)
	}
	if got := w.resolvConf(); got != before {
		t.Errorf("resolv.conf:\n%s", got)
	}
}

// program installs a script in a folder of its own at the front of $PATH. $CALLS is a file for what it
// was called with.
func (w *sandbox) program(name, script string) (calls func() string) {
	w.t.Helper()
	dir := w.t.TempDir()
	w.check(os.Chmod(dir, 0o755))
	log := filepath.Join(dir, "calls")
	text := "#!/bin/sh\nCALLS=" + log + "\n" + script
	w.check(os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755))
	w.t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func() string {
		b, _ := os.ReadFile(log)
		os.Remove(log)
		return string(b)
	}
}

const recording = `echo "$*" >>$CALLS; case "$1" in -a) cat >>$CALLS;; esac` + "\n"

// TestResolved: systemd-resolved is told if /etc/resolv.conf is its own.
func TestResolved(t *testing.T) {
	for name, prepare := range map[string]func(w *sandbox){
		"the stub's file": func(w *sandbox) {
			w.check(os.MkdirAll(resolvedFolder, 0o755))
			w.check(os.WriteFile(resolvedFolder+"/stub-resolv.conf", []byte("nameserver 127.0.0.53\n"), 0o644))
			w.check(os.Remove(resolvConfPath))
			w.check(os.Symlink("../run/systemd/resolve/stub-resolv.conf", resolvConfPath))
		},
		"the uplinks' file": func(w *sandbox) {
			w.check(os.MkdirAll(resolvedFolder, 0o755))
			w.check(os.WriteFile(resolvedFolder+"/resolv.conf", []byte("nameserver 192.0.2.53\n"), 0o644))
			w.check(os.Remove(resolvConfPath))
			w.check(os.Symlink(resolvedFolder+"/resolv.conf", resolvConfPath))
		},
		"the stub's address": func(w *sandbox) {
			w.check(os.WriteFile(resolvConfPath, []byte("nameserver 127.0.0.53\noptions edns0\n"), 0o644))
		},
	} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, crash %v", name, crash), func(t *testing.T) {
				w := newSandbox(t)
				w.check(os.MkdirAll(w.folder, 0o755))
				prepare(w)
				w.program("resolvconf", recording+"exit 1\n") // not asked
				calls := w.program("resolvectl", recording)
				before := w.everything()
				w.withDNS(crash, func() {
					if got, want := calls(), "dns ps0 10.66.0.2\ndomain ps0 corp.example ~.\n"; got != want {
						t.Errorf("resolvectl was called with\n%swant\n%s", got, want)
					}
				})
				want := "revert ps0\n"
				if crash {
					want = "" // it has forgotten, with the interface
				}
				if got := calls(); got != want {
					t.Errorf("at the end resolvectl was called with\n%swant\n%s", got, want)
				}
				w.same(before, "at the end")
			})
		}
	}
}

// TestResolvconf: resolvconf is told where resolv.conf is its business, in either of its kinds.
func TestResolvconf(t *testing.T) {
	link := func(w *sandbox) {
		w.check(os.MkdirAll("/run/resolvconf", 0o755))
		w.check(os.Remove(resolvConfPath))
		w.check(os.WriteFile("/run/resolvconf/resolv.conf", []byte(resolvBefore), 0o644))
		w.check(os.Symlink("../run/resolvconf/resolv.conf", resolvConfPath))
	}
	for _, tt := range []struct {
		name, version string
		prepare       func(*sandbox)
		add, remove   string
	}{
		{"openresolv", "openresolv 3.12.0", func(*sandbox) {}, "-a ps0 -m 0 -x\nnameserver 10.66.0.2\nsearch corp.example\n", "-d ps0 -f\n"},
		{"Debian's", "Debian resolvconf 1.91", link, "-a tun.ps0 -m 0 -x\nnameserver 10.66.0.2\nsearch corp.example\n", "-d tun.ps0 -f\n"},
		{"Debian's, unused", "Debian resolvconf 1.91", func(*sandbox) {}, "", ""},
		{"resolvectl", "systemd 252 (252.39)", func(*sandbox) {}, "", ""},
	} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, crash %v", tt.name, crash), func(t *testing.T) {
				w := newSandbox(t)
				w.check(os.MkdirAll(w.folder, 0o755))
				tt.prepare(w)
				calls := w.program("resolvconf", `case "$1" in --version) echo "`+tt.version+`"; exit;; esac`+"\n"+recording)
				before := w.everything()
				w.withDNS(crash, func() {
					if got := calls(); got != tt.add {
						t.Errorf("resolvconf was called with\n%swant\n%s", got, tt.add)
					}
					if ours := strings.Contains(w.resolvConf(), "10.66.0.2"); ours != (tt.add == "") {
						t.Errorf("resolv.conf:\n%s", w.resolvConf())
					}
				})
				if got := calls(); got != tt.remove {
					t.Errorf("at the end resolvconf was called with\n%swant\n%s", got, tt.remove)
				}
				w.same(before, "at the end")
			})
		}
	}
}

// TestHelperFails: a resolver that cannot be told is an error, and undoes what was before.
func TestHelperFails(t *testing.T) {
	w := newSandbox(t)
	w.check(os.MkdirAll(w.folder, 0o755))
	w.check(os.WriteFile(resolvConfPath, []byte("nameserver 127.0.0.53\n"), 0o644))
	before := w.everything()
	w.tun("ps0")
	w.program("resolvectl", `case $1 in domain) echo "Failed to set domain configuration:  Unit not found" >&2; exit 1;; esac`)
	s, err := Apply(w.config())
	if err == nil || s != nil || !strings.Contains(err.Error(), "resolvectl domain ps0 corp.example ~.: exit status 1: Failed to set domain configuration: Unit not found") {
		t.Errorf("Apply: %v", err)
	}
	w.same(before, "after Apply")

	defer func(d time.Duration) { helperTimeout = d }(helperTimeout)
	helperTimeout = 200 * time.Millisecond
	w.program("resolvectl", "exec sleep 60")
	began := time.Now()
	if _, err := Apply(w.config()); err == nil || !strings.Contains(err.Error(), "resolvectl dns ps0 10.66.0.2: no answer in 200ms") {
		t.Errorf("Apply: %v", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	// The step that could not be taken back stays in the journal until it can be.
	if did, err := Recover(w.folder, nil); err != nil || len(did) != 1 || did[0].Err == nil {
		t.Errorf("Recover: %+v, %v", did, err)
	}
	if _, err := Apply(w.config()); err == nil || !strings.Contains(err.Error(), "has steps of a dead process that were not taken back") {
		t.Errorf("Apply: %v", err)
	}
	ctl, err := exec.LookPath("resolvectl")
	w.check(err)
	w.check(os.WriteFile(ctl, []byte("#!/bin/sh\n"), 0o755))
	if did, err := Recover(w.folder, nil); err != nil || len(did) != 1 || did[0].Err != nil {
		t.Errorf("Recover: %+v, %v", did, err)
	}
	w.same(before, "after Recover")
}

// real puts an unpacked Debian package of resolvconf where it belongs, in the sandbox alone.
func (w *sandbox) real(name string) {
	w.t.Helper()
	from := filepath.Join("/usr/local/share/penstock-test", name) // by .ci/tools
	if _, err := os.Stat(from); err != nil {
		if os.Getenv("PENSTOCK_REQUIRE_TOOLS") == "1" {
			w.t.Fatalf("%s is not there, and PENSTOCK_REQUIRE_TOOLS=1: %v", name, err)
		}
		w.t.Skipf("SKIPPED: %s is not there: %v", name, err)
	}
	for _, dir := range []string{"/sbin", "/lib"} {
		real, err := filepath.EvalSymlinks(dir)
		w.check(err)
		w.check(unix.Mount("overlay", real, "overlay", unix.MS_RDONLY, "lowerdir="+from+dir+":"+real))
	}
	w.check(exec.Command("cp", "-a", from+"/etc/.", "/etc/").Run())
}

func (w *sandbox) sh(script string) string {
	w.t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

// TestRealOpenresolv: the program itself, with another interface's servers and without.
func TestRealOpenresolv(t *testing.T) {
	for _, others := range []bool{false, true} {
		for _, crash := range []bool{false, true} {
			t.Run(fmt.Sprintf("others %v, crash %v", others, crash), func(t *testing.T) {
				w := newSandbox(t)
				w.check(os.MkdirAll(w.folder, 0o755))
				w.real("openresolv")
				if others {
					w.sh("printf 'nameserver 192.0.2.53\nsearch lan\n' | resolvconf -a eth0.dhcp")
				}
				before := w.resolvConf()
				w.withDNS(crash, func() {
					if got := w.resolvConf(); !strings.Contains(got, "search corp.example\nnameserver 10.66.0.2\n") || strings.Contains(got, "192.0.2.53") {
						t.Errorf("resolv.conf:\n%s", got)
					}
				})
				if got := w.resolvConf(); got != before {
					t.Errorf("at the end resolv.conf is\n%swas\n%s", got, before)
				}
			})
		}
	}
}

// TestRealDebianResolvconf: the same with Debian's, which puts ours first.
func TestRealDebianResolvconf(t *testing.T) {
	for _, crash := range []bool{false, true} {
		t.Run(fmt.Sprintf("crash %v", crash), func(t *testing.T) {
			w := newSandbox(t)
			w.check(os.MkdirAll(w.folder, 0o755))
			w.real("resolvconf")
			w.sh(`mkdir -p /run/resolvconf/interface && rm /etc/resolv.conf && ln -s ../run/resolvconf/resolv.conf /etc/resolv.conf
				resolvconf --enable-updates && printf 'nameserver 192.0.2.53\nsearch lan\n' | resolvconf -a eth0.inet`)
			before := w.everything()
			if !strings.Contains(before, "192.0.2.53") {
				t.Fatalf("resolvconf does not work here:\n%s", before)
			}
			w.withDNS(crash, func() {
				got := w.resolvConf()
				if ours, theirs := strings.Index(got, "nameserver 10.66.0.2"), strings.Index(got, "nameserver 192.0.2.53"); ours < 0 || theirs < ours {
					t.Errorf("resolv.conf:\n%s", got)
				}
			})
			w.same(before, "at the end")
		})
	}
}
