package transport

import (
	"crypto/cipher"
	"encoding/binary"
	"errors"
)

// The DTLS 1.2 record layer: RFC 6347 4.1 for the header, RFC 5288 and RFC 7905
// for the nonces, RFC 5246 6.2.3.3 for the additional data.
//
//	byte  0      1   2     3  4    5 ... 10        11 12    13 ... 20
//	     type   version   epoch   48-bit sequence  length   explicit nonce (GCM), ciphertext, tag

// contentType is the first byte of a record (RFC 5246 6.2.1).
type contentType uint8

const (
	contentChangeCipherSpec contentType = 20
	contentAlert            contentType = 21
	contentHandshake        contentType = 22
	contentApplicationData  contentType = 23
)

const (
	// recordHeaderSize is the size of a record header in bytes (RFC 6347 4.1).
	recordHeaderSize = 13
	// explicitNonceSize is the part of a GCM nonce that travels (RFC 5288 3).
	explicitNonceSize = 8
	// maxHeadroom is the room that any suite needs in front of a plaintext. A
	// buffer with this much room can be sealed by every [sealer]: hand it
	// buf[maxHeadroom-sealer.headroom():].
	maxHeadroom = recordHeaderSize + explicitNonceSize
	// tagSize is the size of the authenticator behind a ciphertext, for every suite.
	tagSize = 16

	// maxPlaintext is the largest plaintext of a record (RFC 5246 6.2.1).
	maxPlaintext = 1 << 14
	// maxRecordBody is the largest length field of a genuine record (RFC 5246 6.2.3).
	maxRecordBody = maxPlaintext + 2048

	// maxSequence is the last sequence number of an epoch; it never wraps
	// (RFC 6347 4.1).
	maxSequence = 1<<48 - 1

	// dataEpoch is the epoch of everything sealed: pion knows no renegotiation, so an
	// association begins in epoch 0 and stays in epoch 1.
	dataEpoch = 1

	versionDTLS10 = 0xfeff
	versionDTLS12 = 0xfefd
)

// errOpen: the record is not genuine, was cut short, or belongs to another epoch
// or key. The association survives it; the record is dropped and counted.
var errOpen = errors.New("record does not authenticate")

// recordHeader is the header of a record as it is on the wire.
type recordHeader struct {
	typ     contentType
	version uint16
	epoch   uint16
	seq     uint64 // 48 bits
	length  int    // bytes behind the header
}

// parseRecordHeader reads the header of the record at the start of b, which it
// borrows. It accepts the versions feff (hellos, RFC 6347 4.2.1) and fefd, and
// refuses a record that b does not hold whole or that is longer than RFC 5246 6.2.3 allows.
// The type is not judged.
func parseRecordHeader(b []byte) (recordHeader, bool) {
	if len(b) < recordHeaderSize {
		return recordHeader{}, false
	}
	position := binary.BigEndian.Uint64(b[3:11])
	h := recordHeader{
		typ:     contentType(b[0]),
		version: binary.BigEndian.Uint16(b[1:3]),
		epoch:   uint16(position >> 48),
		seq:     position & maxSequence,
		length:  int(binary.BigEndian.Uint16(b[11:13])),
	}
	if h.version != versionDTLS12 && h.version != versionDTLS10 {
		return recordHeader{}, false
	}
	if h.length > maxRecordBody || h.length > len(b)-recordHeaderSize {
		return recordHeader{}, false
	}
	return h, true
}

// appendRecordHeader appends a header. It is for the records that are not sealed;
// [sealer.seal] writes its own.
func appendRecordHeader(b []byte, typ contentType, version, epoch uint16, seq uint64, length int) []byte {
	b = append(b, byte(typ))
	b = binary.BigEndian.AppendUint16(b, version)
	b = binary.BigEndian.AppendUint64(b, uint64(epoch)<<48|seq&maxSequence)
	return binary.BigEndian.AppendUint16(b, uint16(length))
}

// nextRecord cuts the first record off a datagram: record is header and body,
// rest what follows. Both lie in datagram, record is cut at full capacity. With ok
// false the rest of the datagram is not made of records and is to be dropped.
//
//	for rest := datagram; len(rest) > 0; {
//		var record []byte
//		if hdr, record, rest, ok = nextRecord(rest); !ok { break }
//	}
func nextRecord(datagram []byte) (hdr recordHeader, record, rest []byte, ok bool) {
	hdr, ok = parseRecordHeader(datagram)
	if !ok {
		return hdr, nil, nil, false
	}
	n := recordHeaderSize + hdr.length
	return hdr, datagram[:n:n], datagram[n:], true
}

// cryptoScratch is the nonce and the additional data of the record at hand. AEADs
// are called through an interface, so these would be allocated for each record
// if they lived on the stack. Every goroutine that seals or opens owns one.
type cryptoScratch struct {
	nonce [12]byte
	aad   [13]byte
}

