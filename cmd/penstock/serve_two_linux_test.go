package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// TestServeTwoServers: two servers with one store behind one address. Each connection of a sign-in may meet the other one, and a
// client whose server is killed comes back at the other, with the same addresses; an operator ends its session from any.
func TestServeTwoServers(t *testing.T) {
	required(t, "openconnect", "curl", "ping", "redis-server", "nft")
	l := newLab(t)
	socket := filepath.Join(l.dir, "redis.sock")
	redis := l.command()
	redis.Path, redis.Args = "", []string{"redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--dir", l.dir}
	var err error
	redis.Path, err = exec.LookPath("redis-server")
	l.Check(err)
	l.Check(redis.Start())
	t.Cleanup(func() {
		redis.Process.Kill()
		redis.Wait()
	})

	l.write("users", "")
	l.addUser("alice", "correct horse")
	servers := map[string]*labProgram{}
	start := func(id, port string) {
		text := onlyPasswords()
		text = strings.Replace(text, `listen = ["0.0.0.0:4443", "[::]:4443"]`, fmt.Sprintf("listen = [\"0.0.0.0:%s\", \"[::]:%[1]s\"]\npublic_port = 443\nid = %q", port, id), 1)
		file := id + ".toml"
		l.write(file, text+"\n[store]\nengine = \"redis\"\nurl = \"unix://"+socket+"\"\n")
		servers[id] = l.start("serve", "-c", file)
	}
	start("a", "4443")
	start("b", "4444")
	pin := servers["a"].pin()
	if other := servers["b"].pin(); other != pin {
		t.Fatalf("servers that share a state folder have pins %s and %s", pin, other)
	}
	// The balancer: packets of both protocols of new flows go to the port that is said.
	balance := func(to string) {
		l.On(labServer, func() {
			cmd := exec.Command("nft", "-f", "-")
			cmd.Stdin = strings.NewReader("table inet balancer\ndelete table inet balancer\ntable inet balancer { chain in { type nat hook prerouting priority dstnat;\n" +
				"tcp dport 443 redirect to :" + to + "\nudp dport 443 redirect to :" + to + "\n}\n}\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("nft: %v\n%s", err, out)
			}
		})
	}
	session := func(id string, ok func(s *gateway.SessionStatus) bool) gateway.SessionStatus {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			var list []gateway.SessionStatus
			l.Check(json.Unmarshal([]byte(l.must("", "sessions", "--json", "-c", id+".toml")), &list))
			if i := slices.IndexFunc(list, func(s gateway.SessionStatus) bool { return s.User == "alice" && ok(&s) }); i >= 0 {
				return list[i]
			}
			if time.Now().After(end) {
				t.Fatalf("sessions at %s: %+v", id, list)
			}
		}
	}

	// Either server at random: the cookies of a sign-in are good at both.
	balance("numgen inc mod 2 map { 0 : 4443, 1 : 4444 }")
	for range 4 {
		l.On(labClient, func() {
			cmd := l.command("connect", "https://10.99.0.2", "-u", "alice", "--passwd-on-stdin", "--authgroup", "Default", "--servercert", pin, "--cookieonly")
			cmd.Stdin = strings.NewReader("correct horse\n")
			if out, err := cmd.CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "webvpn=") {
				t.Fatalf("sign-in: %v\n%s", err, out)
			}
		})
	}

	balance("4443")
	c := l.connect(stock.ClientOptions{URL: "https://10.99.0.2", Pin: pin, User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default", "--reconnect-timeout", "60"}})
	tunnel := c.Connected(20 * time.Second)
	if !tunnel.DTLS {
		t.Errorf("no DTLS through the balancer:\n%s", c.Log())
	}
	before := session("b", func(s *gateway.SessionStatus) bool { return s.Connected && s.Server == "a" })
	l.pings("10.98.0.2", "fd98::2")

	servers["a"].stop(syscall.SIGKILL)
	balance("4444")
	after := session("b", func(s *gateway.SessionStatus) bool { return s.Connected && s.Server == "b" })
	if after.ID != before.ID || !slices.Equal(after.Addresses, before.Addresses) || after.Addresses[0] != tunnel.Addr4 || after.Addresses[1] != tunnel.Addr6 {
		t.Errorf("before %+v, after %+v, the client has %v and %v", before, after, tunnel.Addr4, tunnel.Addr6)
	}
	l.pings("10.98.0.2", "fd98::2")
	l.downloads("10.98.0.2", 1000)

	start("a", "4443") // and knows of the session
	if out := l.must("", "kick", "-c", "a.toml", before.ID); !strings.Contains(out, "1") {
		t.Errorf("kick: %s", out)
	}
	if code := c.Wait(60 * time.Second); code == 0 {
		t.Errorf("after kick the client ends with exit code %d:\n%s", code, c.Log())
	}
}
