// Package speed measures the throughput between two nodes, from stack to stack.
//
// The server listens on port 5183 inside the VPN, TCP and UDP. A client opens a TCP connection, the
// control connection, and sends a request; the server answers with a token, or with
// why it will not. The client opens the flows of the test, each of which shows the token.
// When all are there the server says go, the sender sends for the time that was agreed
// on, and at the end the server says what it has counted. All messages are JSON, one a line.
//
//	client                               server
//	  {"hello":"test","network":"tcp",...} →
//	  ← {"token":"4f..."}
//	  {"hello":"flow","token":"4f...","flow":0} →       TCP: each on a connection of its own
//	  token, flow and 0 in a datagram →                  UDP: repeated until data or go
//	  ← {"go":true}
//	  data, one way or the other
//	  {"done":true} →                                    UDP from the client only
//	  ← {"count":{...}}
package speed

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// Port is where a server listens, beside the port of the tunnel itself.
const Port = 5183

// Bounds of a test, which both sides check.
const (
	MaxFlows    = 64
	MaxDuration = 60 * time.Second
	MinDatagram = headerSize
	MaxDatagram = 65000

	maxLine      = 4 << 10
	setupTimeout = 10 * time.Second
	// settle is how long datagrams may be under way after the last was sent.
	settle = 300 * time.Millisecond
)

// Test says what to measure.
type Test struct {
	Network  string        `json:"network"`     // "tcp" or "udp"
	Inbound  bool          `json:"inbound"`     // the server sends
	Flows    int           `json:"flows"`       // at once
	Duration time.Duration `json:"duration_ns"` // of sending
	Datagram int           `json:"datagram"`    // bytes of UDP payload
	Rate     int64         `json:"rate"`        // of UDP, bits a second over all flows; 0: as fast as the tunnel takes them
}

// Check says what is wrong with t.
func (t *Test) Check() error {
	switch {
	case t.Network != "tcp" && t.Network != "udp":
		return fmt.Errorf("network %q: expected tcp or udp", t.Network)
	case t.Flows < 1 || t.Flows > MaxFlows:
		return fmt.Errorf("%d flows: expected 1 to %d", t.Flows, MaxFlows)
	case t.Duration < 100*time.Millisecond || t.Duration > MaxDuration:
		return fmt.Errorf("duration %v: expected 100ms to %v", t.Duration, MaxDuration)
	case t.Network == "udp" && (t.Datagram < MinDatagram || t.Datagram > MaxDatagram):
		return fmt.Errorf("datagrams of %d bytes: expected %d to %d", t.Datagram, MinDatagram, MaxDatagram)
	case t.Rate < 0:
		return errors.New("a negative rate")
	}
	return nil
}

// message is any line of the protocol.
type message struct {
	Hello string `json:"hello,omitempty"` // "test" or "flow"
	*Test
	Token string `json:"token,omitempty"`
	Flow  int    `json:"flow,omitempty"`
	Go    bool   `json:"go,omitempty"`
	Done  bool   `json:"done,omitempty"`
	Count *count `json:"count,omitempty"`
	Error string `json:"error,omitempty"`
}

// count is what one side has sent or received.
type count struct {
	Bytes     int64         `json:"bytes"`
	Datagrams int64         `json:"datagrams"`
	Elapsed   time.Duration `json:"elapsed_ns"` // from go to the last byte
}

func send(c net.Conn, m message) error {
	b, err := json.Marshal(m)
	if err == nil {
		_, err = c.Write(append(b, '\n'))
	}
	return err
}

// receive reads a line. An error that the other side tells is one here.
func receive(r *bufio.Reader) (m message, err error) {
	line, err := r.ReadSlice('\n') // no longer than the reader's buffer
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, errors.New("no speed test speaks on this port")
	}
	if m.Error != "" {
		return m, errors.New("the far side: " + m.Error)
	}
	return m, nil
}

func newReader(c net.Conn) *bufio.Reader { return bufio.NewReaderSize(c, maxLine) }

// headerSize is that of a datagram: token, flow, number.
const headerSize = 8 + 4 + 8

func putHeader(b []byte, token uint64, flow int, number uint64) {
	binary.BigEndian.PutUint64(b, token)
	binary.BigEndian.PutUint32(b[8:], uint32(flow))
	binary.BigEndian.PutUint64(b[12:], number)
}

func header(b []byte) (token uint64, flow int, ok bool) {
	if len(b) < headerSize {
		return 0, 0, false
	}
	return binary.BigEndian.Uint64(b), int(binary.BigEndian.Uint32(b[8:])), true
}
