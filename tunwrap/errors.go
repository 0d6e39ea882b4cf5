package tunwrap

import "errors"

// ErrNATRule is wrapped by every error about a set of NAT rules. The rules in force stay
// in force.
var ErrNATRule = errors.New("tunwrap: bad NAT rule")

// ErrFilterRule is wrapped by every error about the rules or the peers of a [Filter].
var ErrFilterRule = errors.New("tunwrap: bad filter rule")
