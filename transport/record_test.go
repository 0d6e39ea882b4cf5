package transport

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	pionsuite "github.com/pion/dtls/v2/pkg/crypto/ciphersuite"
	"github.com/pion/dtls/v2/pkg/crypto/prf"
	"github.com/pion/dtls/v2/pkg/protocol"
	"github.com/pion/dtls/v2/pkg/protocol/recordlayer"
	"golang.org/x/crypto/chacha20poly1305"
)

// testKeys makes the two ends of an association from a fixed master secret.
func testKeys(t testing.TB, id CipherSuite) (seal sealer, open opener) {
	t.Helper()
	master := bytes.Repeat([]byte{0x42}, 48)
	clientRandom, serverRandom := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	p := suiteByID(id)
	seal, _, err := p.keys(master, clientRandom, serverRandom, true)
	if err != nil {
		t.Fatal(err)
	}
	_, open, err = p.keys(master, clientRandom, serverRandom, false)
	if err != nil {
		t.Fatal(err)
	}
	return seal, open
}

// sealNew seals a copy of plaintext in a buffer of its own.
func sealNew(k *sealer, typ contentType, seq uint64, plaintext []byte) []byte {
	buf := make([]byte, k.headroom(), k.overhead()+len(plaintext))
	buf = append(append(buf, plaintext...), make([]byte, tagSize)...)
	return k.seal(buf, typ, seq, new(cryptoScratch))
}

func forEachSuite(t *testing.T, test func(t *testing.T, id CipherSuite)) {
	for i := range suites {
		t.Run(suites[i].name, func(t *testing.T) { test(t, suites[i].id) })
	}
}

func TestParseRecordHeader(t *testing.T) {
	header := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, c := range []struct {
		name string
		b    []byte
		want recordHeader
		ok   bool
	}{
		{"empty", nil, recordHeader{}, false},
		{"12 bytes", header("16fefd000000000000000000"), recordHeader{}, false},
		{"empty body", header("16fefd0000000000000000" + "0000"), recordHeader{contentHandshake, versionDTLS12, 0, 0, 0}, true},
		{"DTLS 1.0 hello", header("16feff0000000000000007" + "0001" + "aa"), recordHeader{contentHandshake, versionDTLS10, 0, 7, 1}, true},
		{"48-bit sequence", header("17fefd0001ffffffffffff" + "0002" + "aabb"), recordHeader{contentApplicationData, versionDTLS12, 1, maxSequence, 2}, true},
		{"epoch 65535", header("15fefdffff010203040506" + "0000"), recordHeader{contentAlert, versionDTLS12, 65535, 0x010203040506, 0}, true},
		{"more follows", header("17fefd0001000000000001" + "0001" + "aabbcc"), recordHeader{contentApplicationData, versionDTLS12, 1, 1, 1}, true},
		{"length beyond the datagram", header("17fefd0001000000000001" + "0003" + "aabb"), recordHeader{}, false},
		{"TLS 1.2", header("1703030001000000000001" + "0001" + "aa"), recordHeader{}, false},
		{"DTLS 1.3 number", header("17fefc0001000000000001" + "0001" + "aa"), recordHeader{}, false},
		{"longest body", append(header("17fefd0001000000000001"+"4800"), make([]byte, maxRecordBody)...), recordHeader{contentApplicationData, versionDTLS12, 1, 1, maxRecordBody}, true},
		{"over-long body", append(header("17fefd0001000000000001"+"4801"), make([]byte, maxRecordBody+1)...), recordHeader{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := parseRecordHeader(c.b)
			if got != c.want || ok != c.ok {
				t.Fatalf("got %+v %v, want %+v %v", got, ok, c.want, c.ok)
			}
		})
	}
}

