package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"math"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/control"
)

var update = flag.Bool("update", false, "write the files that tests compare with")

// full fills everything that v holds with values as long as they may get, lists
// with two elements.
func full(v reflect.Value) {
	switch x := v.Addr().Interface().(type) {
	case *netip.Addr:
		*x = netip.MustParseAddr("2001:db8:1111:2222:3333:4444:5555:6666")
		return
	case *netip.AddrPort:
		*x = netip.MustParseAddrPort("[2001:db8:1111:2222:3333:4444:5555:6666]:65535")
		return
	case *netip.Prefix:
		*x = netip.MustParsePrefix("2001:db8:1111:2222:3333:4444:5555:6666/128")
		return
	case *time.Time:
		*x = time.Date(2026, 11, 21, 20, 0, 0, 0, time.UTC)
		return
	case *time.Duration:
		*x = 123456789 * time.Microsecond
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			full(v.Field(i))
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		full(v.Elem())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		full(v.Index(0))
		full(v.Index(1))
	case reflect.Array:
		for i := range v.Len() {
			full(v.Index(i))
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for _, key := range []string{"a reason of some length that a packet may be dropped for, as long as that", "short"} {
			e := reflect.New(v.Type().Elem()).Elem()
			full(e)
			v.SetMapIndex(reflect.ValueOf(key), e)
		}
	case reflect.String:
		v.SetString("a-very-long-word-as-host-names-and-paths-may-be.some.where.in.example.net:65535/without/any/space ünd Wörter")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(math.MaxInt32)
	case reflect.Uint8:
		v.SetUint(math.MaxUint8)
	case reflect.Uint64:
		v.SetUint(math.MaxUint64)
	case reflect.Interface: // an error, which JSON leaves out
	default:
		panic("no example for " + v.Type().String())
	}
}

func fullReport() *control.Report {
	var r control.Report
	full(reflect.ValueOf(&r).Elem())
	return &r
}

// TestStatusFits: no line is longer than the terminal, whatever is in it, and
// nothing gets lost at the breaks.
func TestStatusFits(t *testing.T) {
	r := fullReport()
	text := statusText(r, r.Node.Started.Add(100*24*time.Hour))
	for _, line := range strings.Split(text, "\n") {
		if n := utf8.RuneCountInString(line); n > columns {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	together := strings.Join(strings.Fields(text), "")
	for _, want := range []string{r.Config, r.Node.Tunnel.Peers[0].LastError, joined(r.Node.Tunnel.Peers[0].AllowedIPs), "18446744073709551615", "a reason of some length"} {
		if !strings.Contains(together, strings.Join(strings.Fields(want), "")) {
			t.Errorf("%q is not in the text:\n%s", want, text)
		}
	}
}

// TestStatusEmpty: a node that has just started.
func TestStatusEmpty(t *testing.T) {
	text := statusText(&control.Report{}, time.Now())
	for _, want := range []string{"no peers", "no drops"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in the text:\n%s", want, text)
		}
	}
}

// TestStatusKeys: programs read the JSON, so no key of it goes away or changes its
// place. New ones are added to testdata/status.keys with -update.
func TestStatusKeys(t *testing.T) {
	body, err := json.Marshal(fullReport())
	if err != nil {
		t.Fatal(err)
	}
	var tree any
	if err := json.Unmarshal(body, &tree); err != nil {
		t.Fatal(err)
	}
	var got []string
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				if strings.HasSuffix(path, "drops") || strings.HasSuffix(path, "refused") {
					k = "REASON"
				}
				walk(strings.TrimPrefix(path+"."+k, "."), e)
			}
		case []any:
			walk(path+"[]", v[0])
		default:
			got = append(got, path)
		}
	}
	walk("", tree)
	slices.Sort(got)
	got = slices.Compact(got)
	const file = "testdata/status.keys"
	if *update {
		if err := os.WriteFile(file, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Fields(string(golden))
	for _, k := range want {
		if !slices.Contains(got, k) {
			t.Errorf("%s is gone", k)
		}
	}
	for _, k := range got {
		if !slices.Contains(want, k) {
			t.Errorf("%s is new: go test ./cmd/penstock -run TestStatusKeys -update", k)
		}
		if k != strings.ToLower(k) && !strings.HasSuffix(k, ".REASON") {
			t.Errorf("%s is not in lower case", k)
		}
	}
	// What goes out comes in again, or status could not show it.
	var back control.Report
	if err := json.Unmarshal(body, &back); err != nil {
		t.Fatal(err)
	}
	if again, err := json.Marshal(back); err != nil || !bytes.Equal(again, body) {
		t.Errorf("read and written again it is different (%v)", err)
	}
}

func TestAmountsAndSpans(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "0.98 KiB", 1024: "1.00 KiB", 10 << 20: "10.0 MiB", 1000 << 20: "0.98 GiB",
		10234: "9.99 KiB", 10239: "10.0 KiB", 999 << 30: "999 GiB", math.MaxUint64: "16.0 EiB",
	} {
		if got := amount(n); got != want {
			t.Errorf("amount(%d) = %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 3 * time.Hour: "3h00m", 49 * time.Hour: "2d01h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %s, want %s", d, got, want)
		}
	}
}

// TestFinish: one interrupt waits for everything to close, a second one does not.
func TestFinish(t *testing.T) {
	broken := errors.New("broken")
	if err := finish(nil, func() error { return broken }, nil); err != broken {
		t.Errorf("got %v, want what close says", err)
	}
	interrupts := make(chan os.Signal, 1)
	never := make(chan struct{})
	defer close(never)
	interrupts <- os.Interrupt
	if err := finish(nil, func() error { <-never; return nil }, interrupts); err == nil || !strings.Contains(err.Error(), "interrupted again (interrupt)") {
		t.Errorf("after a second interrupt: %v", err)
	}
	// The host comes first, unless somebody insists.
	done := make(chan struct{})
	returned := make(chan error, 1)
	interrupts <- os.Interrupt
	go func() { returned <- finish(done, func() error { <-never; return nil }, interrupts) }()
	select {
	case err := <-returned:
		t.Errorf("before the host was as it was: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(done)
	if err := <-returned; err == nil {
		t.Error("interrupted again, and no error")
	}
	interrupts <- os.Interrupt
	go func() { returned <- finish(make(chan struct{}), func() error { <-never; return nil }, interrupts) }()
	interrupts <- os.Interrupt // taken up when the second one has been
	if err := <-returned; err == nil {
		t.Error("interrupted a third time, and no error")
	}
}
