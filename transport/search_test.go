package transport

import (
	"net/netip"
	"testing"
	"time"
)

// A pump that looks for the association of a record from an unknown address holds no window while it waits for
// another. Two pumps meet the same associations in another order: after a rekey those of a peer, after AddPeer all.
func TestSearchHoldsOneWindow(t *testing.T) {
	p := lonePeer(t, "192.0.2.2:2")
	p.t.searchList.Store(&[]*peer{p})
	at := &path{conn: p.t.conns[0], remote: netip.MustParseAddrPort("192.0.2.2:2")}
	for range 2 {
		s := completed(true)
		s.sealer, s.opener = testKeys(t, AES128GCM)
		if err := p.install(s, at); err != nil {
			t.Fatal(err)
		}
		p.confirm(p.slots.Load().next)
	}
	s := p.slots.Load()
	s.previous.inMu.Lock() // as another pump would
	stranger := appendRecordHeader(nil, contentApplicationData, versionDTLS12, dataEpoch, 1<<30, 40)
	stranger = append(stranger, make([]byte, 40)...)
	in := newInbound(p.t, p.t.conns[0])
	done := make(chan struct{})
	go func() {
		defer close(done)
		in.message(&Inbound{Buf: stranger, N: len(stranger), SegmentSize: len(stranger), Remote: netip.MustParseAddrPort("198.51.100.9:9")})
	}()
	select {
	case <-done:
		t.Error("it did not come to the second association")
	case <-time.After(100 * time.Millisecond):
	}
	if !s.current.inMu.TryLock() {
		t.Error("it holds the window of the first while it waits for that of the second")
	} else {
		s.current.inMu.Unlock()
	}
	s.previous.inMu.Unlock()
	<-done
}
