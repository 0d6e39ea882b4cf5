package transport

import "encoding/binary"

// helloInfo is what a ClientHello says, as far as it matters before there is any
// state for its sender. The slices lie in the datagram that was read.
type helloInfo struct {
	recordSeq   uint64
	messageSeq  uint16 // 0 for the first hello, 1 for the one that echoes a cookie
	random      [32]byte
	sessionID   []byte
	cookie      []byte
	suites      []byte // two bytes each
	compression []byte
}

const (
	maxSessionID = 32 // RFC 5246 7.4.1.2
	// minClientHello is the smallest body of a ClientHello: version, random, empty session ID and
	// cookie, one suite, one compression method.
	minClientHello = 2 + 32 + 1 + 1 + 4 + 2
)

// peekClientHello reads the ClientHello in the first record of a datagram, which it borrows: RFC 5246
// 7.4.1.2 with the cookie of RFC 6347 4.2.1. It allocates nothing and looks at the first record only.
//
// It is strict, as everything that passes costs state: epoch 0, one message that fills
// the record, client version DTLS 1.2, vectors and extensions that fill the
// message exactly, and the null compression. A hello in fragments is refused: reassembly would
// be state for a stranger. Hellos are 150 to 300 bytes; OpenSSL, GnuTLS and pion send them whole.
func peekClientHello(datagram []byte) (hello helloInfo, ok bool) {
	hdr, ok := parseRecordHeader(datagram)
	if !ok || hdr.typ != contentHandshake || hdr.epoch != 0 {
		return helloInfo{}, false
	}
	h, body, rest, ok := nextFragment(datagram[recordHeaderSize : recordHeaderSize+hdr.length])
	if !ok || len(rest) > 0 || h.typ != typeClientHello || h.inHere != h.length || len(body) < minClientHello {
		return helloInfo{}, false
	}
	if binary.BigEndian.Uint16(body) != versionDTLS12 {
		return helloInfo{}, false
	}
	hello = helloInfo{recordSeq: hdr.seq, messageSeq: h.messageSeq, random: [32]byte(body[2:34])}
	v := vectors{rest: body[34:]}
	hello.sessionID = v.short()
	hello.cookie = v.short()
	hello.suites = v.long()
	hello.compression = v.short()
	if v.bad || len(hello.sessionID) > maxSessionID || len(hello.suites) == 0 || len(hello.suites)%2 != 0 {
		return helloInfo{}, false
	}
	if !containsNull(hello.compression) || !wellFormedExtensions(v.rest) {
		return helloInfo{}, false
	}
	return hello, true
}

// peekCookie reads a HelloVerifyRequest (RFC 6347 4.2.1) in the first record of a datagram of
// our own, and returns a copy of its cookie.
func peekCookie(datagram []byte) (cookie []byte, ok bool) {
	hdr, ok := parseRecordHeader(datagram)
	if !ok || hdr.typ != contentHandshake || hdr.epoch != 0 {
		return nil, false
	}
	h, body, _, ok := nextFragment(datagram[recordHeaderSize : recordHeaderSize+hdr.length])
	if !ok || h.typ != typeHelloVerifyRequest || len(body) < 2 {
		return nil, false
	}
	v := vectors{rest: body[2:]}
	taken := v.short()
	return append([]byte(nil), taken...), !v.bad && len(taken) > 0
}

// offers tells whether the hello lists the suite.
func (h *helloInfo) offers(id CipherSuite) bool {
	for s := h.suites; len(s) >= 2; s = s[2:] {
		if CipherSuite(binary.BigEndian.Uint16(s)) == id {
			return true
		}
	}
	return false
}

// vectors reads the length-prefixed vectors of TLS (RFC 5246 4.3). After the first
// that does not fit, bad is set and everything is empty.
type vectors struct {
	rest []byte
	bad  bool
}

func (v *vectors) short() []byte {
	if len(v.rest) < 1 {
		v.bad = true
		return nil
	}
	return v.take(1, int(v.rest[0]))
}

func (v *vectors) long() []byte {
	if len(v.rest) < 2 {
		v.bad = true
		return nil
	}
	return v.take(2, int(binary.BigEndian.Uint16(v.rest)))
}

func (v *vectors) take(prefix, n int) []byte {
	if n > len(v.rest)-prefix {
		v.bad, v.rest = true, nil
		return nil
	}
	taken := v.rest[prefix : prefix+n : prefix+n]
	v.rest = v.rest[prefix+n:]
	return taken
}

func containsNull(compression []byte) bool {
	for _, method := range compression {
		if method == 0 {
			return true
		}
	}
	return false
}

// wellFormedExtensions: nothing at all, or a list that fills b (RFC 5246 7.4.1.4).
func wellFormedExtensions(b []byte) bool {
	if len(b) == 0 {
		return true
	}
	v := vectors{rest: b}
	list := vectors{rest: v.long()}
	if v.bad || len(v.rest) > 0 {
		return false
	}
	for len(list.rest) > 0 {
		if len(list.rest) < 2 {
			return false
		}
		list.rest = list.rest[2:]
		if list.long(); list.bad {
			return false
		}
	}
	return true
}
