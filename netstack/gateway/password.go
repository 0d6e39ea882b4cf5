package gateway

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/crypto/bcrypt"
)

const (
	// passwordCost is that of new hashes: about 60 ms of a processor.
	passwordCost = bcrypt.DefaultCost
	// maxPasswordCost keeps one check below some seconds: it must end.
	maxPasswordCost = 15
	// maxPassword is what bcrypt looks at, in bytes. The rest would not count.
	maxPassword = 72
	// maxWaiting are sign-ins that wait for a processor; at 60 ms each they wait some seconds at most.
	maxWaiting = 128
)

// HashPassword makes the hash of a password, as it stands in a [UserFile].
func HashPassword(password string) (string, error) {
	switch {
	case password == "":
		return "", errors.New("the password is empty")
	case len(password) > maxPassword:
		return "", fmt.Errorf("the password has %d bytes; more than %d do not count", len(password), maxPassword)
	}
	h, err := bcrypt.GenerateFromPassword([]byte(password), passwordCost)
	return string(h), err
}

// A passwordGate checks passwords, some at a time: a check takes a processor for as long as it is
// meant to take an attacker's.
type passwordGate struct {
	running chan struct{} // has an element for each that runs
	waiting chan struct{} // and for each that waits or runs
}

func newPasswordGate() *passwordGate {
	return &passwordGate{
		// The other half is for the tunnels.
		running: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		waiting: make(chan struct{}, maxWaiting),
	}
}

// check compares a password with its hash, and for the sake of the time with others. It returns nil, ErrDenied, ErrBusy, or
// the context's error.
func (g *passwordGate) check(ctx context.Context, hash, password string, others ...string) error {
	select {
	case g.waiting <- struct{}{}:
		defer func() { <-g.waiting }()
	default:
		return ErrBusy
	}
	select {
	case g.running <- struct{}{}:
		defer func() { <-g.running }()
	case <-ctx.Done():
		return ctx.Err()
	}
	looked := []byte(password[:min(len(password), maxPassword)])
	err := bcrypt.CompareHashAndPassword([]byte(hash), looked)
	for _, other := range others {
		_ = bcrypt.CompareHashAndPassword([]byte(other), looked)
	}
	if err != nil || len(password) > maxPassword {
		return ErrDenied
	}
	return nil
}

// decoys are hashes by cost, whose passwords nobody knows. A check against the one of the highest cost stands for that of a user who is not
// there; and a check at a lower cost c is followed by such at c, c+1 ... below the highest, each of twice the time of the one before:
// 2^c + 2^c + 2^(c+1) + ... = 2^highest.
type decoys map[int]string

// between are those from a cost on to below another.
func (d decoys) between(from, to int) (list []string) {
	for c := from; c < to; c++ {
		list = append(list, d.of(c))
	}
	return list
}

func (d decoys) of(cost int) string {
	if h, ok := d[cost]; ok {
		return h
	}
	h, err := bcrypt.GenerateFromPassword([]byte(time.Now().String()), cost)
	if err != nil { // the cost is in range, and the password short
		panic(err)
	}
	d[cost] = string(h)
	return d[cost]
}
