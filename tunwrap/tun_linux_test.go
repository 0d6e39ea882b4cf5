package tunwrap

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// A namespace is a network namespace with a thread in it.
type namespace struct{ work chan func() }

// newNamespace makes one that lives as long as the test. Without the privilege it skips the test, or fails
// it if PENSTOCK_REQUIRE_NETNS=1.
func newNamespace(t testing.TB) *namespace {
	t.Helper()
	refuse := t.Skipf
	if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
		refuse = t.Fatalf
	}
	n := &namespace{work: make(chan func())}
	made := make(chan error)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // never unlocked: the namespace goes away with the thread
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			var fd int
			if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
				unix.Close(fd)
			}
		}
		made <- err
		if err != nil {
			return
		}
		for f := range n.work {
			f()
		}
	}()
	if err := <-made; err != nil {
		refuse("THE KERNEL IS NOT ASKED: a network namespace with a TUN needs root: %v", err)
	}
	t.Cleanup(func() { close(n.work); <-ended })
	n.must(t, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return n
}

// leavesNothing checks at the end, behind everything cleaned up after this call, that no goroutine is left.
func leavesNothing(t *testing.T) {
	now := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, now) })
}

// do runs f in the namespace.
func (n *namespace) do(f func() error) (err error) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); err = f() }
	<-done
	return err
}

func (n *namespace) must(t testing.TB, f func() error) {
	t.Helper()
	if err := n.do(f); err != nil {
		t.Fatal(err)
	}
}

// openTUN opens a TUN in the namespace, up and with addresses.
func (n *namespace) openTUN(t testing.TB, o TUNOptions, addrs ...string) *TUN {
	t.Helper()
	var dev *TUN
	n.must(t, func() (err error) {
		if dev, err = OpenTUN(o); err != nil {
			return err
		}
		return setUp(dev.name, addrs...)
	})
	t.Cleanup(func() { dev.Close() })
	return dev
}

// setUp gives an interface addresses, sets it up, and waits until packets to them are taken: the kernel adds the local route of an
// IPv6 address later, in a work queue (addrconf_dad_work).
func setUp(name string, addrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		p, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		p.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, p); err != nil {
			return fmt.Errorf("%s: %w", a, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, a := range addrs {
		dst := hostNet(a)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: dst},
				netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
			if err != nil || len(routes) > 0 {
				if err != nil {
					return err
				}
				break
			}
			if time.Now().After(end) {
				return fmt.Errorf("%s is never an address of this host", a)
			}
		}
	}
	return nil
}

// hostNet is the one address of a prefix.
func hostNet(prefix string) *net.IPNet {
	a := netip.MustParsePrefix(prefix).Addr()
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// A wire carries what comes out of one TUN into another, looking at every packet.
type wire struct {
	mu    sync.Mutex
	err   error
	mtu   int
	check func(b []byte) error // of each packet; nil: valid
}

// errTooBig is for a check that has dealt with the packet, which then goes no further.
var errTooBig = errors.New("too big")

// carry runs until from is closed.
func (w *wire) carry(from interface {
	Read(bufs [][]byte, sizes []int, offset int) (int, error)
	BatchSize() int
}, to *TUN) {
	bufs, sizes := buffers(from.BatchSize(), w.mtu+headroom)
	for i := range bufs {
		bufs[i] = bufs[i][: w.mtu+headroom : w.mtu+headroom]
	}
	packets := make([][]byte, 0, len(bufs))
	for {
		n, err := from.Read(bufs, sizes, headroom)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.fail(err)
			}
			return
		}
		packets = packets[:0]
		for i := range n {
			b := bufs[i][headroom : headroom+sizes[i]]
			check := w.check
			if check == nil {
				check = valid
			}
			if err := check(b); errors.Is(err, errTooBig) {
				continue
			} else if err != nil {
				w.fail(fmt.Errorf("%w: %x", err, b[:min(len(b), 100)]))
			}
			packets = append(packets, bufs[i][:headroom+sizes[i]])
		}
		if _, err := to.Write(packets, headroom); err != nil && !errors.Is(err, os.ErrClosed) {
			w.fail(err)
		}
	}
}

func (w *wire) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

// join carries packets both ways between a and b until both are closed; the function returned closes them
// and tells what was wrong.
func (w *wire) join(a, b *TUN) (end func() error) {
	var wg sync.WaitGroup
	for _, d := range [][2]*TUN{{a, b}, {b, a}} {
		wg.Go(func() { w.carry(d[0], d[1]) })
		for _, r := range d[0].Readers() {
			wg.Go(func() { w.carry(r, d[1]) })
		}
	}
	return func() error {
		err := errors.Join(a.Close(), b.Close())
		wg.Wait()
		return errors.Join(err, w.err)
	}
}

