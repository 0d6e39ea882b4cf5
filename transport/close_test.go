package transport

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// stuckConn is a socket whose send buffer never drains.
type stuckConn struct{ *memConn }

func (c stuckConn) WriteBatch([]Run) (int, error) {
	<-c.closed
	return 0, net.ErrClosed
}

// Close does not wait for a socket that takes nothing.
func TestCloseWhileTheSocketBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newMemNet()
		n := newTestNode(t, "10.0.0.1", Timing{}, stuckConn{net.listen("192.0.2.1:1000")})
		sealing, opening := testKeys(t, AES128GCM)
		for i := range 3 {
			key, err := GenerateKey()
			if err != nil {
				t.Fatal(err)
			}
			if err := n.AddPeer(PeerConfig{PublicKey: key.Public()}); err != nil {
				t.Fatal(err)
			}
			s := completed(false)
			s.sealer, s.opener = sealing, opening
			p := n.peerByKey(key.Public())
			if err := p.install(s, &path{conn: n.conns[0], remote: remoteNumber(i)}); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		n.stop()
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("Close took %v", took)
		}
	})
}

// A resolver that hangs holds nobody up, and a mapped address is what it maps.
func TestResolverThatHangs(t *testing.T) {
	hang := make(chan struct{})
	defer close(hang)
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	other, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	dev := newChanDevice()
	asked := make(chan string, 10)
	n, err := New(Config{
		Key: key, Conns: []PacketConn{newMemNet().listen("192.0.2.1:1000")}, Device: dev,
		ResolveEndpoint: func(endpoint string) ([]netip.AddrPort, error) {
			asked <- endpoint
			if endpoint == "hangs" {
				<-hang
			}
			return []netip.AddrPort{netip.MustParseAddrPort("[::ffff:192.0.2.7]:7")}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := n.resolve(t.Context(), "mapped"); err != nil || got[0] != netip.MustParseAddrPort("192.0.2.7:7") {
		t.Errorf("resolved to %v, %v", got, err)
	}
	<-asked
	if err := n.AddPeer(PeerConfig{PublicKey: other.Public(), Endpoint: "hangs"}); err != nil {
		t.Fatal(err)
	}
	<-asked
	dev.close()
	began := time.Now()
	n.Close()
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("Close took %v", took)
	}
}

// A peer that is removed while it is called leaves its address free.
func TestRemovePeerHangsUp(t *testing.T) {
	net := newMemNet()
	a := newTestNode(t, "10.0.0.1", Timing{}, net.listen("192.0.2.1:1000"))
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.AddPeer(PeerConfig{PublicKey: key.Public(), Endpoint: "192.0.2.2:2000"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the call is under way", func() bool { return a.Status().HalfOpen == 1 })
	if err := a.RemovePeer(key.Public()); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	eventually(t, "the call is over", func() bool { return a.Status().HalfOpen == 0 })
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestConfigIsChecked(t *testing.T) {
	key, err := GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	good := Config{Key: key, Conns: []PacketConn{&sinkConn{}}, Device: &takeDevice{}, Timing: Timing{RekeyAfterRecords: 1 << 40}}
	tr, err := newTransport(good)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.cancel()
	if got := tr.cfg.Timing.RekeyAfterRecords; got >= maxRecords {
		t.Errorf("a rekey after %d records comes too late", got)
	}
	for name, spoil := range map[string]func(*Config){
		"no socket":    func(c *Config) { c.Conns = nil },
		"no device":    func(c *Config) { c.Device = nil },
		"negative MTU": func(c *Config) { c.InnerMTU = -1 },
		"large MTU":    func(c *Config) { c.InnerMTU = MaxInnerMTU + 1 },
		"no suite":     func(c *Config) { c.CipherSuites = []CipherSuite{1} },
	} {
		bad := good
		spoil(&bad)
		if _, err := newTransport(bad); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := tr.AddPeer(PeerConfig{}); err == nil || errors.Is(err, ErrClosed) {
		t.Errorf("AddPeer without a key: %v", err)
	}
	keyless := good
	keyless.Key = PrivateKey{}
	tr, err = newTransport(keyless)
	if err != nil {
		t.Fatal(err)
	}
	defer tr.cancel()
	if err := tr.AddPeer(PeerConfig{PublicKey: key.Public()}); err == nil {
		t.Error("a node without a key takes a static peer")
	}
}
