package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// Method is how users show who they are.
type Method string

// The methods.
const (
	Password    Method = "password"    // name and password
	Certificate Method = "certificate" // a certificate by one of Config.ClientCAs
	Either      Method = "either"      // a certificate if there is one, else name and password
	Both        Method = "both"        // a certificate and the password of its user
)

func (m Method) certificates() bool { return m == Certificate || m == Either || m == Both }

// signIn decides who gets in. It implements [openconnect.Authenticator] and keeps nothing about
// those who are not in: what has been shown so far is in the state that their cookie carries.
type signIn struct {
	s *Server
}

var _ openconnect.Authenticator = signIn{}

// signInState is what the server remembers between two forms, sealed, with the client.
type signInState struct {
	User  string `json:"u,omitempty"` // whom a certificate or the password has shown
	Group string `json:"g,omitempty"`
	// Passed: the password was right, or none is needed. What is left is the code.
	Passed bool `json:"p,omitempty"`
}

const (
	sorryWrong  = "Wrong user name or password."
	sorryCode   = "Wrong code."
	sorryBanned = "Too many wrong attempts; try again later."
	sorryBusy   = "The server is busy; try again in a moment."
	codeLabel   = "Code:"

	sorryCertificate = "A client certificate is needed."
)

// Begin implements [openconnect.Authenticator].
func (a signIn) Begin(ctx context.Context, c *openconnect.Client, group string) (openconnect.Decision, error) {
	if a.banned(c) {
		return denied(sorryBanned), nil
	}
	cfg := &a.s.cfg
	if group != "" && a.s.groups.find(group) == nil {
		group = "" // the form offers those that there are
	}
	if !cfg.Method.certificates() || c.Certificate == nil {
		if cfg.Method == Certificate || cfg.Method == Both {
			return denied(sorryCertificate), nil
		}
		return a.form(signInState{Group: group}, ""), nil
	}
	name := cfg.CertificateUser.nameIn(c.Certificate)
	user, err := a.known(ctx, name)
	if errors.Is(err, ErrDenied) {
		a.wrong(c, name, "certificate")
		return denied("The certificate's user may not come in."), nil
	}
	if err != nil {
		return openconnect.Decision{}, err
	}
	state := signInState{User: user.Name, Group: group}
	if cfg.Method == Both {
		return a.form(state, ""), nil
	}
	return a.passed(ctx, c, user, state)
}

// known finds a user by the name in a certificate or in a state.
func (a signIn) known(ctx context.Context, name string) (*User, error) {
	if name == "" {
		return nil, ErrDenied
	}
	return a.s.cfg.Users.User(ctx, name)
}

// form asks for what state lacks.
func (a signIn) form(state signInState, sorry string) openconnect.Decision {
	ask := &openconnect.Ask{Error: sorry, Group: state.Group}
	if state.Passed {
		ask.Message, ask.Factor = "Please enter the code of your authenticator.", codeLabel
	} else {
		ask.Username, ask.Password = state.User == "", true
		ask.Groups = a.s.groups.offered()
	}
	var err error
	if ask.State, err = json.Marshal(state); err != nil {
		panic(err) // strings and a flag
	}
	return openconnect.Decision{Ask: ask}
}

func denied(why string) openconnect.Decision { return openconnect.Decision{Denied: why} }

// Answer implements [openconnect.Authenticator].
func (a signIn) Answer(ctx context.Context, c *openconnect.Client, answers *openconnect.Answers) (openconnect.Decision, error) {
	if a.banned(c) {
		return denied(sorryBanned), nil
	}
	var state signInState
	if err := json.Unmarshal(answers.State, &state); err != nil {
		return openconnect.Decision{}, fmt.Errorf("state of a sign-in: %w", err) // sealed by us, so never
	}
	if answers.Group != "" && !state.Passed {
		state.Group = answers.Group
	}
	if state.Passed {
		return a.code(ctx, c, state, answers.Factor)
	}
	if m := a.s.cfg.Method; m == Certificate || m == Both && state.User == "" {
		return denied(sorryCertificate), nil // the state is of another method, before a restart or of another server
	}
	name := answers.Username
	if state.User != "" {
		// The certificate that has shown it is still here, or was exchanged for another's state.
		if name = a.s.cfg.CertificateUser.nameIn(c.Certificate); name != state.User {
			return denied(sorryCertificate), nil
		}
	}
	user, err := a.password(ctx, name, answers.Password)
	switch {
	case errors.Is(err, ErrDenied):
		if a.wrong(c, name, "password") {
			return denied(sorryBanned), nil
		}
		return a.form(signInState{User: state.User, Group: state.Group}, sorryWrong), nil
	case errors.Is(err, ErrBusy):
		return a.form(state, sorryBusy), nil
	case err != nil:
		return openconnect.Decision{}, err
	}
	state.User = user.Name
	return a.passed(ctx, c, user, state)
}

