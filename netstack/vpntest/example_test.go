package vpntest_test

import (
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/netstack/vpntest"
)

// testGreeting is a test of a program that speaks TCP, over a VPN that loses every
// hundredth datagram. In a test file it is func TestGreeting(t *testing.T).
func testGreeting(t testing.TB) {
	a, b := vpntest.Pair(t, vpntest.Wire{Latency: 5 * time.Millisecond, Loss: 0.01})

	l, err := b.Listen("tcp", ":7")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		fmt.Fprint(c, "hello from inside")
	}()

	c, err := a.Dial(t.Context(), "tcp", "10.66.0.2:7")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	greeting, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println(string(greeting))
}

func Example() {
	run(testGreeting)
	// Output: hello from inside
}

// run is what the testing package does for a test, as an example has no testing.TB.
func run(test func(testing.TB)) {
	t := &exampleTB{}
	defer func() {
		for i := range t.cleanups {
			t.cleanups[len(t.cleanups)-1-i]()
		}
	}()
	test(t)
}

type exampleTB struct {
	testing.TB
	cleanups []func()
}

func (*exampleTB) Helper()                           {}
func (*exampleTB) Context() context.Context          { return context.Background() }
func (t *exampleTB) Cleanup(f func())                { t.cleanups = append(t.cleanups, f) }
func (*exampleTB) Fatal(args ...any)                 { panic(fmt.Sprint(args...)) }
func (*exampleTB) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
func (*exampleTB) Errorf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
