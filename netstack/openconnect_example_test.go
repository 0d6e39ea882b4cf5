package netstack_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/transport/openconnect"
)

// A program that reaches a web server behind a company's VPN, without privileges and without
// any change to the machine.
func Example_openConnect() {
	answers := map[string]string{"username": "ada", "password": "lovelace"}
	login, err := openconnect.SignIn(context.Background(), openconnect.Options{
		Server: "https://vpn.example.com",
		Prompt: func(_ context.Context, q openconnect.Question) (string, error) { return answers[q.Field.Name], nil },
	})
	if err != nil {
		log.Fatal(err)
	}
	node, err := netstack.New(netstack.Config{OpenConnect: &netstack.OpenConnect{Login: *login}})
	if err != nil {
		log.Fatal(err)
	}
	defer node.Close()

	client := http.Client{Transport: &http.Transport{DialContext: node.Dial}}
	r, err := client.Get("http://wiki.corp.example/")
	if err != nil {
		log.Fatal(err)
	}
	defer r.Body.Close()
	page, _ := io.ReadAll(r.Body)
	fmt.Println(len(page))
}