func TestNextRecordWalksADatagram(t *testing.T) {
	seal, _ := testKeys(t, AES128GCM)
	first := sealNew(&seal, contentHandshake, 1, []byte("first"))
	second := sealNew(&seal, contentApplicationData, 2, []byte("the second"))
	datagram := slices.Concat(first, second, []byte("tail that is no record"))

	hdr, record, rest, ok := nextRecord(datagram)
	if !ok || hdr.seq != 1 || !bytes.Equal(record, first) || cap(record) != len(record) {
		t.Fatalf("first record: %+v, %v", hdr, ok)
	}
	hdr, record, rest, ok = nextRecord(rest)
	if !ok || hdr.seq != 2 || !bytes.Equal(record, second) {
		t.Fatalf("second record: %+v, %v", hdr, ok)
	}
	if _, _, _, ok = nextRecord(rest); ok {
		t.Fatal("the tail was taken for a record")
	}
}

func TestSealOpenRoundTrip(t *testing.T) {
	forEachSuite(t, func(t *testing.T, id CipherSuite) {
		seal, open := testKeys(t, id)
		var s cryptoScratch
		for _, size := range []int{0, 1, 15, 16, 17, 1401, maxPlaintext} {
			for _, seq := range []uint64{0, 1, 1<<32 + 5, maxSequence} {
				want := bytes.Repeat([]byte{byte(size)}, size)
				record := sealNew(&seal, contentApplicationData, seq, want)
				if len(record) != size+seal.overhead() {
					t.Fatalf("size %d: record of %d bytes, overhead is %d", size, len(record), seal.overhead())
				}
				hdr, ok := parseRecordHeader(record)
				if !ok || hdr.seq != seq || hdr.epoch != dataEpoch || hdr.typ != contentApplicationData || hdr.version != versionDTLS12 {
					t.Fatalf("size %d seq %d: header %+v %v", size, seq, hdr, ok)
				}
				got, err := open.open(record, hdr, &s)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("size %d seq %d: %v", size, seq, err)
				}
				if cap(got) != len(got) {
					t.Fatalf("size %d: plaintext can be grown over the tag", size)
				}
				if size > 0 && &got[0] != &record[open.headroom()] {
					t.Fatalf("size %d: not opened in place", size)
				}
			}
		}
	})
}

// The explicit nonce is the record's position, never anything random: that is
// what makes a repeated nonce impossible (RFC 5288 3).
func TestGCMNonceIsThePosition(t *testing.T) {
	for _, id := range []CipherSuite{AES128GCM, AES256GCM} {
		seal, _ := testKeys(t, id)
		record := sealNew(&seal, contentApplicationData, 0x010203040506, []byte("x"))
		if got := record[recordHeaderSize:maxHeadroom]; !bytes.Equal(got, record[3:11]) {
			t.Errorf("%v: explicit nonce %x, position %x", id, got, record[3:11])
		}
	}
}

// pion's GCM is somebody else's reading of RFC 5288: each side opens the other's
// records, pion's with their random explicit nonces.
func TestGCMAgainstPion(t *testing.T) {
	for _, id := range []CipherSuite{AES128GCM, AES256GCM} {
		t.Run(id.String(), func(t *testing.T) {
			p := suiteByID(id)
			keys, err := prf.GenerateEncryptionKeys(bytes.Repeat([]byte{0x42}, 48), bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32), 0, p.keyLen, p.ivLen, p.hash)
			if err != nil {
				t.Fatal(err)
			}
			seal, open := testKeys(t, id)
			server, err := pionsuite.NewGCM(keys.ServerWriteKey, keys.ServerWriteIV, keys.ClientWriteKey, keys.ClientWriteIV)
			if err != nil {
				t.Fatal(err)
			}
			client, err := pionsuite.NewGCM(keys.ClientWriteKey, keys.ClientWriteIV, keys.ServerWriteKey, keys.ServerWriteIV)
			if err != nil {
				t.Fatal(err)
			}

			want := []byte("a packet")
			plain, err := server.Decrypt(sealNew(&seal, contentApplicationData, 77, want))
			if err != nil || !bytes.Equal(plain[recordHeaderSize:], want) {
				t.Fatalf("pion opens ours: %q, %v", plain, err)
			}

			layer := &recordlayer.RecordLayer{
				Header:  recordlayer.Header{Epoch: dataEpoch, SequenceNumber: 78, Version: protocol.Version1_2},
				Content: &protocol.ApplicationData{Data: want},
			}
			raw, err := layer.Marshal()
			if err != nil {
				t.Fatal(err)
			}
			record, err := client.Encrypt(layer, raw)
			if err != nil {
				t.Fatal(err)
			}
			hdr, ok := parseRecordHeader(record)
			if !ok {
				t.Fatal("pion's record does not parse")
			}
			got, err := open.open(record, hdr, new(cryptoScratch))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("we open pion's: %q, %v", got, err)
			}
		})
	}
}

