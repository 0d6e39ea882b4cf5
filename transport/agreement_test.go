package transport

import (
	"bytes"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// serverFirst shakes hands over w so that the last datagram of the server is held back: the server
// has an agreement, the client waits for the Finished.
func lossyFinished(t *testing.T, lost int) (client, server *agreement, sent *atomic.Int64) {
	t.Helper()
	sent = new(atomic.Int64)
	var mu sync.Mutex
	w := newWire(func(fromClient bool, d []byte) [][]byte {
		mu.Lock()
		defer mu.Unlock()
		if !fromClient {
			sent.Add(1)
			if hasEpoch1(d) && lost > 0 {
				lost--
				return nil
			}
		}
		return [][]byte{d}
	})
	c, clientKey := testHandshaker(t)
	s, serverKey := testHandshaker(t)
	client, server, err1, err2 := shake(t, w, c, s, only(serverKey), only(clientKey))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	return client, server, sent
}

func hasEpoch1(datagram []byte) bool {
	for rest := datagram; len(rest) > 0; {
		hdr, _, next, ok := nextRecord(rest)
		if !ok {
			return false
		}
		if hdr.epoch == 1 {
			return true
		}
		rest = next
	}
	return false
}

// RFC 6347 4.2.4: the server answers a repeated Finished with its own, until it is
// retired; each repetition takes a sequence number below ours.
func TestServerRepeatsItsFinished(t *testing.T) {
	noLeaks(t)
	client, server, _ := lossyFinished(t, 3)
	if server.nextSeq != 1+finishedGap {
		t.Fatalf("next sequence number %d", server.nextSeq)
	}
	server.conn.mu.Lock()
	used := server.conn.nextSeq
	server.conn.mu.Unlock()
	if used < 2 || used > server.nextSeq {
		t.Fatalf("pion used %d sequence numbers", used)
	}
	exchange(t, client, server)
}

// A server whose client never says a word lets go of pion in the end.
func TestServerRetiresByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, clientKey := testHandshaker(t)
		s, serverKey := testHandshaker(t)
		client, server, err1, err2 := shakeBoth(t.Context(), newWire(nil), c, s, only(serverKey), only(clientKey))
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		select {
		case <-client.retired:
		default:
			t.Error("the client was not retired from the start")
		}
		time.Sleep(lastFlightTime - time.Second)
		synctest.Wait()
		select {
		case <-server.retired:
			t.Error("the server retired early")
		default:
		}
		time.Sleep(2 * time.Second)
		<-server.retired
	})
}

// After the handshake nothing that is not sealed can make pion speak, and what pion says
// on its way out stays inside.
func TestEstablishedSessionIsQuiet(t *testing.T) {
	noLeaks(t)
	_, server, sent := lossyFinished(t, 0)
	before := sent.Load()
	fatal := plainAlert(alert{alertFatal, alertHandshakeFailure}, 1<<30)
	forged := appendRecordHeader(nil, contentHandshake, versionDTLS12, 0, 1<<30, handshakeHeaderSize)
	forged = append(forged, make([]byte, handshakeHeaderSize)...)
	badCCS := append(appendRecordHeader(nil, contentChangeCipherSpec, versionDTLS12, 0, 1<<30, 1), 9)
	for _, d := range [][]byte{fatal, forged, badCCS} {
		if server.conn.push(d) {
			t.Errorf("%x was taken", d)
		}
	}
	// Sealed, so it may pass the door, but not the lock.
	sealedForgery := append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 1, 1<<30, 48), make([]byte, 48)...)
	if !server.conn.push(sealedForgery) {
		t.Error("a sealed handshake record was refused")
	}
	time.Sleep(3 * 50 * time.Millisecond) // three flight intervals
	<-server.retire()
	<-server.retire()
	if n := sent.Load(); n != before {
		t.Fatalf("%d datagrams left", n-before)
	}
	if server.conn.push(sealedForgery) {
		t.Error("a retired agreement takes records")
	}
}

