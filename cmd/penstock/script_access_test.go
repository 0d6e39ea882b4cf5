package main

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/net/dns/dnsmessage"
)

// serveTCPEcho sends back what comes, until the script ends:
//
//	tcpecho PORT
func serveTCPEcho(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:"+args[0])
	ts.Check(err)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	ts.Defer(func() { l.Close(); serving.Wait() })
}

// serveDNS answers for names, and for no others, until the script ends:
//
//	dns PORT NAME=ADDRESS...
func serveDNS(ts *testscript.TestScript, _ bool, args []string) {
	c, err := net.ListenPacket("udp4", "127.0.0.1:"+args[0])
	ts.Check(err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		b := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			var m dnsmessage.Message
			if err != nil || m.Unpack(b[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			answer := dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RCode: dnsmessage.RCodeNameError}, Questions: m.Questions}
			q := m.Questions[0]
			for _, record := range args[1:] {
				name, value, _ := strings.Cut(record, "=")
				if !strings.EqualFold(name+".", q.Name.String()) {
					continue
				}
				answer.RCode = dnsmessage.RCodeSuccess
				h := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 60}
				switch a := netip.MustParseAddr(value); {
				case a.Is4() && q.Type == dnsmessage.TypeA:
					answer.Answers = append(answer.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
				case a.Is6() && q.Type == dnsmessage.TypeAAAA:
					answer.Answers = append(answer.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
				}
			}
			if packed, err := answer.Pack(); err == nil {
				c.WriteTo(packed, from)
			}
		}
	}()
	ts.Defer(func() { c.Close(); <-served })
}
