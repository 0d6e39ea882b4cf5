package transport

import "encoding/binary"

// handshakeType is the first byte of a handshake message (RFC 5246 7.4, RFC 6347 4.3.2).
type handshakeType uint8

const (
	typeClientHello        handshakeType = 1
	typeServerHello        handshakeType = 2
	typeHelloVerifyRequest handshakeType = 3
	typeServerHelloDone    handshakeType = 14
)

// handshakeHeaderSize is the size of a handshake header in bytes (RFC 6347 4.2.2).
const handshakeHeaderSize = 12

// fragmentHeader is the header of a handshake message or of a fragment of one.
//
//	byte  0     1 .. 3  4    5       6 .. 8           9 .. 11
//	     type   length  message_seq  fragment_offset  fragment_length
type fragmentHeader struct {
	typ            handshakeType
	messageSeq     uint16
	length         int // of the whole message
	offset, inHere int // of the fragment, and its length
}

// nextFragment cuts the first handshake fragment off the body of a record of epoch 0, which
// it borrows. ok is false when the body does not begin with a whole and sensible one.
func nextFragment(body []byte) (h fragmentHeader, fragment, rest []byte, ok bool) {
	if len(body) < handshakeHeaderSize {
		return h, nil, nil, false
	}
	h = fragmentHeader{
		typ:        handshakeType(body[0]),
		length:     uint24(body[1:]),
		messageSeq: binary.BigEndian.Uint16(body[4:6]),
		offset:     uint24(body[6:]),
		inHere:     uint24(body[9:]),
	}
	body = body[handshakeHeaderSize:]
	if h.inHere > len(body) || h.offset+h.inHere > h.length {
		return h, nil, nil, false
	}
	return h, body[:h.inHere], body[h.inHere:], true
}

func uint24(b []byte) int { return int(b[0])<<16 | int(b[1])<<8 | int(b[2]) }

// partOfServerFlight tells whether the records, which it borrows, hold a part of the
// flight from ServerHello to ServerHelloDone, but not all of it (RFC 6347 4.2.4,
// flight 4). A ChangeCipherSpec, as in a resumption, or an alert ends
// the wait.
func partOfServerFlight(records []byte) bool {
	type message struct {
		typ          handshakeType
		length, have int
	}
	messages := map[uint16]*message{}
	for rest := records; len(rest) > 0; {
		hdr, record, next, ok := nextRecord(rest)
		if !ok {
			return false
		}
		rest = next
		if hdr.typ == contentChangeCipherSpec || hdr.typ == contentAlert {
			return false
		}
		if hdr.typ != contentHandshake || hdr.epoch != 0 {
			continue
		}
		for body := record[recordHeaderSize:]; len(body) > 0; {
			h, _, more, ok := nextFragment(body)
			if !ok {
				break
			}
			body = more
			if h.typ == typeHelloVerifyRequest {
				continue
			}
			m := messages[h.messageSeq]
			if m == nil {
				m = &message{typ: h.typ, length: h.length}
				messages[h.messageSeq] = m
			}
			if h.offset <= m.have { // out of order: the next retransmission repairs it
				m.have = max(m.have, h.offset+h.inHere)
			}
		}
	}
	if len(messages) == 0 {
		return false
	}
	for seq, m := range messages {
		if m.typ != typeServerHello {
			continue
		}
		for ; m != nil && m.have == m.length; seq++ {
			if m.typ == typeServerHelloDone {
				return false
			}
			m = messages[seq+1]
		}
	}
	return true
}
