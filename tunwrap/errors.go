package tunwrap

import "errors"

// ErrNATRule is wrapped by every error about a set of NAT rules. The rules in force stay
// in force.
var ErrNATRule = errors.New("tunwrap: bad NAT rule")