func (a signIn) password(ctx context.Context, name, password string) (*User, error) {
	if len(name) > maxName {
		name = "" // nobody's, and as slow as any
	}
	return a.s.cfg.Users.Password(ctx, name, password)
}

// passed goes on when all but the code has been shown.
func (a signIn) passed(ctx context.Context, c *openconnect.Client, user *User, state signInState) (openconnect.Decision, error) {
	group, ok := a.s.groups.choose(user, state.Group)
	if !ok {
		a.s.log.Info("sign-in refused", "user", user.Name, "remote", c.Remote, "reason", "group", "group", state.Group)
		return denied("You may not use this group."), nil
	}
	if user.Secret != "" && !state.Passed {
		state.Passed, state.Group = true, group
		return a.form(state, ""), nil
	}
	cookie, err := a.s.sessions.create(ctx, user, group, c)
	var full *openconnect.UnavailableError
	if errors.As(err, &full) {
		return denied(full.Reason), nil
	}
	if err != nil {
		return openconnect.Decision{}, err
	}
	a.s.scores.good(c.Remote.Addr(), user.Name)
	settle(ctx, true)
	a.s.signIns.Add(1)
	a.s.log.Info("signed in", "user", user.Name, "group", group, "remote", c.Remote, "agent", c.UserAgent)
	return openconnect.Decision{Cookie: cookie}, nil
}

// code checks the second factor of a user who has passed the first.
func (a signIn) code(ctx context.Context, c *openconnect.Client, state signInState, code string) (openconnect.Decision, error) {
	user, err := a.known(ctx, state.User)
	if errors.Is(err, ErrDenied) {
		return denied(sorryWrong), nil
	}
	if err != nil {
		return openconnect.Decision{}, err
	}
	if user.Secret == "" {
		// Since a moment ago. From the start: a state is never all that it takes, as who can read the store can seal one.
		return a.Begin(ctx, c, state.Group)
	}
	if !a.s.codes.try(user.Name, time.Now()) {
		a.s.log.Warn("sign-in refused", "user", user.Name, "remote", c.Remote, "reason", "too many wrong codes")
		return denied(sorryBanned), nil
	}
	switch err := checkCode(ctx, a.s.cfg.Store, user, code, time.Now()); {
	case errors.Is(err, ErrDenied):
		if a.wrong(c, user.Name, "code") {
			return denied(sorryBanned), nil
		}
		return a.form(state, sorryCode), nil
	case err != nil:
		return openconnect.Decision{}, err
	}
	a.s.codes.good(user.Name)
	return a.passed(ctx, c, user, state)
}

func (a signIn) banned(c *openconnect.Client) bool {
	return a.s.scores.banned(c.Remote.Addr(), time.Now())
}

// wrong counts a failed attempt and tells whether the address is banned now. The name is in the log
// only if it is one: people type passwords into the wrong field.
func (a signIn) wrong(c *openconnect.Client, name, what string) bool {
	banned := a.s.scores.wrong(c.Remote.Addr(), name, time.Now())
	a.s.wrongSignIns.Add(1)
	if CheckName(name) != "" {
		name = "?"
	}
	a.s.log.Warn("sign-in failed", "user", name, "remote", c.Remote, "wrong", what, "banned", banned)
	return banned
}

// codeTries bounds the wrong codes of one user, from however many addresses: a code has a million values, and
// three are right at a time. The table forgets a user an hour after his first try.
type codeTries struct {
	mu    sync.Mutex
	tries map[string]codeTry
}

type codeTry struct {
	n     int
	since time.Time
}

const (
	maxCodeTries  = 20
	codeTriesTime = time.Hour
	maxCodeUsers  = 16 << 10 // users with tries; all of them know the password
)

func newCodeTries() *codeTries {
	return &codeTries{tries: map[string]codeTry{}}
}

// try counts one and tells whether it may be made.
func (t *codeTries) try(user string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, known := t.tries[user]
	if !known && len(t.tries) >= maxCodeUsers {
		for u, old := range t.tries {
			if now.Sub(old.since) > codeTriesTime {
				delete(t.tries, u)
			}
		}
		if len(t.tries) >= maxCodeUsers {
			return false
		}
	}
	if now.Sub(e.since) > codeTriesTime {
		e = codeTry{since: now}
	}
	e.n++
	t.tries[user] = e
	return e.n <= maxCodeTries
}

func (t *codeTries) good(user string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.tries, user)
}
