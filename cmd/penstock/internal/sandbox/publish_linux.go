package sandbox

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"time"
)

// listen opens the host's side of Config.Publish. The files are the caller's to close, also after
// a failure.
func listen(ps []Publish) (files []*os.File, failed *Error) {
	for _, p := range ps {
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(p.Listen))
		if err != nil {
			return files, failf("publish %v: %w", p.Listen, err)
		}
		f, err := l.File()
		l.Close()
		if err != nil {
			return files, failf("publish %v: %w", p.Listen, err)
		}
		files = append(files, f)
	}
	return files, nil
}

// publish serves the listeners, whose sockets are in the host's namespace, from here: what is
// dialled is in this one.
func (h *helper) publish() {
	for i, p := range h.setup.Publish {
		f := os.NewFile(uintptr(fdListeners+i), "listener")
		l, err := net.FileListener(f)
		f.Close()
		if err != nil {
			continue // cannot be: the parent has made it
		}
		go serve(l, p.Port)
	}
}

const (
	maxConnections = 4096 // of one published port
	dialTime       = 10 * time.Second
	pauseTime      = 100 * time.Millisecond // after a failure to accept: out of files, for now
)

// serve connects what l accepts to a port of the program, on the loopback.
func serve(l net.Listener, port uint16) {
	slots := make(chan struct{}, maxConnections)
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(pauseTime)
			continue
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer func() { <-slots }()
				connect(c.(*net.TCPConn), port)
			}()
		default:
			reset(c.(*net.TCPConn))
		}
	}
}

// connect takes c. A program that listens on IPv6's loopback only is found too.
func connect(c *net.TCPConn, port uint16) {
	defer c.Close()
	p := strconv.Itoa(int(port))
	to, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", p), dialTime)
	if err != nil {
		if to, err = net.DialTimeout("tcp", net.JoinHostPort("::1", p), dialTime); err != nil {
			reset(c)
			return
		}
	}
	t := to.(*net.TCPConn)
	defer t.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		splice(c, t)
	}()
	splice(t, c)
	<-back
}

// splice copies until from ends, and ends that half of to; an error resets both.
func splice(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil { // by splice(2)
		reset(to)
		reset(from)
		return
	}
	to.CloseWrite()
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
