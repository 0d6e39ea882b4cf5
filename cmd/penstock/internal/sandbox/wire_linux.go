package sandbox

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// The files of the helper beyond the standard ones.
const (
	fdControl   = 3 // a stream of orders one way and reports the other, in JSON
	fdHandover  = 4 // carries the open file of the interface to the parent
	fdListeners = 5 // and on: those of Config.Publish
)

// An order is what the parent wants; one field is set.
type order struct {
	Setup  *setup `json:",omitempty"`
	Start  bool   `json:",omitempty"`
	Signal int    `json:",omitempty"`
	MTU    int    `json:",omitempty"`
}

// setup is what the helper needs to know.
type setup struct {
	Config
	Path   string // of the program
	UserNS bool   // the helper's privileges are those of a user namespace
}

// A report is what the helper has to say; one field is set.
type report struct {
	Ready  *ready   `json:",omitempty"`
	Failed *failure `json:",omitempty"`
	Exit   *int     `json:",omitempty"` // the program's, as a shell gives it
}

type ready struct {
	Notes []string // what could not be had
}

// A failure ends the helper.
type failure struct {
	Step  string // what was being done; "" if Text says it all
	Text  string
	Errno int // 0: none
	Code  int // the exit code
}

// socketPair makes a pair of sockets: one for here, one as a file for a child.
func socketPair(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "sandbox")
	ours, err := unixConn(fds[0])
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// unixConn takes fd.
func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "sandbox")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, os.NewSyscallError("getsockname", unix.EAFNOSUPPORT)
	}
	return u, nil
}

// sendFile passes an open file on.
func sendFile(c *net.UnixConn, fd int) error {
	_, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(fd), nil)
	return err
}

// receiveFile takes a file that was passed on. It is the caller's to close.
func receiveFile(c *net.UnixConn) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return -1, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) == 0 {
		return -1, os.NewSyscallError("recvmsg", unix.EBADMSG)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) == 0 {
		return -1, os.NewSyscallError("recvmsg", unix.EBADMSG)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}
