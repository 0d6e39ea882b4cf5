package transport

import (
	"context"
	"crypto/sha512"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v2"
	"github.com/pion/dtls/v2/pkg/protocol"
	"github.com/pion/dtls/v2/pkg/protocol/recordlayer"
)

func TestDefaultSuites(t *testing.T) {
	order := defaultSuites()
	sorted := slices.Clone(order)
	slices.Sort(sorted)
	if !slices.Equal(sorted, []CipherSuite{AES128GCM, AES256GCM, ChaCha20Poly1305}) {
		t.Fatalf("%v", order)
	}
	if (order[0] == ChaCha20Poly1305) == hasAESGCM() {
		t.Fatalf("%v with hasAESGCM %v", order, hasAESGCM())
	}
}

func TestSuiteNames(t *testing.T) {
	if s := ChaCha20Poly1305.String(); s != "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256" {
		t.Error(s)
	}
	if s := CipherSuite(0x1301).String(); s != "0x1301" {
		t.Error(s)
	}
}

// A suite pion lacks, with a pre-shared key, is one more row: RFC 5487's
// TLS_PSK_WITH_AES_256_GCM_SHA384.
func TestPSKSuiteIsARow(t *testing.T) {
	noLeaks(t)
	row := &suiteParams{0x00A9, "TLS_PSK_WITH_AES_256_GCM_SHA384", 32, 4, sha512.New384, newAESGCM, true}
	w := newWire(nil)
	captures := map[bool]*suiteCapture{true: new(suiteCapture), false: new(suiteCapture)}
	config := func(isClient bool) *dtls.Config {
		return &dtls.Config{
			CipherSuites: []dtls.CipherSuiteID{},
			CustomCipherSuites: func() []dtls.CipherSuite {
				return []dtls.CipherSuite{&customSuite{params: row, capture: captures[isClient]}}
			},
			PSK:             func([]byte) ([]byte, error) { return []byte("a shared key of some length"), nil },
			PSKIdentityHint: []byte("psk"),
			FlightInterval:  50 * time.Millisecond,
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	var client, server *dtls.Conn
	var err1, err2 error
	var wg sync.WaitGroup
	wg.Go(func() { server, err1 = dtls.ServerWithContext(ctx, w.server, config(false)) })
	wg.Go(func() { client, err2 = dtls.ClientWithContext(ctx, w.client, config(true)) })
	wg.Wait()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	exchange(t, newAgreement(captures[true].keys.Load(), PublicKey{}, true, client, w.client),
		newAgreement(captures[false].keys.Load(), PublicKey{}, false, server, w.server))
	w.client.mute()
	w.server.mute()
	client.Close()
	server.Close()
}

// Before it has keys a custom suite refuses, and it never changes what it is given to open.
func TestCustomSuiteRefuses(t *testing.T) {
	suite := customSuites([]CipherSuite{ChaCha20Poly1305}, new(suiteCapture))[0]
	layer := &recordlayer.RecordLayer{Header: recordlayer.Header{Epoch: 1}, Content: &protocol.ApplicationData{}}
	if _, err := suite.Encrypt(layer, make([]byte, recordHeaderSize)); err == nil || suite.IsInitialized() {
		t.Error("sealed without keys")
	}
	seal, _ := testKeys(t, ChaCha20Poly1305)
	record := sealNew(&seal, contentHandshake, 0, []byte("finished"))
	if _, err := suite.Decrypt(record); err == nil {
		t.Error("opened without keys")
	}
	if err := suite.Init(slices.Repeat([]byte{0x42}, 48), slices.Repeat([]byte{1}, 32), slices.Repeat([]byte{2}, 32), false); err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{nil, record[:20], append(slices.Clone(record), 1)} {
		if _, err := suite.Decrypt(bad); err == nil {
			t.Errorf("%x opened", bad)
		}
	}
	before := slices.Clone(record)
	got, err := suite.Decrypt(record)
	if err != nil || string(got[recordHeaderSize:]) != "finished" {
		t.Fatalf("%q, %v", got, err)
	}
	if !slices.Equal(before, record) {
		t.Error("the record was changed")
	}
	layer.Header.Epoch = 2
	if _, err := suite.Encrypt(layer, make([]byte, recordHeaderSize)); err == nil {
		t.Error("sealed for another epoch")
	}
}
