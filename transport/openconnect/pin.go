package openconnect

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"strings"
)

// pinPrefix is the only kind of pin that is taken: openconnect's older ones are hashes
// by SHA-1, or hex that it lets people cut off after four digits.
const pinPrefix = "pin-sha256:"

// Pin names a certificate's key as openconnect prints and takes it (--servercert):
// pin-sha256: and the base64 of the SHA-256 of the SubjectPublicKeyInfo, as in RFC 7469.
func Pin(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.RawSubjectPublicKeyInfo)
	return pinPrefix + base64.StdEncoding.EncodeToString(sum[:])
}

// CheckPin says what is wrong with a pin's form; nil when nothing is.
func CheckPin(pin string) error {
	sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(pin, pinPrefix))
	if err != nil || len(sum) != sha256.Size || !strings.HasPrefix(pin, pinPrefix) {
		return malformed("pin %.80q: expected pin-sha256: and 44 characters of base64", pin)
	}
	return nil
}

// samePin compares pins whole.
func samePin(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
