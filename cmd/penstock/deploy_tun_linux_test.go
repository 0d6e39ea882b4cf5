package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/penstock-vpn/penstock/netstack"
)

// TestCapNetAdmin: a full tunnel with an interface of the kernel, as the unit with its drop-in and the container
// run it: a user, and root, with CAP_NET_ADMIN and nothing else, and a folder for the node. In the end everything
// is as it was, after a kill too.
func TestCapNetAdmin(t *testing.T) {
	required(t, "ip", "setpriv")
	for name, uid := range map[string]int{"unit": 65532, "container": 0} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			const dir, config, program = "/run/penstock/home", "/run/home.toml", "/run/bin/penstock"
			own, err := netstack.GenerateKey()
			if err != nil {
				t.Fatal(err)
			}
			peer, err := netstack.GenerateKey()
			if err != nil {
				t.Fatal(err)
			}
			text, err := own.MarshalText()
			if err != nil {
				t.Fatal(err)
			}
			content := fmt.Sprintf("[node]\nprivate_key = %q\naddress = [\"10.66.0.1/24\", \"fd66::1/64\"]\ndevice = \"tun\"\n"+
				"[[peer]]\nname = \"exit\"\npublic_key = %q\nendpoint = \"10.9.0.2:5182\"\nallowed_ips = [\"0.0.0.0/0\", \"::/0\"]\n",
				text, peer.Public().String())
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			p.in(func() { p.check(os.WriteFile(config, []byte(content), 0o400)) })
			p.sh(fmt.Sprintf(`ip link add eth0 type veth peer name eth1; ip link set eth0 addrgenmode none; ip link set eth1 addrgenmode none; ip link set eth1 up; ip link set eth0 up; ip addr add 10.9.0.1/24 dev eth0; ip route add default via 10.9.0.2
				echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter
				mkdir -p %s /run/bin; cp %s %s; chown %d:%[4]d %[1]s %[5]s`, dir, self, program, uid, config))
			up := func() *runningNode {
				t.Helper()
				n := &runningNode{log: new(bytes.Buffer), ended: make(chan error, 1)}
				// What systemd and container runtimes do, by a stranger's program.
				n.cmd = exec.Command("setpriv", fmt.Sprintf("--reuid=%d", uid), fmt.Sprintf("--regid=%d", uid), "--clear-groups", "--no-new-privs",
					"--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin", program, "up", "-c", config)
				n.cmd.Env, n.cmd.Dir, n.cmd.Stderr = append(os.Environ(), "RUNTIME_DIRECTORY="+dir), "/", n.log
				p.in(func() { p.check(n.cmd.Start()) })
				go func() { n.ended <- n.cmd.Wait() }()
				t.Cleanup(func() {
					n.cmd.Process.Kill()
					n.wait()
					if t.Failed() {
						t.Logf("%s", n.log)
					}
				})
				p.await("sh", "-c", "ip rule | grep 5182 && ip route show table 5182 | grep default && test -S "+dir+"/home.sock")
				return n
			}
			if err := up().end(syscall.SIGTERM); err != nil { // leaves a file to lock
				t.Error(err)
			}
			before := p.everything()
			n := up()
			for _, set := range []string{"CapEff", "CapBnd"} { // CAP_NET_ADMIN is bit 12
				caps := p.sh(fmt.Sprintf("grep %s /proc/%d/status", set, n.cmd.Process.Pid))
				if !strings.HasSuffix(caps, "\t0000000000001000\n") {
					t.Errorf("another set than CAP_NET_ADMIN alone: %s", caps)
				}
			}
			if got := p.sh("cat /proc/sys/net/ipv4/conf/all/rp_filter"); got != "2\n" {
				t.Errorf("rp_filter is %q", got)
			}
			if err := n.end(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			if after := p.everything(); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			up().end(syscall.SIGKILL)
			if err := up().end(syscall.SIGTERM); err != nil {
				t.Error("after a kill:", err)
			}
			if after := p.everything(); after != before {
				t.Errorf("before:\n%s\nafter a kill and a start:\n%s", before, after)
			}
		})
	}
}
