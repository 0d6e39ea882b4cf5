package gateway

import (
	"context"
	"errors"
	"net/netip"
	"unicode"
	"unicode/utf8"
)

// Users knows who may come in. [UserFile] is one; a program may have another, over LDAP say.
// All methods may be called from any goroutine, and are to honour ctx.
type Users interface {
	// Password finds the user of a name and checks a password. It returns [ErrDenied] for an unknown
	// user, a wrong password and a user who may not come in, after the same time: who asks is not to learn which.
	// [ErrBusy] asks to try later. Any other error is a failure of the service, and is not held
	// against who asks.
	Password(ctx context.Context, name, password string) (*User, error)

	// User finds the user of a name who has shown in another way that he is that one, by a
	// certificate or a session's cookie; [ErrDenied] if there is none, or he may not come in. A
	// session is checked like this once a minute, and ended by ErrDenied.
	User(ctx context.Context, name string) (*User, error)
}

// A Reserver is a [Users] that knows which addresses belong to somebody: they are given to
// nobody else.
type Reserver interface {
	// Reserved tells whether a is the static address of a user other than name.
	Reserved(a netip.Addr, name string) bool
}

// A User is somebody who may come in.
type User struct {
	Name string
	// Groups are those that the user is in, by name, the one he gets if he does not choose first. Empty:
	// the configuration's default, and every group without Members.
	Groups []string
	// Addresses are static: at most one of each family.
	Addresses []netip.Addr
	// Secret is that of the TOTP code (RFC 6238), in base32; empty: none is asked for.
	Secret string
}

var (
	// ErrDenied: wrong name or password or code, or not allowed.
	ErrDenied = errors.New("gateway: access denied")
	// ErrBusy: too many passwords are being checked.
	ErrBusy = errors.New("gateway: too many sign-ins at once")
)

// maxName is the longest name of a user or group, in bytes.
const maxName = 128

// CheckName says what is wrong with the name of a user; "" when it is good. It may
// have any letters, but neither colons nor spaces nor what cannot be printed.
func CheckName(name string) string {
	switch {
	case name == "":
		return "is empty"
	case len(name) > maxName:
		return "is too long"
	case !utf8.ValidString(name):
		return "is not UTF-8"
	case name[0] == '#':
		return "begins with #"
	}
	for _, c := range name {
		if c == ':' || c == '/' || unicode.IsSpace(c) || !unicode.IsPrint(c) {
			return "has a colon, a slash, a space or what cannot be printed in it"
		}
	}
	return ""
}