// pion may not seal with a sequence number that is ours, however often it is asked.
func TestSequenceNumbersBeyondTheGapStayOurs(t *testing.T) {
	var sent int
	w := newWire(func(bool, []byte) [][]byte { sent++; return nil })
	finished := func(seq uint64) []byte {
		return append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 1, seq, 4), 1, 2, 3, 4)
	}
	mustWrite := func(d []byte) {
		if n, err := w.server.Write(d); err != nil || n != len(d) {
			t.Fatal(n, err)
		}
	}
	mustWrite(finished(0))
	if first := w.server.establish(finishedGap); first != 257 {
		t.Fatalf("first number of ours: %d", first)
	}
	mustWrite(finished(256))
	if sent != 2 {
		t.Fatalf("%d sent, want both", sent)
	}
	mustWrite(finished(257))
	mustWrite(append(appendRecordHeader(nil, contentAlert, versionDTLS12, 1, 5, 2), 1, 0))
	if sent != 2 {
		t.Fatal("pion sent an alert, or sealed with a number of ours")
	}
}

// What a peer sends the moment it has our Finished is not lost, though the engine has no agreement yet.
func TestEarlyRecordsAreKept(t *testing.T) {
	noLeaks(t)
	record := func(seq uint64) []byte {
		return append(appendRecordHeader(nil, contentApplicationData, versionDTLS12, 1, seq, 40), make([]byte, 40)...)
	}
	before := record(1)
	var w *wire
	w = newWire(func(fromClient bool, d []byte) [][]byte {
		if fromClient {
			return [][]byte{before, d} // until our Finished has left, nobody may fill the queue
		}
		if hasEpoch1(d) {
			w.server.push(record(2))
			w.server.push(bytes.Join([][]byte{record(3), record(4)}, nil))
		}
		return [][]byte{d}
	})
	c, clientKey := testHandshaker(t)
	s, serverKey := testHandshaker(t)
	_, server, err1, err2 := shake(t, w, c, s, only(serverKey), only(clientKey))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	<-server.retire()
	w.server.push(record(5)) // still before the engine took over
	early := server.takeEarly()
	if len(early) != 4 {
		t.Fatalf("%d early records, want 4", len(early))
	}
	for i, r := range early {
		if hdr, _ := parseRecordHeader(r); hdr.seq != uint64(i+2) {
			t.Errorf("record %d has number %d", i, hdr.seq)
		}
	}
	if w.server.push(record(6)) || len(server.takeEarly()) != 0 {
		t.Error("kept after the take-over")
	}
}

func TestEarlyRecordsAreBounded(t *testing.T) {
	w := newWire(func(bool, []byte) [][]byte { return nil })
	if _, err := w.client.Write(append(appendRecordHeader(nil, contentHandshake, versionDTLS12, 1, 0, 1), 1)); err != nil {
		t.Fatal(err)
	}
	record := append(appendRecordHeader(nil, contentApplicationData, versionDTLS12, 1, 1, 1000), make([]byte, 1000)...)
	taken := 0
	for range 1000 {
		if w.client.push(record) {
			taken++
		}
	}
	if taken == 0 || taken > maxEarlyBytes/len(record) {
		t.Fatalf("%d records of %d bytes kept", taken, len(record))
	}
}

func TestAlerts(t *testing.T) {
	seal, open := testKeys(t, AES128GCM)
	record := seal.sealAlert(alert{alertWarning, alertCloseNotify}, 300)
	hdr, ok := parseRecordHeader(record)
	if !ok || hdr.typ != contentAlert || hdr.seq != 300 {
		t.Fatalf("%+v %v", hdr, ok)
	}
	plaintext, err := open.open(record, hdr, new(cryptoScratch))
	if err != nil {
		t.Fatal(err)
	}
	a, ok := parseAlert(plaintext)
	if !ok || a != (alert{1, 0}) || !a.ends() || a.String() != "close_notify" {
		t.Fatalf("%+v %v", a, ok)
	}
	for _, bad := range [][]byte{nil, {1}, {0, 0}, {3, 0}, {2, 40, 0}} {
		if _, ok := parseAlert(bad); ok {
			t.Errorf("%x parses", bad)
		}
	}
	if (alert{alertWarning, 100}).ends() {
		t.Error("no_renegotiation ends an association")
	}
}
