package gateway

import (
	"context"
	"crypto/subtle"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/pquerna/otp"
	"github.com/pquerna/otp/hotp"
	"github.com/pquerna/otp/totp"
)

// NewSecret makes a secret for [UserEntry] and the otpauth URI by which a phone takes it over.
func NewSecret(issuer, user string) (secret, uri string, err error) {
	k, err := totp.Generate(totp.GenerateOpts{Issuer: issuer, AccountName: user})
	if err != nil {
		return "", "", err
	}
	return k.Secret(), k.URL(), nil
}

const (
	totpPeriod = 30 // seconds; what every authenticator does (RFC 6238 4.1)
	totpSkew   = 1  // steps that a clock may be off (RFC 6238 5.2)
)

// checkCode checks the code of a user. Each is good once (RFC 6238 5.2), on all servers that
// share the store. It returns ErrDenied for a wrong one.
func checkCode(ctx context.Context, store Store, user *User, code string, now time.Time) error {
	step, ok := stepOf(user.Secret, strings.TrimSpace(code), now)
	if !ok {
		return ErrDenied
	}
	key := "totp/" + user.Name
	old, err := store.Get(ctx, key)
	if err != nil {
		return storeError(err)
	}
	if last, err := strconv.ParseInt(string(old), 10, 64); err == nil && step <= last {
		return ErrDenied
	}
	err = store.Update(ctx, Change{Key: key, Old: old, New: strconv.AppendInt(nil, step, 10), TTL: 10 * totpPeriod * time.Second})
	if errors.Is(err, ErrConflict) {
		return ErrDenied // the same code, a moment before
	}
	return err
}

// stepOf finds the time step that code is of. It looks at all that it may be.
func stepOf(secret, code string, now time.Time) (step int64, ok bool) {
	current := now.Unix() / totpPeriod
	for s := current - totpSkew; s <= current+totpSkew; s++ {
		want, err := hotp.GenerateCodeCustom(secret, uint64(s), hotp.ValidateOpts{Digits: otp.DigitsSix, Algorithm: otp.AlgorithmSHA1})
		if err == nil && subtle.ConstantTimeCompare([]byte(want), []byte(code)) == 1 {
			step, ok = s, true
		}
	}
	return step, ok
}
