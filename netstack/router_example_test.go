package netstack_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"

	"github.com/penstock-vpn/penstock/netstack"
)

// A node becomes a transparent proxy with a few lines: whatever its peers connect to,
// its hook says where they end up.
func ExampleRouterConfig_flow() {
	inside := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "you asked for %s", r.Host)
	}))
	defer inside.Close()

	proxy := &netstack.RouterConfig{
		Flow: func(ctx context.Context, f netstack.Flow) (net.Conn, error) {
			if f.Network != "tcp" || f.Dst.Port() != 80 {
				return nil, netstack.ErrRefuse
			}
			fmt.Println(f.PeerName, "wants", f.Dst)
			var d net.Dialer
			return d.DialContext(ctx, "tcp", inside.Listener.Addr().String())
		},
	}
	client, router := vpnPair(proxy)
	defer client.Close()
	defer router.Close()

	browser := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return client.Dial(ctx, network, addr)
		},
		DisableKeepAlives: true,
	}}
	resp, err := browser.Get("http://203.0.113.80/")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Printf("%s\n", body)
	// Output:
	// laptop wants 203.0.113.80:80
	// you asked for 203.0.113.80
}

// vpnPair joins a client to a router over loopback.
func vpnPair(r *netstack.RouterConfig) (client, router *netstack.Node) {
	listen := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}
	key := func() netstack.PrivateKey {
		k, err := netstack.GenerateKey()
		if err != nil {
			log.Fatal(err)
		}
		return k
	}
	laptop, office := key(), key()
	router, err := netstack.New(netstack.Config{
		PrivateKey: office, Listen: listen, Addresses: []netip.Prefix{netip.MustParsePrefix("10.66.0.2/32")},
		Peers: []netstack.Peer{{
			Name: "laptop", PublicKey: laptop.Public(),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
		}},
		Router: r,
	})
	if err != nil {
		log.Fatal(err)
	}
	client, err = netstack.New(netstack.Config{
		PrivateKey: laptop, Listen: listen, Addresses: []netip.Prefix{netip.MustParsePrefix("10.66.0.1/32")},
		Peers: []netstack.Peer{{
			Name: "office", PublicKey: office.Public(), Endpoint: router.LocalAddrs()[0].String(),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")},
		}},
	})
	if err != nil {
		log.Fatal(err)
	}
	return client, router
}