// RFC 7905 2, worked by hand: nonce = IV xor (0^32 || epoch || sequence number).
func TestChaChaNonceByHand(t *testing.T) {
	p := suiteByID(ChaCha20Poly1305)
	keys, err := prf.GenerateEncryptionKeys(bytes.Repeat([]byte{0x42}, 48), bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32), 0, p.keyLen, p.ivLen, p.hash)
	if err != nil {
		t.Fatal(err)
	}
	seal, _ := testKeys(t, ChaCha20Poly1305)
	record := sealNew(&seal, contentApplicationData, 0x0102030405, []byte("packet"))

	nonce := bytes.Clone(keys.ClientWriteIV)
	for i, b := range []byte{0, 1, 0, 1, 2, 3, 4, 5} {
		nonce[4+i] ^= b
	}
	aad := []byte{0, 1, 0, 1, 2, 3, 4, 5, 23, 0xfe, 0xfd, 0, 6}
	aead, err := chacha20poly1305.New(keys.ClientWriteKey)
	if err != nil {
		t.Fatal(err)
	}
	if want := aead.Seal(nil, nonce, []byte("packet"), aad); !bytes.Equal(record[recordHeaderSize:], want) {
		t.Fatalf("got %x, want %x", record[recordHeaderSize:], want)
	}
}

