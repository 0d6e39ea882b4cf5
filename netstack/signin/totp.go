package signin

import (
	"context"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/pquerna/otp"
	"github.com/pquerna/otp/totp"
)

// TOTP makes one-time codes (RFC 6238) from a secret.
type TOTP struct {
	secret string // base32
	opts   totp.ValidateOpts

	mu   sync.Mutex
	last string // code: servers accept each one once
}

// ParseTOTP reads a secret: base32 as sites show it, with or without the "base32:" that openconnect wants;
// "0x" and hexadecimal digits; or an otpauth://totp/ URL, which can ask for other than 6 digits, 30 s and
// SHA-1. The error does not show the secret.
func ParseTOTP(text string) (*TOTP, error) {
	text = strings.TrimSpace(text)
	t := &TOTP{opts: totp.ValidateOpts{Period: 30, Digits: otp.DigitsSix, Algorithm: otp.AlgorithmSHA1}}
	wrong := errors.New("no secret of one-time codes: expected base32, 0x and hexadecimal digits, or an otpauth:// URL")
	switch {
	case strings.HasPrefix(text, "otpauth://"):
		key, err := otp.NewKeyFromURL(text)
		if err != nil || key.Type() != "totp" {
			return nil, fmt.Errorf("%w of type totp", wrong)
		}
		text, t.opts.Digits, t.opts.Algorithm = key.Secret(), key.Digits(), key.Algorithm()
		if p := key.Period(); p > 0 {
			t.opts.Period = uint(p)
		}
	case strings.HasPrefix(text, "0x"):
		raw, err := hex.DecodeString(text[2:])
		if err != nil {
			return nil, wrong
		}
		text = base32.StdEncoding.EncodeToString(raw)
	}
	text = strings.TrimPrefix(text, "base32:")
	t.secret = strings.ToUpper(strings.NewReplacer(" ", "", "-", "", "=", "").Replace(text))
	if t.secret == "" {
		return nil, wrong
	}
	if _, err := totp.GenerateCodeCustom(t.secret, now(), t.opts); err != nil {
		return nil, wrong
	}
	return t, nil
}

// code makes the code of now. If that has been used already it waits for the next one.
func (t *TOTP) code(ctx context.Context) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		at := now()
		code, err := totp.GenerateCodeCustom(t.secret, at, t.opts)
		if err != nil {
			return "", err
		}
		if code != t.last {
			t.last = code
			return code, nil
		}
		period := time.Duration(t.opts.Period) * time.Second
		next := time.NewTimer(period - time.Duration(at.UnixNano())%period)
		select {
		case <-ctx.Done():
			next.Stop()
			return "", ctx.Err()
		case <-next.C:
		}
	}
}
