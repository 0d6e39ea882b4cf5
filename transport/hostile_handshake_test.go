package transport

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"
)

// FuzzHandshake changes one datagram of a handshake, in front of which the genuine
// one may still be sent. Somebody on the path may end the handshake, but
// nothing panics, and two sessions are only ever each other's.
//
// patch is read as triples: the offset is that of the first byte modulo the length, times 4,
// plus the second modulo 4; the third byte is combined with what is there.
func FuzzHandshake(f *testing.F) {
	f.Add(uint8(0), false, []byte{})
	f.Add(uint8(0), true, []byte{15, 1, 0xff})                    // the first hello's suites
	f.Add(uint8(1), false, []byte{7, 0, 0x40})                    // the cookie
	f.Add(uint8(3), true, []byte{3, 2, 1, 3, 3, 0xff})            // lengths in the ServerHello
	f.Add(uint8(3), false, []byte{60, 0, 0xff, 100, 0, 1})        // the server's certificate
	f.Add(uint8(4), true, []byte{3, 2, 1, 6, 1, 0x80})            // the client's flight
	f.Add(uint8(4), false, []byte{4, 1, 1, 5, 1, 1, 5, 2, 0x20})  // its fragments
	f.Add(uint8(5), false, []byte{20, 0, 1})                      // the server's Finished
	f.Add(uint8(5), true, []byte{0, 0, 22 ^ 21, 1, 0, 0xff ^ 2})  // turned into an alert
	f.Add(uint8(3), false, []byte{4, 0, 1, 4, 0, 2, 5, 0, 7, 11}) // incomplete triple at the end
	c, clientKey := testHandshaker(f)
	s, serverKey := testHandshaker(f)
	f.Fuzz(func(t *testing.T, victim uint8, alsoGenuine bool, patch []byte) {
		var mu sync.Mutex
		count := 0
		w := newWire(func(_ bool, d []byte) [][]byte {
			mu.Lock()
			defer mu.Unlock()
			count++
			if count-1 != int(victim)%6 {
				return [][]byte{d}
			}
			genuine := bytes.Clone(d)
			for p := patch; len(p) >= 3; p = p[3:] {
				d[(int(p[0])*4+int(p[1])%4)%len(d)] ^= p[2]
			}
			if alsoGenuine {
				return [][]byte{d, genuine}
			}
			return [][]byte{d}
		})
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		client, server, _, _ := shakeBoth(ctx, w, c, s, only(serverKey), only(clientKey))
		if server != nil {
			defer func() { <-server.retire() }()
		}
		if client != nil && server != nil {
			exchange(t, client, server)
		}
	})
}