// recordKey is one direction of an association: the AEAD, its fixed nonce part and
// the way the two make a nonce. It never changes, so any number of goroutines may use
// it, each with a scratch of its own.
type recordKey struct {
	aead cipher.AEAD
	// iv is the salt of GCM in iv[:4] (RFC 5288 3), or the whole IV of
	// ChaCha20-Poly1305 (RFC 7905 2).
	iv [12]byte
	// explicit: 8 bytes of nonce travel in front of the ciphertext (GCM).
	explicit bool
	epoch    uint16
}

// headroom is the number of bytes a record has in front of its ciphertext: 21 with
// GCM, 13 with ChaCha20-Poly1305.
func (k *recordKey) headroom() int {
	if k.explicit {
		return recordHeaderSize + explicitNonceSize
	}
	return recordHeaderSize
}

// overhead is what a record adds to its plaintext in bytes, header and tag
// included: 37 with GCM, 29 with ChaCha20-Poly1305.
func (k *recordKey) overhead() int { return k.headroom() + tagSize }

// setAAD prepares the additional data of RFC 5246 6.2.3.3: epoch, sequence number, type,
// version, length of the plaintext.
func (s *cryptoScratch) setAAD(position uint64, typ contentType, version uint16, plaintext int) {
	binary.BigEndian.PutUint64(s.aad[0:8], position)
	s.aad[8] = byte(typ)
	binary.BigEndian.PutUint16(s.aad[9:11], version)
	binary.BigEndian.PutUint16(s.aad[11:13], uint16(plaintext))
}

// setCounterNonce prepares the nonce of ChaCha20-Poly1305: the IV, its last 8 bytes
// combined with epoch and sequence number (RFC 7905 2).
func (s *cryptoScratch) setCounterNonce(iv *[12]byte, position uint64) {
	s.nonce = *iv
	tail := s.nonce[4:12]
	binary.BigEndian.PutUint64(tail, binary.BigEndian.Uint64(tail)^position)
}

// sealer makes records: the outbound direction of an association.
type sealer struct{ recordKey }

// opener opens records: the inbound direction of an association.
type opener struct{ recordKey }

// seal turns buf into one record, in place, and returns it: all of buf, cut at full capacity.
// It borrows buf. The plaintext, at most [maxPlaintext] bytes, already lies at
// buf[headroom():len(buf)-tagSize]; the bytes around it are overwritten.
//
// A sequence number must never be used twice with one sealer, not even for
// another type: the nonce is made of it (RFC 5288 3, RFC 7905 2), and a repeated
// nonce gives the authentication key away. The caller draws seq from one counter
// that begins at [agreement.nextSeq].
func (k *sealer) seal(buf []byte, typ contentType, seq uint64, s *cryptoScratch) []byte {
	head := k.headroom()
	plaintext := buf[head : len(buf)-tagSize]
	position := uint64(k.epoch)<<48 | seq&maxSequence

	buf[0] = byte(typ)
	binary.BigEndian.PutUint16(buf[1:3], versionDTLS12)
	binary.BigEndian.PutUint64(buf[3:11], position)
	binary.BigEndian.PutUint16(buf[11:13], uint16(len(buf)-recordHeaderSize))

	if k.explicit {
		binary.BigEndian.PutUint64(buf[recordHeaderSize:maxHeadroom], position)
		copy(s.nonce[:4], k.iv[:4])
		binary.BigEndian.PutUint64(s.nonce[4:], position)
	} else {
		s.setCounterNonce(&k.iv, position)
	}
	s.setAAD(position, typ, versionDTLS12, len(plaintext))
	k.aead.Seal(plaintext[:0], s.nonce[:], plaintext, s.aad[:])
	return buf[:len(buf):len(buf)]
}

// open authenticates and decrypts the record in place and returns its plaintext, which
// lies inside record and is cut at full capacity. hdr is what [parseRecordHeader]
// read from record. It borrows record. The replay window is the caller's business.
//
// On failure the body of the record is lost: the AEADs clear what they decrypted. While two
// keys may fit, as during a rekey, try the likelier one on a copy.
//
// The explicit nonce of GCM is taken from the wire, as a peer may choose it in
// any way (RFC 5288 3); the sequence number is authenticated all the same.
func (k *opener) open(record []byte, hdr recordHeader, s *cryptoScratch) ([]byte, error) {
	head := k.headroom()
	if hdr.epoch != k.epoch || hdr.length != len(record)-recordHeaderSize || len(record) < head+tagSize {
		return nil, errOpen
	}
	position := uint64(hdr.epoch)<<48 | hdr.seq
	if k.explicit {
		copy(s.nonce[:4], k.iv[:4])
		copy(s.nonce[4:], record[recordHeaderSize:maxHeadroom])
	} else {
		s.setCounterNonce(&k.iv, position)
	}
	body := record[head:]
	s.setAAD(position, hdr.typ, hdr.version, len(body)-tagSize)
	plaintext, err := k.aead.Open(body[:0], s.nonce[:], body, s.aad[:])
	if err != nil {
		return nil, errOpen
	}
	return plaintext[:len(plaintext):len(plaintext)], nil
}