// A record with any one bit changed, header included, is refused.
func TestTamperedBitIsRefused(t *testing.T) {
	forEachSuite(t, func(t *testing.T, id CipherSuite) {
		seal, open := testKeys(t, id)
		genuine := sealNew(&seal, contentApplicationData, 9, []byte("forty bytes of plaintext, more or less.."))
		var s cryptoScratch
		for bit := range len(genuine) * 8 {
			record := bytes.Clone(genuine)
			record[bit/8] ^= 1 << (bit % 8)
			hdr, whole, rest, ok := nextRecord(record)
			if !ok || len(rest) > 0 {
				continue // not even a record of this size any more
			}
			if _, err := open.open(whole, hdr, &s); err == nil {
				t.Fatalf("bit %d of byte %d changed, still opened", bit%8, bit/8)
			}
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	forEachSuite(t, func(t *testing.T, id CipherSuite) {
		seal, open := testKeys(t, id)
		var s cryptoScratch
		record := sealNew(&seal, contentApplicationData, 9, []byte("plaintext"))
		hdr, _ := parseRecordHeader(record)

		other := hdr
		other.epoch = 2
		if _, err := open.open(bytes.Clone(record), other, &s); err != errOpen {
			t.Errorf("another epoch: %v", err)
		}
		for n := range record {
			cut := bytes.Clone(record[:n])
			if n >= recordHeaderSize {
				binary.BigEndian.PutUint16(cut[11:13], uint16(n-recordHeaderSize))
			}
			hdr, ok := parseRecordHeader(cut)
			if !ok {
				continue
			}
			if _, err := open.open(cut, hdr, &s); err != errOpen {
				t.Fatalf("cut to %d bytes: %v", n, err)
			}
		}
		own := opener(seal) // the other direction's key
		if _, err := own.open(bytes.Clone(record), hdr, &s); err != nil {
			t.Fatalf("the same key: %v", err)
		}
		_, wrong, err := suiteByID(id).keys(bytes.Repeat([]byte{0x42}, 48), bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32), true)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wrong.open(bytes.Clone(record), hdr, &s); err != errOpen {
			t.Errorf("reflected to its sender: %v", err)
		}
	})
}

func TestSealOpenAllocateNothing(t *testing.T) {
	forEachSuite(t, func(t *testing.T, id CipherSuite) {
		seal, open := testKeys(t, id)
		buf := make([]byte, seal.overhead()+1401)
		s := new(cryptoScratch)
		var seq uint64
		if n := testing.AllocsPerRun(100, func() {
			seq++
			record := seal.seal(buf, contentApplicationData, seq, s)
			hdr, _, _, _ := nextRecord(record)
			if _, err := open.open(record, hdr, s); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Fatalf("%v allocations a record", n)
		}
	})
}

// One sealer and one opener serve several goroutines.
func TestSealOpenConcurrently(t *testing.T) {
	forEachSuite(t, func(t *testing.T, id CipherSuite) {
		seal, open := testKeys(t, id)
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				var s cryptoScratch
				want := bytes.Repeat([]byte{byte(g)}, 300)
				for i := range 200 {
					buf := make([]byte, seal.overhead()+len(want))
					copy(buf[seal.headroom():], want)
					record := seal.seal(buf, contentApplicationData, uint64(g)<<32|uint64(i), &s)
					hdr, _ := parseRecordHeader(record)
					if got, err := open.open(record, hdr, &s); err != nil || !bytes.Equal(got, want) {
						t.Errorf("goroutine %d: %v", g, err)
						return
					}
				}
			})
		}
		wg.Wait()
	})
}

// FuzzParseRecord: records tile the datagram, in order, and their headers are what
// the bytes say, as read by pion's parser.
func FuzzParseRecord(f *testing.F) {
	seal, _ := testKeys(f, AES128GCM)
	one := sealNew(&seal, contentApplicationData, 1, []byte("one"))
	f.Add(one)
	f.Add(slices.Concat(one, sealNew(&seal, contentAlert, 2, []byte{1, 0})))
	f.Add(one[:20])
	f.Add([]byte{22, 0xfe, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, datagram []byte) {
		offset := 0
		for rest := datagram; len(rest) > 0; {
			hdr, record, next, ok := nextRecord(rest)
			if !ok {
				break
			}
			if !bytes.Equal(record, datagram[offset:offset+len(record)]) || len(record) != recordHeaderSize+hdr.length {
				t.Fatalf("record at %d does not tile the datagram", offset)
			}
			offset += len(record)
			if len(next) != len(datagram)-offset {
				t.Fatalf("%d bytes left, want %d", len(next), len(datagram)-offset)
			}
			var theirs recordlayer.Header
			if err := theirs.Unmarshal(record); err != nil {
				t.Fatalf("pion refuses the header: %v", err)
			}
			if uint8(theirs.ContentType) != uint8(hdr.typ) || theirs.Epoch != hdr.epoch || theirs.SequenceNumber != hdr.seq ||
				uint16(theirs.Version.Major)<<8|uint16(theirs.Version.Minor) != hdr.version {
				t.Fatalf("pion reads %+v, we %+v", theirs, hdr)
			}
			rest = next
		}
	})
}

