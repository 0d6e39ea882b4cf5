package tunwrap

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// The offloads of TUNSETOFFLOAD (linux/if_tun.h).
const (
	offloadTCP = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	// offloadUDP must be asked for whole: one of the two alone is EINVAL (Linux 6.2 to 6.18).
	offloadUDP = unix.TUN_F_USO4 | unix.TUN_F_USO6
)

// tunPlatform is the Linux half of a [TUN].
type tunPlatform struct {
	queues  []*tunQueue
	writev  func(fd uintptr, vectors []unix.Iovec) unix.Errno // writes one packet; replaceable for tests
	vnet    bool                                              // every packet has a vnet header before it
	groTCP  atomic.Bool                                       // until withdrawn
	groUDP  atomic.Bool
	refused struct{ tcp, udp atomic.Int32 } // superpackets in a row, see TUN.refusal
	writers sync.Pool                       // of *tunWriter
}

// A tunQueue is one open file of the interface.
type tunQueue struct {
	file *os.File
	raw  syscall.RawConn
}

func (t *TUN) open(o TUNOptions) error {
	fds, err := t.attach(o)
	if err != nil {
		return err
	}
	t.abilities.Queues = len(fds)
	t.abilities.VnetHdr = abilityOff(reasonConfigured)
	if t.vnet {
		t.abilities.VnetHdr = abilityOn()
		err = t.negotiate(fds[0], o)
	} else {
		if !o.NoVnetHdr {
			t.abilities.VnetHdr = abilityOff("the kernel or whoever opened the interface has none")
		}
		off := abilityOff("no vnet header")
		t.abilities.TSO, t.abilities.USO, t.abilities.GROTCP, t.abilities.GROUDP = off, off, off, off
		// A persistent interface keeps what its last owner has set.
		err = os.NewSyscallError("TUNSETOFFLOAD", unix.IoctlSetInt(fds[0], unix.TUNSETOFFLOAD, 0))
	}
	if err == nil && o.MTU > 0 && o.FD <= 0 {
		err = t.SetMTU(o.MTU)
	}
	if err == nil {
		err = t.poll(fds)
	}
	if err != nil {
		for _, q := range t.queues {
			q.file.Close()
		}
		for _, fd := range fds[len(t.queues):] {
			unix.Close(fd)
		}
	}
	return err
}

const reasonConfigured = "switched off by configuration"

// poll gives the files to Go's poller, which must not happen before they are attached.
func (t *TUN) poll(fds []int) error {
	for _, fd := range fds {
		file := os.NewFile(uintptr(fd), "/dev/net/tun")
		raw, err := file.SyscallConn()
		q := &tunQueue{file: file, raw: raw}
		t.queues = append(t.queues, q)
		if err != nil {
			return err
		}
		t.readers = append(t.readers, newTUNReader(t, q))
	}
	t.writev = writev
	t.writers.New = func() any { return newTUNWriter(t) }
	return nil
}

// attach opens the files of the interface and finds out its name and whether there is a vnet header.
func (t *TUN) attach(o TUNOptions) (fds []int, err error) {
	defer func() {
		if err != nil {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}
	}()
	flags := uint16(unix.IFF_TUN | unix.IFF_NO_PI)
	name := o.Name
	if o.FD > 0 {
		fds = append(fds, o.FD)
		if name, flags, err = interfaceOf(o.FD); err != nil {
			return fds, err
		}
		if flags&unix.IFF_TUN == 0 {
			return fds, fmt.Errorf("%s is not a TUN interface, it carries Ethernet frames", name)
		}
		if err = unix.SetNonblock(o.FD, true); err != nil {
			return fds, os.NewSyscallError("fcntl", err)
		}
	} else {
		if !o.NoVnetHdr {
			flags |= unix.IFF_VNET_HDR
		}
		if o.Queues > 1 {
			flags |= unix.IFF_MULTI_QUEUE
		}
		fd, err := openQueue(&name, &flags)
		if err != nil {
			return fds, err
		}
		fds = append(fds, fd)
	}
	if flags&unix.IFF_MULTI_QUEUE == 0 && o.Queues > 1 {
		t.log.Warn("the interface has a single queue", "interface", name, "asked", o.Queues)
	}
	t.name, t.vnet = name, flags&unix.IFF_VNET_HDR != 0
	for len(fds) < o.Queues && flags&unix.IFF_MULTI_QUEUE != 0 {
		fd, err := openQueue(&name, &flags)
		if err != nil {
			return fds, fmt.Errorf("queue %d: %w", len(fds)+1, err)
		}
		fds = append(fds, fd)
	}
	if t.vnet {
		for _, fd := range fds {
			if err := setVnetHeader(fd); err != nil {
				return fds, err
			}
		}
	}
	return fds, nil
}

