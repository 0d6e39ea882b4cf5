package gateway_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// ourselves is a server of ours with a client of ours, a node each, and one TCP connection between them that is in use
// without a pause.
type ourselves struct {
	t      *testing.T
	server *gateway.Server
	client *netstack.Node
	udp    *mortal // blocks the client's datagrams

	mu   sync.Mutex
	last net.Conn // the client's newest TCP connection

	flow  net.Conn
	bytes atomic.Int64 // that came back as they were sent
	err   error        // after done
	done  chan struct{}
}

func newOurselves(t *testing.T, rekey time.Duration) *ourselves {
	pool, err := gateway.ParseRange("10.97.1.0/24")
	if err != nil {
		t.Fatal(err)
	}
	w := &ourselves{t: t, udp: new(mortal), done: make(chan struct{})}
	w.server, err = gateway.New(gateway.Config{
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, StateDir: t.TempDir(), Users: openDoor{},
		Profile: gateway.Profile{Pool: gateway.Pool{pool}, DPD: 2 * time.Second, Rekey: rekey},
		Node:    netstack.Config{Addresses: []netip.Prefix{netip.MustParsePrefix("10.97.0.1/16")}},
		Ban:     gateway.BanConfig{Exempt: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	// The reset of a connection may come after the goodbye, by the other channel, and is not repeated: the server's end is
	// then ended by the server.
	var echo sync.WaitGroup
	t.Cleanup(func() { w.server.Close(); echo.Wait() })
	l, err := w.server.Node().Listen("tcp", "10.97.0.1:7")
	if err != nil {
		t.Fatal(err)
	}
	echo.Go(func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	})
	t.Cleanup(func() { l.Close() })

	dialer := openconnect.Dialer{Pin: w.server.Pin(), Dial: w.dial}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	login, err := openconnect.SignIn(ctx, openconnect.Options{
		Dialer: dialer, Server: "https://" + w.server.Addrs()[0].String(), Tries: 1,
		Prompt: func(context.Context, openconnect.Question) (string, error) { return "ada", nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	socket, err := transport.ListenUDP(netip.MustParseAddrPort("127.0.0.1:0"), transport.SocketOptions{})
	if err != nil {
		t.Fatal(err)
	}
	w.client, err = netstack.New(netstack.Config{
		OpenConnect: &netstack.OpenConnect{Login: *login, Connect: openconnect.ConnectOptions{Dialer: dialer}},
		Conns:       []transport.PacketConn{mortalDatagrams{socket, w.udp}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.client.Close() })
	if w.flow, err = w.client.Dial(ctx, "tcp", "10.97.0.1:7"); err != nil {
		t.Fatal(err)
	}
	go w.use()
	t.Cleanup(func() { w.flow.Close(); <-w.done })
	return w
}

func (w *ourselves) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err == nil {
		w.mu.Lock()
		w.last = c
		w.mu.Unlock()
	}
	return c, err
}

// cut resets the client's TCP connection under the TLS.
func (w *ourselves) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last.(*net.TCPConn).SetLinger(0)
	w.last.Close()
}

func (w *ourselves) use() {
	defer close(w.done)
	data, back := make([]byte, 16<<10), make([]byte, 16<<10)
	for {
		rand.Read(data)
		if _, w.err = w.flow.Write(data); w.err != nil {
			return
		}
		if _, w.err = io.ReadFull(w.flow, back); w.err != nil {
			return
		}
		if !bytes.Equal(data, back) {
			w.err = errors.New("what came back is not what was sent")
			return
		}
		w.bytes.Add(int64(len(data)))
	}
}

// until waits for ok, and then for some more bytes there and back by the connection.
func (w *ourselves) until(what string, ok func(s *netstack.OpenConnectStatus) bool) {
	w.t.Helper()
	end := time.Now().Add(time.Minute)
	wait := func(what string, ok func() bool) {
		w.t.Helper()
		for ; !ok(); time.Sleep(10 * time.Millisecond) {
			select {
			case <-w.done:
				w.t.Fatalf("%s: the connection has ended after %d bytes: %v", what, w.bytes.Load(), w.err)
			default:
			}
			if time.Now().After(end) {
				w.t.Fatalf("never: %s; %d bytes, %+v", what, w.bytes.Load(), *w.client.OpenConnect())
			}
		}
	}
	wait(what, func() bool { return ok(w.client.OpenConnect()) })
	want := w.bytes.Load() + 1<<20
	wait(what+", and the connection goes on", func() bool { return w.bytes.Load() >= want })
}

func upBy(path string) func(*netstack.OpenConnectStatus) bool {
	return func(s *netstack.OpenConnectStatus) bool { return s.State == netstack.OpenConnectUp && s.Path == path }
}

// session is the only one on the server.
func (w *ourselves) session() gateway.SessionStatus {
	w.t.Helper()
	list, err := w.server.Sessions(context.Background())
	if err != nil || len(list) != 1 {
		w.t.Fatalf("%v: %+v", err, list)
	}
	return list[0]
}

// TestOurselvesOutages: UDP is blocked and unblocked, and the TLS connection lost, in the middle of a transfer.
func TestOurselvesOutages(t *testing.T) {
	w := newOurselves(t, -1)
	w.until("DTLS", upBy("dtls"))
	before := w.session()
	w.udp.dead.Store(true)
	w.until("CSTP without UDP", upBy("cstp"))
	w.udp.dead.Store(false)
	w.until("DTLS again", upBy("dtls"))
	was := w.client.OpenConnect()
	w.cut()
	w.until("another connection", func(s *netstack.OpenConnectStatus) bool {
		return s.State == netstack.OpenConnectUp && s.Reconnects > was.Reconnects
	})
	w.until("DTLS with it", upBy("dtls"))
	if after := w.session(); after.ID != before.ID || !slices.Equal(after.Addresses, before.Addresses) {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if now := w.client.OpenConnect(); !slices.Equal(now.Settings.Addresses, was.Settings.Addresses) {
		t.Errorf("addresses %v, were %v", now.Settings.Addresses, was.Settings.Addresses)
	}
}

// TestOurselvesRekey: the server wants new keys every other second; three times, in the middle of a transfer, nothing is lost.
func TestOurselvesRekey(t *testing.T) {
	w := newOurselves(t, 2*time.Second)
	w.until("DTLS", upBy("dtls"))
	before := w.session()
	for i := range 3 {
		last := w.client.OpenConnect().Connected
		w.until(fmt.Sprintf("new keys %d", i+1), func(s *netstack.OpenConnectStatus) bool {
			return s.State == netstack.OpenConnectUp && s.Connected.After(last)
		})
	}
	w.until("DTLS at the end", upBy("dtls"))
	if after := w.session(); after.ID != before.ID || !slices.Equal(after.Addresses, before.Addresses) {
		t.Errorf("before %+v, after %+v", before, after)
	}
	t.Logf("%d bytes there and back", w.bytes.Load())
}
