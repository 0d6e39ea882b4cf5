package tunwrap

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A persistent interface remembers what its last owner has set: offloads, size and byte order of
// the vnet header, and whether there are several queues.
func TestTUNPersistent(t *testing.T) {
	leavesNothing(t)
	one, two := newNamespace(t), newNamespace(t)
	control := func(dev *TUN, f func(fd int) error) error {
		var err error
		return errors.Join(dev.queues[0].raw.Control(func(fd uintptr) { err = f(int(fd)) }), err)
	}
	for i, o := range []TUNOptions{{}, {NoVnetHdr: true}, {}, {NoGSO: true}, {Queues: 3}, {NoGRO: true}} {
		o.Name, o.MTU = "pen0", 1400
		addr := []string{"10.9.0.1/24"}
		if i > 0 {
			addr = nil
		}
		a := one.openTUN(t, o, addr...)
		b := two.openTUN(t, TUNOptions{Name: fmt.Sprintf("pen%d", i), MTU: 1400}, "10.9.0.2/24")
		if n := len(a.Readers()); n != 0 {
			t.Errorf("%d further queues", n)
		}
		end := (&wire{mtu: 1400}).join(a, b)
		if err := sendOver(one, two, "10.9.0.2", 1<<20); err != nil {
			t.Error(i, err)
		}
		out := a.Stats().Outbound
		if gso := !o.NoGSO && !o.NoVnetHdr; gso != (out.Superpackets > 0) {
			t.Errorf("after %d: GSO %v, %+v", i, gso, out)
		}
		if d := a.Drops(); d.Total() != 0 {
			t.Errorf("drops %v", d)
		}
		// What the next one finds.
		if err := control(a, func(fd int) error {
			return errors.Join(unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1),
				unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 12), unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1),
				unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadTCP))
		}); err != nil && a.vnet {
			t.Error(err)
		}
		if err := end(); err != nil {
			t.Error(i, err)
		}
	}
}

// An interface that somebody else has opened.
func TestTUNFromFD(t *testing.T) {
	leavesNothing(t)
	one, two := newNamespace(t), newNamespace(t)
	open := func(n *namespace, flags uint16) (fd int) {
		n.must(t, func() (err error) {
			name := "pen0"
			fd, err = openQueue(&name, &flags)
			return err
		})
		return fd
	}
	a := one.openTUN(t, TUNOptions{FD: open(one, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)}, "10.9.0.1/24")
	b := two.openTUN(t, TUNOptions{FD: open(two, unix.IFF_TUN|unix.IFF_NO_PI)}, "10.9.0.2/24")
	if name, _ := a.Name(); name != "pen0" || !a.Capabilities().VnetHdr.On || b.Capabilities().VnetHdr.On || b.Capabilities().GROTCP.On {
		t.Errorf("%s %+v %+v", name, a.Capabilities(), b.Capabilities())
	}
	end := (&wire{mtu: 1500}).join(a, b)
	if err := sendOver(one, two, "10.9.0.2", 1<<20); err != nil {
		t.Error(err)
	}
	if err := end(); err != nil {
		t.Error(err)
	}

	for name, fd := range map[string]int{
		"Ethernet": open(newNamespace(t), unix.IFF_TAP|unix.IFF_NO_PI),
		"a file":   openFile(t, "/dev/null"),
	} {
		if dev, err := OpenTUN(TUNOptions{FD: fd}); err == nil {
			t.Errorf("%s: taken", name)
			dev.Close()
		} else if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: left open", name)
		}
	}
}

func openFile(t *testing.T, path string) int {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// What the kernel refuses while the interface is down is counted; when the interface has been deleted, Read ends.
func TestTUNDownAndGone(t *testing.T) {
	leavesNothing(t)
	ns := newNamespace(t)
	dev := ns.openTUN(t, TUNOptions{Name: "pen0", MTU: 1280})
	if mtu, err := dev.MTU(); err == nil && mtu != 1280 { // asked for outside the namespace: what was set
		t.Error(mtu, err)
	}
	ns.must(t, func() error {
		if err := dev.SetMTU(1340); err != nil {
			return err
		}
		if mtu, err := dev.MTU(); mtu != 1340 || err != nil {
			return fmt.Errorf("MTU %d, %v", mtu, err)
		}
		link, err := netlink.LinkByName("pen0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(link)
	})
	s := spec{payload: payload(3000), flags: ack}
	if n, err := dev.Write(withRoom(s.plainSegments(1000)), headroom); n != 3 || err != nil {
		t.Error(n, err)
	}
	if d := dev.Drops(); d[DropKernel] != 3 || d.Total() != 3 {
		t.Errorf("drops %v", d)
	}
	ended := make(chan error)
	go func() {
		bufs, sizes := buffers(4, 1500)
		for {
			if _, err := dev.Read(bufs, sizes, headroom); err != nil {
				ended <- err
				return
			}
		}
	}()
	time.Sleep(10 * time.Millisecond)
	ns.must(t, func() error {
		link, err := netlink.LinkByName("pen0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	select {
	case err := <-ended:
		if !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Read waits for an interface that is gone")
		dev.Close()
		<-ended
	}
	if err := ns.do(func() error { _, err := OpenTUN(TUNOptions{Name: "a-name-too-long-for-linux"}); return err }); err == nil {
		t.Error("a name too long is taken")
	}
	first := ns.openTUN(t, TUNOptions{Name: "pen0"})
	err := ns.do(func() error { _, err := OpenTUN(TUNOptions{Name: "pen0"}); return err })
	if !errors.Is(err, unix.EBUSY) {
		t.Error("opened twice:", err)
	}
	first.Close()
}