// openQueue opens a file of the interface name, which is made if it does not exist, with flags, and completes both
// with what the kernel says. An interface that exists allows several queues or does not; the flag
// IFF_MULTI_QUEUE has to agree.
func openQueue(name *string, flags *uint16) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	ask := *flags
	err = setInterface(fd, *name, ask)
	if errors.Is(err, unix.EINVAL) {
		ask ^= unix.IFF_MULTI_QUEUE
		if setInterface(fd, *name, ask) == nil {
			err = nil
		}
	}
	if errors.Is(err, unix.EINVAL) && ask&unix.IFF_VNET_HDR != 0 {
		ask = *flags &^ unix.IFF_VNET_HDR // a kernel before 2.6.27, or something that pretends to be Linux
		err = setInterface(fd, *name, ask)
	}
	if err == nil {
		*name, *flags, err = interfaceOf(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func setInterface(fd int, name string, flags uint16) error {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("an interface name has at most %d characters", unix.IFNAMSIZ-1)
	}
	req.SetUint16(flags)
	err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (CAP_NET_ADMIN is needed, or an interface that belongs to the user)", os.NewSyscallError("TUNSETIFF", err))
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w (another program has the interface)", os.NewSyscallError("TUNSETIFF", err))
	}
	return os.NewSyscallError("TUNSETIFF", err)
}

// interfaceOf asks which interface fd is attached to, and with which flags.
func interfaceOf(fd int) (name string, flags uint16, err error) {
	req, err := unix.NewIfreq("")
	if err != nil {
		return "", 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
		return "", 0, os.NewSyscallError("TUNGETIFF", err)
	}
	return req.Name(), req.Uint16(), nil
}

// setVnetHeader sets the size and the byte order of the vnet header, which are the interface's and
// survive its last owner.
func setVnetHeader(fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeaderSize); err != nil {
		return os.NewSyscallError("TUNSETVNETHDRSZ", err)
	}
	// Neither little nor big endian by order is that of the machine.
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return os.NewSyscallError("TUNSETVNETLE", err)
	}
	// Most kernels are built without (CONFIG_TUN_VNET_CROSS_LE).
	_ = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETBE, 0)
	return nil
}

// negotiate asks for offloads, the most first, and sets none explicitly if none are wanted, since a
// persistent interface keeps what its last owner has set.
func (t *TUN) negotiate(fd int, o TUNOptions) error {
	set := func(offload int) error {
		return os.NewSyscallError("TUNSETOFFLOAD", unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offload))
	}
	a := &t.abilities
	a.TSO, a.USO, a.GROTCP, a.GROUDP = abilityOn(), abilityOn(), abilityOn(), abilityOn()
	// A kernel that gives UDP superpackets takes them too (Linux 6.2, 399e0827642f).
	if err := set(offloadTCP | offloadUDP); err != nil {
		a.USO = abilityOff(err.Error())
		a.GROUDP = a.USO
		if err := set(offloadTCP); err != nil {
			a.TSO = abilityOff(err.Error())
		}
	}
	if o.NoGSO {
		a.TSO, a.USO = abilityOff(reasonConfigured), abilityOff(reasonConfigured)
	}
	if o.NoGRO {
		a.GROTCP, a.GROUDP = abilityOff(reasonConfigured), abilityOff(reasonConfigured)
	}
	t.groTCP.Store(a.GROTCP.On)
	t.groUDP.Store(a.GROUDP.On)
	if !a.TSO.On {
		return set(0)
	}
	return nil
}

// SetMTU sets the MTU of the interface in bytes. The interface must be in the caller's network
// namespace.
func (t *TUN) SetMTU(mtu int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	req.SetUint32(uint32(mtu))
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFMTU, req); err != nil {
		return fmt.Errorf("MTU %d: %w", mtu, os.NewSyscallError("SIOCSIFMTU", err))
	}
	t.mtu.Store(int64(mtu))
	return nil
}

// MTU is the MTU of the interface in bytes, or the last one known if the interface is not in the
// caller's network namespace.
func (t *TUN) MTU() (int, error) {
	known := int(t.mtu.Load())
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return known, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(t.name)
	if err != nil {
		return known, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFMTU, req); err != nil {
		if known > 0 {
			return known, nil
		}
		return 0, os.NewSyscallError("SIOCGIFMTU", err)
	}
	return int(req.Uint32()), nil
}

// File is the file of the first queue.
func (t *TUN) File() *os.File { return t.queues[0].file }

// closePlatform wakes the readers and takes the interface back.
func (t *TUN) closePlatform() error {
	var errs []error
	for _, q := range t.queues {
		errs = append(errs, q.file.Close())
	}
	return errors.Join(errs...)
}
