package signin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// Options say how to sign in, and what is known beforehand.
type Options struct {
	Dialer
	Server string // https://HOST[:PORT][/GROUP]
	Group  string // chosen where the server offers groups
	User   string // empty: is asked for

	// Given returns what was given for the n-th secret of a sign-in, counted from 0: the password, a second factor.
	// ok is false when nothing was. nil: nothing was given.
	Given func(ctx context.Context, n int) (answer string, ok bool, err error)
	// TOTP makes one-time codes; nil: they are given or asked for.
	TOTP *TOTP
	// Ask asks the user. nil: there is nobody to be asked, and what was not given is missing, see
	// [MissingError].
	Ask func(ctx context.Context, q Question) (string, error)
}

// MissingError: the server asks for what was not given, and there is nobody to be asked.
type MissingError struct {
	What   Missing
	Label  string   // the server's word for it
	Offers []string // of a choice
}

// Missing is a kind of answer.
type Missing string

// The kinds of answers.
const (
	MissingUser     Missing = "user name"
	MissingPassword Missing = "password"
	MissingFactor   Missing = "second factor"
	MissingGroup    Missing = "group"
	MissingOther    Missing = "field"
)

// Error implements error.
func (e *MissingError) Error() string {
	s := fmt.Sprintf("the server asks for a %s (%q), and there is nobody to ask", e.What, e.Label)
	if len(e.Offers) > 0 {
		s += "; it offers " + strings.Join(e.Offers, ", ")
	}
	return s
}

// A Session signs in, and in again.
type Session struct {
	o Options

	mu    sync.Mutex        // one sign-in at a time
	known map[string]string // what the user has answered, by the question's key, once it has led in
}

// New makes a Session. It calls nobody.
func New(o Options) *Session {
	return &Session{o: o, known: map[string]string{}}
}

// SignIn signs in. Errors are those of openconnect.SignIn, *[MissingError]s, and those of Options.Ask and
// Options.Given.
func (s *Session) SignIn(ctx context.Context) (*Login, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := &attempt{s: s, answers: map[string]string{}, numbers: map[string]int{}}
	login, err := openconnect.SignIn(ctx, openconnect.Options{
		Dialer: s.o.Dialer, Server: s.o.Server, Group: s.o.Group, Prompt: a.answer,
	})
	if err != nil {
		return nil, err
	}
	for key, answer := range a.answers {
		s.known[key] = answer
	}
	return login, nil
}

// Unattended makes what comes later ask nobody.
func (s *Session) Unattended() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.o.Ask = nil
}

// An attempt is one sign-in.
type attempt struct {
	s       *Session
	answers map[string]string // the user's
	numbers map[string]int    // of the secrets, by question
}

// Names that the protocol has for fields.
const (
	fieldUser   = "username"
	fieldGroup  = "group_list"
	fieldFactor = "secondary_password"
	formFactor  = "challenge"
)

// errAgain: what was given beforehand was not accepted, and the same again would not be.
var errAgain = errors.New("what was given beforehand was not accepted")

// answer answers one question.
func (a *attempt) answer(ctx context.Context, q Question) (string, error) {
	given, ok, err := a.given(ctx, q)
	if err != nil {
		return "", err
	}
	if ok && q.Try == 0 {
		return given, nil
	}
	if ok && q.Field.Kind != Password {
		// It may well be the password that was wrong.
		return given, nil
	}
	if a.s.o.Ask == nil {
		if ok {
			return "", &openconnect.DeniedError{Reason: refusal(q.Form)}
		}
		return "", a.missing(q)
	}
	answer, err := a.s.o.Ask(ctx, q)
	if err != nil {
		return "", err
	}
	if !a.isFactor(q) { // a code is good once
		a.answers[a.key(q)] = answer
	}
	return answer, nil
}

// refusal is what the server says of answers that it has not accepted.
func refusal(f *openconnect.Form) string {
	for _, text := range []string{f.Error, f.Message} {
		if text = strings.TrimSpace(text); text != "" {
			return strings.Join(strings.Fields(text), " ")
		}
	}
	return errAgain.Error()
}

// given looks for an answer that needs nobody.
func (a *attempt) given(ctx context.Context, q Question) (answer string, ok bool, err error) {
	o := &a.s.o
	switch {
	case q.Field.Name == fieldUser && o.User != "":
		return o.User, true, nil
	case q.Field.Kind == Password && a.isFactor(q) && o.TOTP != nil:
		if q.Try > 0 {
			return "", true, nil // another one would be as wrong
		}
		answer, err = o.TOTP.code(ctx)
		return answer, err == nil, err
	case q.Field.Kind == Password && o.Given != nil:
		if answer, ok, err = o.Given(ctx, a.number(q)); ok || err != nil {
			return answer, ok, err
		}
	}
	answer, ok = a.s.known[a.key(q)]
	return answer, ok, nil
}

// number counts the secrets of a sign-in. A server that asks for the same again asks for the same number.
func (a *attempt) number(q Question) int {
	key := a.key(q)
	n, seen := a.numbers[key]
	if !seen {
		n = len(a.numbers)
		a.numbers[key] = n
	}
	return n
}

// isFactor tells whether a secret is a second one.
func (a *attempt) isFactor(q Question) bool {
	if q.Field.Kind != Password {
		return false
	}
	return q.Field.Name == fieldFactor || q.Form.ID == formFactor || a.number(q) > 0
}

// key tells questions apart. ocserv asks for password and code in forms that differ in their message alone, and
// puts "Login failed." on a line before it.
func (a *attempt) key(q Question) string {
	message := q.Form.Message[strings.LastIndexByte(q.Form.Message, '\n')+1:]
	return strings.Join([]string{q.Form.ID, message, q.Field.Name, q.Field.Label}, "\x00")
}

func (a *attempt) missing(q Question) error {
	e := &MissingError{What: MissingOther, Label: strings.TrimRight(q.Field.Label, ": ")}
	if e.Label == "" {
		e.Label = q.Field.Name
	}
	for _, o := range q.Field.Options {
		e.Offers = append(e.Offers, o.Value)
	}
	switch {
	case q.Field.Name == fieldUser:
		e.What = MissingUser
	case q.Field.Name == fieldGroup:
		e.What = MissingGroup
	case a.isFactor(q):
		e.What = MissingFactor
	case q.Field.Kind == Password:
		e.What = MissingPassword
	}
	return e
}

// now is time.Now but in tests.
var now = time.Now
