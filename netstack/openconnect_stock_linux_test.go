package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/vpntest/stock"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// stockNet is a namespace with an ocserv and the things behind it, and one for our client.
type stockNet struct {
	*routerNet
	server *stock.Server

	mu    sync.Mutex
	conns []net.Conn // the client's TCP connections, in order
}

// newStockNet starts an ocserv, and in its namespace a TCP service on port 7 of all addresses that returns
// what it is sent.
func newStockNet(t *testing.T, o stock.ServerOptions) *stockNet {
	w := &stockNet{routerNet: newRouterNet(t)}
	o.Listen = netip.MustParseAddrPort("10.9.1.2:443")
	o.Users = map[string]string{"ada": "lovelace"}
	w.On(routerNS, func() {
		w.server = stock.StartServer(t, o)
		l, err := net.Listen("tcp", "[::]:7")
		w.Check(err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(c, c)
					c.Close()
				}()
			}
		}()
	})
	return w
}

// dial makes connections from the client's namespace, whichever goroutine asks.
func (w *stockNet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	leave, err := w.Enter(clientNS)
	if err != nil {
		return nil, err
	}
	defer leave()
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err == nil {
		w.mu.Lock()
		w.conns = append(w.conns, c)
		w.mu.Unlock()
	}
	return c, err
}

// cut breaks the newest TCP connection as a network would, without a word on the TLS layer.
func (w *stockNet) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[len(w.conns)-1].(*net.TCPConn).SetLinger(0)
	w.conns[len(w.conns)-1].Close()
}

func (w *stockNet) signIn(password string) (*openconnect.Login, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return openconnect.SignIn(ctx, openconnect.Options{
		Dialer: openconnect.Dialer{Dial: w.dial, Pin: w.server.Pin}, Server: w.server.URL,
		Prompt: func(_ context.Context, q openconnect.Question) (string, error) {
			if q.Try > 0 {
				return "", errors.New("asked again")
			}
			if q.Field.Name == "username" {
				return "ada", nil
			}
			return password, nil
		},
	})
}

// blockable is a socket whose datagrams can be lost on purpose, both ways.
type blockable struct {
	transport.PacketConn
	blocked atomic.Bool
}

func (b *blockable) ReadBatch(batch []transport.Inbound) (int, error) {
	for {
		n, err := b.PacketConn.ReadBatch(batch)
		if err != nil || !b.blocked.Load() {
			return n, err
		}
	}
}

func (b *blockable) WriteBatch(runs []transport.Run) (int, error) {
	if b.blocked.Load() {
		return len(runs), nil
	}
	return b.PacketConn.WriteBatch(runs)
}

// client signs in and makes a node of it.
func (w *stockNet) client(t *testing.T, change func(*OpenConnect)) (*Node, *blockable) {
	t.Helper()
	login, err := w.signIn("lovelace")
	if err != nil {
		t.Fatal(err)
	}
	b := new(blockable)
	w.On(clientNS, func() {
		b.PacketConn, err = transport.ListenUDP(netip.MustParseAddrPort("0.0.0.0:0"), transport.SocketOptions{})
		w.Check(err)
	})
	o := &OpenConnect{Login: *login, Connect: openconnect.ConnectOptions{Dialer: openconnect.Dialer{Dial: w.dial}}}
	if change != nil {
		change(o)
	}
	n, err := New(Config{OpenConnect: o, Conns: []transport.PacketConn{b}, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n, b
}

// awaitPath waits until packets take a path.
func awaitPath(t *testing.T, n *Node, path string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		s := n.OpenConnect()
		if s.Path == path && s.State == OpenConnectUp {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("path %q (%s), state %s, last error %q; want path %q", s.Path, s.Why, s.State, s.LastError, path)
		}
	}
}

// echoed sends size bytes to the service and wants them back.
func echoed(t *testing.T, n *Node, to string, size int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	thereAndBack(t, c, size)
}

// thereAndBack sends size bytes and wants them back.
func thereAndBack(t *testing.T, c net.Conn, size int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(40 * time.Second))
	data := make([]byte, size)
	rand.Read(data)
	go c.Write(data)
	back := make([]byte, size)
	if _, err := io.ReadFull(c, back); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(data, back) {
		t.Fatal("what came back is not what was sent")
	}
}

