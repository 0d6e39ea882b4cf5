package netstack_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/penstock-vpn/penstock/netstack"
)

// twoNodes starts two nodes on this machine that know each other: a at 10.66.0.1, b at
// 10.66.0.2.
func twoNodes() (a, b *netstack.Node) {
	var keys [2]netstack.PrivateKey
	for i := range keys {
		var err error
		if keys[i], err = netstack.GenerateKey(); err != nil {
			log.Fatal(err)
		}
	}
	loopback := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")} // any free port
	b, err := netstack.New(netstack.Config{
		PrivateKey: keys[1],
		Addresses:  []netip.Prefix{netip.MustParsePrefix("10.66.0.2/32")},
		Listen:     loopback,
		Peers: []netstack.Peer{{ // a will call
			Name: "a", PublicKey: keys[0].Public(),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	a, err = netstack.New(netstack.Config{
		PrivateKey: keys[0],
		Addresses:  []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
		Listen:     loopback,
		Peers: []netstack.Peer{{
			Name: "b", PublicKey: keys[1].Public(),
			Endpoint:   b.LocalAddrs()[0].String(),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.66.0.2/32")},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	return a, b
}

// Two nodes in one program, a TCP connection between them. Dial may be called at once: the
// first packets wait for the handshake, or are sent again.
func Example() {
	a, b := twoNodes()
	defer a.Close()
	defer b.Close()

	l, err := b.Listen("tcp", "10.66.0.2:7")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		defer c.Close()
		io.Copy(c, c) // until a has sent all
	}()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := a.Dial(ctx, "tcp", "10.66.0.2:7")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "through the tunnel")
	c.(*netstack.TCPConn).CloseWrite()
	echo, err := io.ReadAll(c)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s, from %v\n", echo, c.RemoteAddr())
	// Output: through the tunnel, from 10.66.0.2:7
}

// A web server inside the VPN, and a client for it: net/http takes a listener and a dial
// function.
func Example_http() {
	a, b := twoNodes()
	defer a.Close()
	defer b.Close()

	l, err := b.Listen("tcp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		fmt.Fprintf(w, "hello %s, this is %s", host, r.Host)
	})}
	go server.Serve(l)
	defer server.Close()

	client := &http.Client{
		Transport: &http.Transport{DialContext: a.Dial},
		Timeout:   10 * time.Second,
	}
	defer client.CloseIdleConnections()
	response, err := client.Get("http://10.66.0.2/")
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(response.Status)
	fmt.Printf("%s\n", body)
	// Output:
	// 200 OK
	// hello 10.66.0.1, this is 10.66.0.2
}

// Datagrams, and waiting for the tunnel first, which UDP does not do for you.
func ExampleNode_ListenPacket() {
	a, b := twoNodes()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := a.WaitEstablished(ctx, b.PublicKey()); err != nil {
		log.Fatal(err)
	}

	pc, err := b.ListenPacket("udp", "10.66.0.2:53")
	if err != nil {
		log.Fatal(err)
	}
	defer pc.Close()
	c, err := a.Dial(ctx, "udp", "10.66.0.2:53")
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()

	fmt.Fprint(c, "who is there?")
	buf := make([]byte, 1500)
	n, from, err := pc.ReadFrom(buf)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", buf[:n])
	pc.WriteTo([]byte("me"), from)
	if n, err = c.Read(buf); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", buf[:n])
	// Output:
	// who is there?
	// me
}

// A mistake in the configuration names the field.
func ExampleConfigError() {
	key, err := netstack.GenerateKey()
	if err != nil {
		log.Fatal(err)
	}
	_, err = netstack.New(netstack.Config{
		PrivateKey: key,
		Addresses:  []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
		MTU:        200,
	})
	fmt.Println(err)
	// Output: netstack: MTU: 200: expected 0 or 576 to 16383 bytes
}

// Status is a snapshot that prints as JSON; here, one number of it.
func ExampleNode_Status() {
	a, b := twoNodes()
	defer a.Close()
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := a.WaitEstablished(ctx, b.PublicKey()); err != nil {
		log.Fatal(err)
	}
	for _, p := range a.Status().Tunnel.Peers {
		fmt.Println(p.Name, p.State)
	}
	// Output: b established
}
