package gateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// rawConnect sends a CONNECT with these further headers.
func rawConnect(t *testing.T, s *Server, login *openconnect.Login, headers ...string) (*tls.Conn, *http.Response) {
	t.Helper()
	c, err := tls.Dial("tcp", s.Addrs()[0].String(), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	fmt.Fprintf(c, "CONNECT /CSCOSSLC/tunnel HTTP/1.1\r\nHost: x\r\nCookie: webvpn=%s\r\n%s\r\n", login.Cookie, strings.Join(headers, ""))
	r, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"})
	if err != nil {
		t.Fatal(err)
	}
	return c, r
}

// A DISCONNECT of another reason than 0xb0 (user) announces that the client comes back: AnyConnect says so when its network
// changes, and ocserv keeps the cookie (worker-vpn.c, AC_PKT_DISCONN).
func TestTemporaryDisconnect(t *testing.T) {
	for _, reason := range []string{"", "\x91", "\xd1"} {
		s := startServer(t, testConfig(t))
		login := signInAs(t, s, "alice", "secret")
		c, r := rawConnect(t, s, login)
		if r.StatusCode != 200 {
			t.Fatal(r.Status)
		}
		c.Write(append([]byte{'S', 'T', 'F', 1, 0, byte(len(reason)), 5, 0}, reason...))
		io.Copy(io.Discard, c)
		time.Sleep(100 * time.Millisecond)
		if _, r = rawConnect(t, s, login); r.StatusCode != 200 {
			t.Errorf("after DISCONNECT %q: %s", reason, r.Status)
		}
	}
}

// A client that says no base MTU, but what it can take inside, gets no more.
func TestMTUAlone(t *testing.T) {
	s := startServer(t, testConfig(t))
	login := signInAs(t, s, "alice", "secret")
	_, r := rawConnect(t, s, login, "X-CSTP-MTU: 1300\r\n")
	if got := r.Header.Get("X-CSTP-MTU"); got != "1300" {
		t.Errorf("MTU %s, asked for 1300", got)
	}
}

// away is a store that is out of reach.
type away struct{ Store }

func (away) Get(context.Context, string) ([]byte, error) { return nil, errors.New("out of reach") }

// Nothing is kept of strangers while the store does not answer.
func TestStrangersWhileStoreAway(t *testing.T) {
	s := startServer(t, testConfig(t))
	store := s.cfg.Store
	s.cfg.Store = away{store}
	for range 20 {
		rawConnect(t, s, &openconnect.Login{Cookie: newCookie()})
	}
	s.cfg.Store = store
	time.Sleep(2*upkeepEvery + time.Second)
	if n := len(s.sessions.all()); n > 0 {
		t.Errorf("%d sessions of strangers", n)
	}
}

// A cookie moves from our client to a stock one (docs/connect.md, SIGHUP, --authenticate), which reads one frame a record.
func TestPackedForStock(t *testing.T) {
	cfg := testConfig(t)
	cfg.Profile.NoUDP = true
	s := startServer(t, cfg)
	login := signInAs(t, s, "alice", "secret")
	first, r := rawConnect(t, s, login, "User-Agent: OpenConnect VPN Agent (Penstock)\r\n")
	if r.StatusCode != 200 {
		t.Fatal(r.Status)
	}
	first.Close() // lost, without a goodbye
	time.Sleep(200 * time.Millisecond)
	second, r := rawConnect(t, s, login, "User-Agent: Open AnyConnect VPN Agent v9.01-3\r\n")
	if r.StatusCode != 200 {
		t.Fatal(r.Status)
	}
	var c net.Conn
	eventually(t, "the client has its tunnel", func() (ok bool) {
		var err error
		c, err = s.Node().Dial(t.Context(), "udp", r.Header.Get("X-CSTP-Address")+":9")
		return err == nil
	})
	defer c.Close()
	for range 300 {
		c.Write(make([]byte, 100))
	}
	second.SetReadDeadline(time.Now().Add(2 * time.Second))
	b := make([]byte, 32<<10)
	records, packed := 0, 0
	for {
		n, err := second.Read(b) // one record
		if err != nil {
			if err != io.EOF {
				t.Log(err)
			}
			break
		}
		records++
		if n != 8+int(binary.BigEndian.Uint16(b[4:6])) {
			packed++
		}
	}
	if packed > 0 {
		t.Errorf("%d of %d records have several frames", packed, records)
	}
	t.Log(records)
}