// A node is a client of the stock server: TLS 1.3, where the key for DTLS can be exported, and
// Debian's default of TLS 1.2, where crypto/tls refuses that.
func TestOpenConnectStockServer(t *testing.T) {
	t.Run("TLS 1.3", func(t *testing.T) {
		w := newStockNet(t, stock.ServerOptions{})
		if _, err := w.signIn("wrong"); err == nil {
			t.Fatal("signed in with a wrong password")
		}
		n, udp := w.client(t, nil)
		if len(n.Addresses()) != 2 {
			t.Fatalf("addresses %v, want one of each family", n.Addresses())
		}
		awaitPath(t, n, "dtls")
		echoed(t, n, "10.97.0.1:7", 1<<20)
		echoed(t, n, "[fd97::1]:7", 1<<20)

		// UDP is blocked in the middle of a transfer, and unblocked.
		c, err := n.Dial(context.Background(), "tcp", "10.97.0.1:7")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		thereAndBack(t, c, 1<<20)
		udp.blocked.Store(true)
		thereAndBack(t, c, 1<<20)
		awaitPath(t, n, "cstp")
		thereAndBack(t, c, 1<<20)
		udp.blocked.Store(false)
		awaitPath(t, n, "dtls")
		thereAndBack(t, c, 1<<20)

		// The connection is lost, and comes back with the same addresses.
		before := n.OpenConnect()
		w.cut()
		for end := time.Now().Add(20 * time.Second); n.OpenConnect().Reconnects == before.Reconnects; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("not connected again")
			}
		}
		thereAndBack(t, c, 1<<20)
		awaitPath(t, n, "dtls")
		thereAndBack(t, c, 1<<20)
		if after := n.OpenConnect(); after.Settings.Addresses[0] != before.Settings.Addresses[0] {
			t.Errorf("address %v, was %v", after.Settings.Addresses, before.Settings.Addresses)
		}
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		w := newStockNet(t, stock.ServerOptions{NoTLS13: true})
		n, _ := w.client(t, nil)
		awaitPath(t, n, "cstp")
		echoed(t, n, "10.97.0.1:7", 1<<20)
		echoed(t, n, "[fd97::1]:7", 1<<20)
		t.Log(n.OpenConnect().Why)
	})
	t.Run("NoDTLS", func(t *testing.T) {
		w := newStockNet(t, stock.ServerOptions{})
		n, _ := w.client(t, func(o *OpenConnect) { o.Connect.NoDTLS = true })
		awaitPath(t, n, "cstp")
		echoed(t, n, "10.97.0.1:7", 1<<20)
	})
}

// A cookie can be used again after a node that has left its session, and not after one that has said goodbye:
// then SignIn is asked, and without that the tunnel ends.
func TestOpenConnectCookie(t *testing.T) {
	w := newStockNet(t, stock.ServerOptions{})
	var login openconnect.Login
	first, _ := w.client(t, func(o *OpenConnect) {
		o.KeepSession = true
		login = o.Login
	})
	addresses := first.Addresses()
	first.Close()
	again := func() (*Node, error) {
		return New(Config{OpenConnect: &OpenConnect{
			Login: login, Connect: openconnect.ConnectOptions{Dialer: openconnect.Dialer{Dial: w.dial}, NoDTLS: true},
		}})
	}
	second, err := again()
	if err != nil {
		t.Fatal(err)
	}
	if second.Addresses()[0] != addresses[0] {
		t.Errorf("addresses %v, were %v", second.Addresses(), addresses)
	}
	second.Close()
	if _, err := again(); !errors.Is(err, openconnect.ErrCookie) {
		t.Errorf("a spent cookie: %v, want %v", err, openconnect.ErrCookie)
	}
}
