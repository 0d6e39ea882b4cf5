//go:build linux

// Loadgen is the load of the benchmark scripts in .ci that no common program makes: UDP with
// UDP_SEGMENT under a window as QUIC sends it, small packets in batches, a TCP sink and source for
// the rows where the other end is a node without an interface, and what configures wireguard-go.
//
//	loadgen tcp-recv ADDR              accepts one connection, counts what arrives
//	loadgen tcp-send ADDR SECONDS      writes into one connection
//	loadgen udp-recv ADDR              counts datagrams until a second is silent
//	loadgen udp-send ADDR SECONDS SIZE SEGMENTS WINDOW
//	loadgen wg-key                     prints a private and a public key in hexadecimal
//	loadgen wg-set SOCKET              sends its input as a set request of wireguard-go's socket
//
// Receivers print bytes, seconds, datagrams and lost datagrams, in one line.
package main

import (
	"bufio"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "loadgen: %v\n", err)
		os.Exit(1)
	}
}

// wanted tells how many arguments a verb takes.
var wanted = map[string]int{"tcp-recv": 1, "tcp-send": 2, "udp-recv": 1, "udp-send": 5, "wg-key": 0, "wg-set": 1}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("no verb; see the package's comment")
	}
	verb, args := args[0], args[1:]
	if n, known := wanted[verb]; !known || len(args) != n {
		return fmt.Errorf("%s with %d arguments; see the package's comment", verb, len(args))
	}
	switch verb {
	case "tcp-recv":
		return receiveTCP(args[0])
	case "udp-recv":
		return receiveUDP(args[0])
	case "wg-key":
		return wgKey()
	case "wg-set":
		return wgSet(args[0])
	}
	var n []int
	for _, a := range args[1:] {
		v, err := strconv.Atoi(a)
		if err != nil {
			return err
		}
		n = append(n, v)
	}
	d := time.Duration(n[0]) * time.Second
	if verb == "tcp-send" {
		return sendTCP(args[0], d)
	}
	return sendUDP(args[0], d, load{size: n[1], segments: n[2], window: n[3]})
}

// result prints what a receiver has counted.
func result(bytes int64, took time.Duration, datagrams, lost int64) {
	fmt.Printf("%d %.3f %d %d\n", bytes, took.Seconds(), datagrams, lost)
}

func receiveTCP(addr string) error {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Minute))
	c, err := l.Accept()
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Minute))
	began := time.Now()
	n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 256<<10))
	result(n, time.Since(began), 0, 0)
	return err
}

func sendTCP(addr string, d time.Duration) error {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	end := time.Now().Add(d)
	c.SetDeadline(end.Add(10 * time.Second))
	for buf := make([]byte, 128<<10); time.Now().Before(end); {
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
	// All has arrived when the other end has closed, which cannot be told from its going away.
	c.SetReadDeadline(time.Now().Add(2 * time.Second))
	c.(*net.TCPConn).CloseWrite()
	io.Copy(io.Discard, c)
	return nil
}

func wgKey() error {
	k, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%s %s\n", hex.EncodeToString(k.Bytes()), hex.EncodeToString(k.PublicKey().Bytes()))
	return err
}

// wgSet speaks wireguard's cross-platform configuration protocol: lines of key=value, an empty
// one at the end.
func wgSet(socket string) error {
	lines, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := fmt.Fprintf(c, "set=1\n%s\n\n", strings.TrimSpace(string(lines))); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if answer != "errno=0\n" {
		return fmt.Errorf("wireguard-go answers %q", answer)
	}
	return nil
}