// FuzzOpen: nothing opens but what was sealed, byte for byte.
func FuzzOpen(f *testing.F) {
	const seqs = 4
	genuine := map[string][]byte{}
	type end struct {
		seal sealer
		open opener
	}
	var ends []end
	for i := range suites {
		seal, open := testKeys(f, suites[i].id)
		ends = append(ends, end{seal, open})
		for seq := range uint64(seqs) {
			plaintext := fmt.Appendf(nil, "suite %d record %d", i, seq)
			record := sealNew(&seal, contentApplicationData, seq, plaintext)
			genuine[string(rune(i))+string(record)] = plaintext
			f.Add(uint8(i), record)
		}
	}
	f.Add(uint8(0), []byte{23, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, suite uint8, datagram []byte) {
		i := int(suite) % len(ends)
		hdr, record, _, ok := nextRecord(datagram)
		if !ok {
			return
		}
		want, isGenuine := genuine[string(rune(i))+string(record)]
		got, err := ends[i].open.open(bytes.Clone(record), hdr, new(cryptoScratch))
		if (err == nil) != isGenuine {
			t.Fatalf("genuine %v, opened: %v", isGenuine, err)
		}
		if err == nil && !bytes.Equal(got, want) {
			t.Fatalf("opened to %q, want %q", got, want)
		}
	})
}

// FuzzSealOpen: whatever is sealed opens to the same bytes, and not under another
// sequence number.
func FuzzSealOpen(f *testing.F) {
	f.Add(uint8(0), uint8(contentApplicationData), uint64(1), []byte("packet"))
	f.Add(uint8(2), uint8(contentAlert), uint64(maxSequence), []byte{})
	f.Fuzz(func(t *testing.T, suite, typ uint8, seq uint64, plaintext []byte) {
		if len(plaintext) > maxPlaintext {
			return
		}
		seq &= maxSequence
		seal, open := testKeys(t, suites[int(suite)%len(suites)].id)
		record := sealNew(&seal, contentType(typ), seq, plaintext)
		hdr, ok := parseRecordHeader(record)
		if !ok || hdr.seq != seq || uint8(hdr.typ) != typ {
			t.Fatalf("header %+v %v", hdr, ok)
		}
		moved := bytes.Clone(record)
		moved[10] ^= 1
		movedHdr, _ := parseRecordHeader(moved)
		if _, err := open.open(moved, movedHdr, new(cryptoScratch)); err == nil {
			t.Fatal("opens under another sequence number")
		}
		got, err := open.open(record, hdr, new(cryptoScratch))
		if err != nil || !bytes.Equal(got, plaintext) {
			t.Fatalf("%q, %v", got, err)
		}
	})
}

// 1401 bytes: a packet of the default inner MTU and its type byte.
const benchPlaintext = 1 + DefaultInnerMTU

func benchmarkSuites(b *testing.B, run func(b *testing.B, id CipherSuite)) {
	for i := range suites {
		b.Run("suite="+suites[i].name, func(b *testing.B) {
			b.SetBytes(benchPlaintext)
			b.ReportAllocs()
			run(b, suites[i].id)
		})
	}
}

func BenchmarkSeal(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, id CipherSuite) {
		seal, _ := testKeys(b, id)
		buf := make([]byte, seal.overhead()+benchPlaintext)
		s := new(cryptoScratch)
		var seq uint64
		for b.Loop() {
			seq++
			seal.seal(buf, contentApplicationData, seq, s)
		}
	})
}

// BenchmarkOpen copies the record first, as opening destroys it; the copy is a
// hundredth of the time.
func BenchmarkOpen(b *testing.B) {
	benchmarkSuites(b, func(b *testing.B, id CipherSuite) {
		seal, open := testKeys(b, id)
		plaintext := make([]byte, benchPlaintext)
		for i := range plaintext {
			plaintext[i] = byte(rand.Uint32())
		}
		genuine := sealNew(&seal, contentApplicationData, 1, plaintext)
		record := bytes.Clone(genuine)
		s := new(cryptoScratch)
		for b.Loop() {
			copy(record, genuine)
			hdr, _ := parseRecordHeader(record)
			if _, err := open.open(record, hdr, s); err != nil {
				b.Fatal(err)
			}
		}
	})
}
