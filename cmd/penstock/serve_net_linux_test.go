package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
)

// nft loads rules into the server's namespace, in the place of those before; "" is none.
func (l *lab) nft(rules string) {
	l.t.Helper()
	text := "table inet lab\ndelete table inet lab\n"
	if rules != "" {
		text += "table inet lab {\n" + rules + "\n}\n"
	}
	l.On(labServer, func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			l.t.Fatalf("nft: %v\n%s", err, out)
		}
	})
}

// bothWays are rules for what comes from the client and goes to it. The words take a %s for what is to be
// of the server's port: dport or sport.
func bothWays(words string) string {
	return "chain in { type filter hook input priority 0;\n" + fmt.Sprintf(words, "dport") + "\n}\n" +
		"chain out { type filter hook output priority 0;\n" + fmt.Sprintf(words, "sport") + "\n}"
}

// A flow is one TCP connection from the client to an echo service of the lan, in use without a pause.
type flow struct {
	l     *lab
	conn  net.Conn
	bytes atomic.Int64 // that came back as they were sent
	done  chan struct{}
	err   error // after done
}

// flow starts one.
func (l *lab) flow(host string) *flow {
	l.t.Helper()
	l.On(labLAN, func() {
		echo, err := net.Listen("tcp", net.JoinHostPort(host, "7"))
		l.Check(err)
		l.t.Cleanup(func() { echo.Close() })
		go func() {
			c, err := echo.Accept()
			if err == nil {
				io.Copy(c, c)
				c.Close()
			}
		}()
	})
	f := &flow{l: l, done: make(chan struct{})}
	l.On(labClient, func() {
		var err error
		f.conn, err = net.DialTimeout("tcp", net.JoinHostPort(host, "7"), 20*time.Second)
		l.Check(err)
	})
	go func() {
		defer close(f.done)
		data, back := make([]byte, 16<<10), make([]byte, 16<<10)
		for {
			rand.Read(data)
			if _, f.err = f.conn.Write(data); f.err != nil {
				return
			}
			if _, f.err = io.ReadFull(f.conn, back); f.err != nil {
				return
			}
			if !bytes.Equal(data, back) {
				f.err = fmt.Errorf("what came back is not what was sent")
				return
			}
			f.bytes.Add(int64(len(data)))
		}
	}()
	l.t.Cleanup(func() { f.conn.Close(); <-f.done })
	return f
}

// goesOn waits until some more has gone there and back. After an outage TCP waits for up to twice as long as
// that took before it tries again.
func (f *flow) goesOn() {
	f.l.t.Helper()
	for end, want := time.Now().Add(time.Minute), f.bytes.Load()+1<<20; f.bytes.Load() < want; time.Sleep(20 * time.Millisecond) {
		select {
		case <-f.done:
			f.l.t.Fatalf("the connection has ended after %d bytes: %v", f.bytes.Load(), f.err)
		default:
		}
		if time.Now().After(end) {
			f.l.t.Fatalf("the connection stands still after %d bytes", f.bytes.Load())
		}
	}
}

// by waits until a user's packets take a path. openconnect tries DTLS anew every minute.
func (p *labProgram) by(user, path string) gateway.SessionStatus {
	p.l.t.Helper()
	for end := time.Now().Add(80 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		var s gateway.SessionStatus
		for _, s = range p.sessions() {
			if s.User == user && s.Connected && s.Path == path {
				return s
			}
		}
		if time.Now().After(end) {
			p.l.t.Fatalf("%s's packets do not go by %s: %+v", user, path, s)
		}
	}
}

// TestServeStockOutages: what happens to the network, and to the programs, during one TCP connection through the VPN.
func TestServeStockOutages(t *testing.T) {
	required(t, "openconnect", "nft")
	l := newLab(t)
	l.write("server.toml", labPlain)
	l.write("users", "")
	l.addUser("alice", "correct horse")
	p := l.start("serve", "-c", "server.toml")
	c := l.connect(stock.ClientOptions{Pin: p.pin(), User: "alice", Password: "correct horse", Args: []string{"--authgroup", "Default"}})
	tunnel := c.Connected(20 * time.Second)
	f := l.flow("10.98.0.2")
	f.goesOn()
	before := p.by("alice", "dtls")
	const connected = "Got CONNECT response: HTTP/1.1 200"
	// again does what loses the TLS connection, and waits until there is another.
	again := func(lose func()) {
		t.Helper()
		n := strings.Count(c.Log(), connected)
		lose()
		c.Await(time.Minute, fmt.Sprintf("(?s)(%s.*){%d}", connected, n+1))
	}
	same := func(s gateway.SessionStatus) {
		t.Helper()
		if s.ID != before.ID || s.Addresses[0] != tunnel.Addr4 || s.Addresses[1] != tunnel.Addr6 {
			t.Errorf("before %+v, after %+v", before, s)
		}
	}

	l.sub(t, "UDP blocked and unblocked", func(t *testing.T) {
		l.nft(bothWays("udp %s 4443 drop"))
		c.Await(40*time.Second, `DTLS Dead Peer Detection detected dead peer`)
		p.by("alice", "cstp")
		f.goesOn()
		l.nft("")
		same(p.by("alice", "dtls"))
		f.goesOn()
	})

	l.sub(t, "TLS connection reset", func(t *testing.T) {
		again(func() {
			said := len(c.Log())
			l.nft("chain in { type filter hook input priority 0;\ntcp dport 4443 reject with tcp reset\n}")
			for end := time.Now().Add(20 * time.Second); len(c.Log()) == said && time.Now().Before(end); {
				time.Sleep(50 * time.Millisecond) // its next DPD is answered by the reset
			}
			l.nft("")
		})
		same(p.session("alice", isConnected))
		f.goesOn()
		same(p.by("alice", "dtls"))
	})

	l.sub(t, "client stopped", func(t *testing.T) { // the server asks, and gives it up
		again(func() {
			l.Check(c.Signal(syscall.SIGSTOP))
			p.session("alice", func(s *gateway.SessionStatus) bool { return !s.Connected })
			l.Check(c.Signal(syscall.SIGCONT))
		})
		same(p.session("alice", isConnected))
		f.goesOn()
	})

	l.sub(t, "server stopped", func(t *testing.T) { // the client asks, and gives it up
		again(func() {
			const gaveUp = "CSTP Dead Peer Detection detected dead peer"
			n := strings.Count(c.Log(), gaveUp)
			l.Check(p.cmd.Process.Signal(syscall.SIGSTOP))
			c.Await(40*time.Second, fmt.Sprintf("(?s)(%s.*){%d}", gaveUp, n+1))
			l.Check(p.cmd.Process.Signal(syscall.SIGCONT))
		})
		same(p.session("alice", isConnected))
		f.goesOn()
	})

	c.Stop(syscall.SIGINT)
	p.nobodyIn("alice")
}
