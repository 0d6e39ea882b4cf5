package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/penstock-vpn/penstock/netstack/signin"
)

// pty opens a terminal: what is written to the first is typed, what is read of it is on the screen.
func pty(t *testing.T) (user, terminal *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("SKIPPED: no terminals can be made here: %v", err)
	}
	t.Cleanup(func() { user.Close() })
	n, err := unix.IoctlGetInt(int(user.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return user, terminal
}

// screen collects what a terminal shows.
func screen(user *os.File) *text {
	s := new(text)
	go func() {
		b := make([]byte, 1024)
		for {
			n, err := user.Read(b)
			s.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *text) shows(t *testing.T, what string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !strings.Contains(s.String(), what); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the screen never shows %q: %q", what, s.String())
		}
	}
}

// echo tells whether a terminal shows what is typed.
func echo(t *testing.T, terminal *os.File) bool {
	t.Helper()
	s, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return s.Lflag&unix.ECHO != 0
}

// What a user sees and types: a name, a group by its number, a password that is not shown.
func TestAsk(t *testing.T) {
	user, terminal := pty(t)
	shown := screen(user)
	a := &asker{in: terminal, out: terminal}
	form := &signin.Form{Banner: "Mind the \x1b[31mgap.", Error: "Wrong.", Message: "Wrong."}
	groups := []signin.Option{{Value: "staff", Label: "staff"}, {Value: "ops", Label: "Operators"}}
	for _, tt := range []struct {
		field         signin.Field
		prompt, typed string
		want          string
	}{
		{signin.Field{Kind: signin.Text, Name: "username", Label: "Username:"}, "Username: ", "ada\n", "ada"},
		{signin.Field{Kind: signin.Text, Name: "realm", Value: "corp"}, "realm [corp]: ", "\n", "corp"},
		{signin.Field{Kind: signin.Select, Name: "group_list", Label: "GROUP:", Value: "staff", Options: groups}, "  2  Operators (ops)\r\nGROUP [1]: ", "9\n2\n", "ops"},
		{signin.Field{Kind: signin.Select, Name: "group_list", Label: "Team", Options: groups}, "Team [1]: ", "Operators\n", "ops"},
		{signin.Field{Kind: signin.Select, Name: "group_list", Label: "Crew", Value: "ops", Options: groups}, "Crew [2]: ", "\n", "ops"},
		{signin.Field{Kind: signin.Password, Name: "password", Label: "Password:"}, "Password: ", "love lace\n", "love lace"},
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			got, err := a.ask(t.Context(), signin.Question{Form: form, Field: &tt.field, First: tt.field.Name == "username"})
			if err != nil || got != tt.want {
				t.Errorf("%s: %q, %v; want %q", tt.prompt, got, err, tt.want)
			}
		}()
		shown.shows(t, tt.prompt)
		for end := time.Now().Add(5 * time.Second); tt.field.Kind == signin.Password && echo(t, terminal) && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		if _, err := user.WriteString(tt.typed); err != nil {
			t.Fatal(err)
		}
		<-done
	}
	got := shown.String()
	if strings.Contains(got, "lace") || strings.Contains(got, "\x1b") || strings.Count(got, "Wrong.") != 1 || !strings.Contains(got, "Mind the [31mgap.") {
		t.Errorf("the screen shows %q", got)
	}
	if !echo(t, terminal) {
		t.Error("the terminal shows nothing any more")
	}
	// Interrupted while it waits for a password, it leaves the terminal as it was.
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := a.ask(ctx, signin.Question{Form: form, Field: &signin.Field{Kind: signin.Password, Label: "Secret"}})
		done <- err
	}()
	shown.shows(t, "Secret: ")
	for end := time.Now().Add(5 * time.Second); echo(t, terminal) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	cancel(errInterrupted)
	if err := <-done; err != errInterrupted || !echo(t, terminal) {
		t.Errorf("interrupted: %v, echo %v", err, echo(t, terminal))
	}
	user.WriteString("\n") // for the read that still waits
}
