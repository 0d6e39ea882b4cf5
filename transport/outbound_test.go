package transport

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// A packet that ends a run is looked at twice, and counted once.
func TestDropsOutboundAreCountedOnce(t *testing.T) {
	o, _, _, _ := joined(t, AES128GCM)
	fill(o, 6, 100)
	for _, i := range []int{1, 4} {
		copy(o.packet(i)[16:], []byte{10, 9, 9, 9})
	}
	o.packet(2)[0] = 0xff
	o.batch(6)
	if got := o.t.drops[DropNoPeer].Load(); got != 2 {
		t.Errorf("%d packets without a peer counted, want 2", got)
	}
	if got := o.t.drops[DropNotIP].Load(); got != 1 {
		t.Errorf("%d packets that are not IP counted, want 1", got)
	}
	if got := o.t.sortedPeers()[0].out.packets.Load(); got != 3 {
		t.Errorf("%d packets outbound counted, want 3", got)
	}
}

// failConn refuses every second run.
type failConn struct {
	sinkConn
	calls int
}

func (c *failConn) WriteBatch(runs []Run) (int, error) {
	c.calls++
	if len(runs) < 2 {
		return 0, errors.New("no")
	}
	return 1, errors.New("no")
}

// What the socket refuses is a drop, and not traffic.
func TestOnlyWhatLeftIsCounted(t *testing.T) {
	o, _, _, _ := joined(t, AES128GCM)
	p := o.t.sortedPeers()[0]
	c := &failConn{}
	p.slots.Load().current.path.Store(&path{conn: c, remote: netip.MustParseAddrPort("192.0.2.2:2")})
	fill(o, 5, 100)
	copy(o.sizes, []int{100, 200, 300, 400, 500}) // a run each
	o.batch(5)
	if out, drops := p.out.packets.Load(), o.t.drops[DropSend].Load(); out != 2 || drops != 3 {
		t.Errorf("%d packets outbound and %d drops, want 2 and 3", out, drops)
	}
	if c.calls != 3 {
		t.Errorf("%d calls", c.calls)
	}
}

// badDevice fails on every Read, until it is closed after many.
type badDevice struct {
	takeDevice
	reads int
}

func (d *badDevice) Read([][]byte, []int, int) (int, error) {
	if d.reads++; d.reads > 1000 {
		return 0, os.ErrClosed
	}
	return 0, errors.New("no packet today")
}

func TestDeviceErrorsAreCountedAndSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, err := GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		tr, err := newTransport(Config{Key: key, Conns: []PacketConn{&sinkConn{}}, Device: &badDevice{}})
		if err != nil {
			t.Fatal(err)
		}
		defer tr.cancel()
		began := time.Now()
		tr.outboundPump(tr.cfg.Device)
		if took := time.Since(began); took < time.Second {
			t.Errorf("1000 errors in %v: the pump burns a core", took)
		}
		if got := tr.drops[DropDeviceRead].Load(); got != 1000 {
			t.Errorf("%d errors of the device counted", got)
		}
	})
}

// A packet that comes to the waiting room when the door has opened goes through it.
func TestWaitingRoomIsNotEnteredTooLate(t *testing.T) {
	o, _, _, _ := joined(t, AES128GCM)
	p := o.t.sortedPeers()[0]
	fill(o, 2, 100)
	if a := o.stage(p, 0, 2); a == nil || a != p.slots.Load().current || len(p.waiting.packets) != 0 {
		t.Errorf("stage returned %v and kept %d packets", a, len(p.waiting.packets))
	}
}

// What has waited through a whole failed handshake is not sent an hour later.
func TestWaitingRoomIsCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := lonePeer(t, "192.0.2.2:2")
		packet := make([]byte, 40)
		for range maxWaitingPackets + 1 {
			p.stageLocked(packet)
		}
		p.dialDone(errNoAnswer)
		if got := len(p.waiting.packets); got != maxWaitingPackets {
			t.Fatalf("%d packets wait after a quick failure", got)
		}
		time.Sleep(defaultHandshakeTimeout + time.Second)
		p.dialDone(errNoAnswer)
		if got := len(p.waiting.packets); got != 0 {
			t.Errorf("%d packets still wait", got)
		}
		if got := p.t.drops[DropNoAssociation].Load(); got != maxWaitingPackets {
			t.Errorf("%d drops counted", got)
		}
		if !p.stageLocked(packet) {
			t.Error("no room for a new packet")
		}
	})
}

// lonePeer is a peer of a Transport without pumps, whose timer does nothing.
func lonePeer(t testing.TB, endpoint string) *peer {
	t.Helper()
	var keys [2]PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = GenerateKey(); err != nil {
			t.Fatal(err)
		}
	}
	conn := &sinkConn{}
	conn.local = netip.MustParseAddrPort("192.0.2.1:1")
	tr, err := newTransport(Config{Key: keys[0], Conns: []PacketConn{conn}, Device: &takeDevice{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tr.cancel)
	p := newPeer(tr, PeerConfig{PublicKey: keys[1].Public(), Endpoint: endpoint})
	p.timer = time.AfterFunc(time.Hour, func() {})
	t.Cleanup(func() { p.timer.Stop() })
	return p
}

// A peer without an endpoint may say goodbye just when it was to be called.
func TestDialOfAPeerThatLeft(t *testing.T) {
	p := lonePeer(t, "")
	if err := p.t.dial(t.Context(), p); !errors.Is(err, errGone) {
		t.Errorf("dial: %v", err)
	}
}