// sendOver sends n random bytes over TCP from one namespace to an address in the other.
func sendOver(from, to *namespace, addr string, n int) error {
	var l net.Listener
	err := to.do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(addr, "0")); return err })
	if err != nil {
		return err
	}
	defer l.Close()
	type result struct {
		sum [32]byte
		err error
	}
	got := make(chan result, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			got <- result{err: err}
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		h := sha256.New()
		_, err = io.Copy(h, c)
		got <- result{[32]byte(h.Sum(nil)), err}
	}()
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(data)
	var c net.Conn
	err = from.do(func() (err error) { c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second); return err })
	if err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := c.Write(data); err != nil {
		c.Close()
		return err
	}
	c.Close()
	r := <-got
	if r.err == nil && r.sum != sha256.Sum256(data) {
		r.err = errors.New("the bytes are not those sent")
	}
	return r.err
}

// The kernel's TCP through two TUNs: everything that comes out is right by gVisor's code, and
// everything that is written arrives.
func TestTUNCarriesTCP(t *testing.T) {
	for _, c := range []struct {
		name string
		o    TUNOptions
	}{
		{"all", TUNOptions{}},
		{"small batches", TUNOptions{BatchSize: 3}},
		{"no GSO", TUNOptions{NoGSO: true}},
		{"no GRO", TUNOptions{NoGRO: true}},
		{"no vnet header", TUNOptions{NoVnetHdr: true}},
		{"queues", TUNOptions{Queues: 2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			leavesNothing(t)
			const mtu = 1400
			c.o.Name, c.o.MTU = "pen0", mtu
			one, two := newNamespace(t), newNamespace(t)
			a := one.openTUN(t, c.o, "10.9.0.1/24", "fd09::1/64")
			b := two.openTUN(t, c.o, "10.9.0.2/24", "fd09::2/64")
			w := &wire{mtu: mtu}
			end := w.join(a, b)
			for _, addr := range []string{"10.9.0.2", "fd09::2"} {
				if err := sendOver(one, two, addr, 8<<20); err != nil {
					t.Error(addr, err)
				}
			}
			if err := end(); err != nil {
				t.Error(err)
			}
			if d := a.Drops(); d.Total() != 0 {
				t.Errorf("drops %v", d)
			}
			out, in := a.Stats().Outbound, b.Stats().Inbound
			t.Logf("%+v %+v", out, in)
			if gso := a.Capabilities().TSO.On; gso != (out.Superpackets > 20) {
				t.Errorf("GSO %v, %d superpackets", gso, out.Superpackets)
			}
			if gro := b.Capabilities().GROTCP.On; gro != (in.Superpackets > 20) {
				t.Errorf("GRO %v, %d superpackets", gro, in.Superpackets)
			}
			if out.Bytes < 16<<20 || out.Segments < 16<<20/mtu || in.Segments != out.Segments {
				t.Errorf("outbound %+v, inbound %+v", out, in)
			}
			if want := max(c.o.Queues, 1); len(a.Readers()) != want-1 || a.Capabilities().Queues != want {
				t.Errorf("%d readers, %+v", len(a.Readers()), a.Capabilities())
			}
		})
	}
}

// Close wakes a Read that waits, and may come twice.
func TestTUNClose(t *testing.T) {
	leavesNothing(t)
	ns := newNamespace(t)
	dev := ns.openTUN(t, TUNOptions{})
	bufs, sizes := buffers(dev.BatchSize(), 1500)
	ended := make(chan error)
	go func() {
		for {
			if _, err := dev.Read(bufs, sizes, headroom); err != nil {
				ended <- err
				return
			}
		}
	}()
	time.Sleep(20 * time.Millisecond)
	for range 2 {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Read waits on")
	}
	s := spec{payload: payload(5)}
	if _, err := dev.Write([][]byte{append(make([]byte, 20), s.full()...)}, 20); !errors.Is(err, os.ErrClosed) {
		t.Error("write:", err)
	}
	dev.TooBig(bytes.Repeat([]byte{0x60}, 1500), 1280)
	if _, ok := <-dev.Events(); ok {
		if _, ok := <-dev.Events(); ok {
			t.Error("Events is open")
		}
	}
}
