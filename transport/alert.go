package transport

import "fmt"

// alert is the body of an alert record (RFC 5246 7.2).
type alert struct {
	level       uint8
	description uint8
}

const (
	alertWarning = 1
	alertFatal   = 2
)

// The descriptions that this package sends or tells apart (RFC 5246 7.2, 7.2.2).
const (
	alertCloseNotify      = 0
	alertHandshakeFailure = 40
	alertBadCertificate   = 42
	alertUserCanceled     = 90
)

// alertSize is the size of the body of an alert in bytes.
const alertSize = 2

// alertNames are the alerts a handshake may end with; the names are those of
// the RFC.
var alertNames = map[uint8]string{
	alertCloseNotify: "close_notify", 10: "unexpected_message", 20: "bad_record_mac",
	alertHandshakeFailure: "handshake_failure", 41: "no_certificate",
	alertBadCertificate: "bad_certificate", 43: "unsupported_certificate",
	44: "certificate_revoked", 45: "certificate_expired", 46: "certificate_unknown",
	47: "illegal_parameter", 48: "unknown_ca", 49: "access_denied", 50: "decode_error",
	51: "decrypt_error", 70: "protocol_version", 71: "insufficient_security",
	80: "internal_error", alertUserCanceled: "user_canceled",
}

// String is the description by its RFC name.
func (a alert) String() string {
	if name, ok := alertNames[a.description]; ok {
		return name
	}
	return fmt.Sprintf("alert %d", a.description)
}

// ends tells whether the sender of the alert is gone: it closed, or it failed.
func (a alert) ends() bool {
	return a.level == alertFatal || a.description == alertCloseNotify
}

// parseAlert reads the plaintext of an alert record, which it borrows.
func parseAlert(plaintext []byte) (alert, bool) {
	if len(plaintext) != alertSize || plaintext[0] != alertWarning && plaintext[0] != alertFatal {
		return alert{}, false
	}
	return alert{plaintext[0], plaintext[1]}, true
}

// sealAlert makes a sealed alert record. It allocates: it is for the end of an association.
// seq is drawn from the same counter as those of data records.
func (k *sealer) sealAlert(a alert, seq uint64) []byte {
	buf := make([]byte, k.overhead()+alertSize)
	copy(buf[k.headroom():], []byte{a.level, a.description})
	return k.seal(buf, contentAlert, seq, new(cryptoScratch))
}

// plainAlert makes an alert record of epoch 0, which nobody can trust: it only
// tells a peer whose handshake cannot succeed to stop waiting.
func plainAlert(a alert, seq uint64) []byte {
	r := make([]byte, 0, recordHeaderSize+alertSize)
	r = appendRecordHeader(r, contentAlert, versionDTLS12, 0, seq, alertSize)
	return append(r, a.level, a.description)
}
