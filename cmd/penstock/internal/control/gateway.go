package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// A server answers besides
//
//	GET /sessions            200 and a list of gateway.SessionStatus
//	GET /kick?what=WHAT      200 and a Kicked
//
// What is a user, a session's ID or an address inside.

// Kicked is the answer to /kick.
type Kicked struct {
	Ended int `json:"ended"`
}

// serverVerbs are what a server does for others.
type serverVerbs struct{ server *gateway.Server }

func (v serverVerbs) handle(mux *http.ServeMux) {
	mux.HandleFunc("GET /sessions", func(w http.ResponseWriter, r *http.Request) {
		list, err := v.server.Sessions(r.Context())
		reply(w, list, err)
	})
	mux.HandleFunc("GET /kick", func(w http.ResponseWriter, r *http.Request) {
		n, err := v.server.Kick(r.Context(), r.URL.Query().Get("what"))
		reply(w, Kicked{n}, err)
	})
}

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(v) // an error is the client's: it has gone away
}

// ErrNoServer: a node answers, and it is no server.
var ErrNoServer = errors.New("is no server (penstock serve)")

// Sessions asks the server behind the socket at path for its sessions and returns them as they came.
func Sessions(ctx context.Context, path string) ([]byte, error) {
	body, err := get(ctx, path, "/sessions")
	return body, ofServer(path, err)
}

// Kick ends the sessions of a user, the one of an ID, or the one with an address.
func Kick(ctx context.Context, path, what string) (k Kicked, err error) {
	body, err := get(ctx, path, "/kick?"+url.Values{"what": {what}}.Encode())
	if err != nil {
		return k, ofServer(path, err)
	}
	return k, json.Unmarshal(body, &k)
}

func ofServer(path string, err error) error {
	var re *refusal
	if errors.As(err, &re) && re.code == http.StatusNotFound {
		return fmt.Errorf("the node behind %s %w", path, ErrNoServer)
	}
	return err
}
