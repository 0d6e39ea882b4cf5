package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/penstock-vpn/penstock/cmd/penstock/internal/speed"
)

// GET /speed?peer=...&test=JSON is answered by lines of JSON: samples while the test runs, then a
// result or an error.
type speedLine struct {
	Sample *speed.Sample `json:"sample,omitempty"`
	Result *speed.Result `json:"result,omitempty"`
	Error  string        `json:"error,omitempty"`
}

func (v *verbs) speed(w http.ResponseWriter, r *http.Request) {
	var t speed.Test
	if err := json.Unmarshal([]byte(r.URL.Query().Get("test")), &t); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	lateAnswer(w, t.Duration+2*dialTimeout)
	ctx, cancel := context.WithTimeout(r.Context(), t.Duration+2*dialTimeout)
	defer cancel()
	to, err := v.peer(ctx, r.URL.Query().Get("peer"))
	if err != nil {
		fail(w, err)
		return
	}
	rc := http.NewResponseController(w)
	e := json.NewEncoder(w)
	// Errors of writing are the client's, whose going away ends the request's context.
	tell := func(l speedLine) {
		_ = rc.SetWriteDeadline(time.Now().Add(writeTimeout))
		_ = e.Encode(l)
		_ = rc.Flush()
	}
	// The first thing is told by the sampling goroutine, the last when that has ended.
	result, err := speed.Run(ctx, v.node, to, t, func(s speed.Sample) { tell(speedLine{Sample: &s}) })
	if err != nil {
		tell(speedLine{Error: err.Error()})
		return
	}
	tell(speedLine{Result: result})
}

// peer finds the address of a peer by its name, or resolves host.
func (v *verbs) peer(ctx context.Context, host string) (netip.Addr, error) {
	for _, p := range v.node.Status().Tunnel.Peers {
		if p.Name != host {
			continue
		}
		for _, prefix := range p.AllowedIPs {
			if prefix.IsSingleIP() {
				return prefix.Addr(), nil
			}
		}
		return netip.Addr{}, fmt.Errorf("peer %s has no address of its own in allowed_ips: name the address", host)
	}
	addrs, err := v.node.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, err
	}
	return addrs[0], nil
}

// Speed lets the node behind the socket at path measure, and tells progress how it goes.
func Speed(ctx context.Context, path, peer string, t speed.Test, progress func(speed.Sample)) (*speed.Result, error) {
	test, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	resp, err := ask(ctx, path, "/speed?"+url.Values{"peer": {peer}, "test": {string(test)}}.Encode())
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	for d := json.NewDecoder(resp.Body); ; {
		var l speedLine
		switch err := d.Decode(&l); {
		case errors.Is(err, io.EOF):
			return nil, errors.New("the node has ended")
		case err != nil:
			return nil, asked(path, err)
		case l.Error != "":
			return nil, errors.New(l.Error)
		case l.Result != nil:
			return l.Result, nil
		case l.Sample != nil && progress != nil:
			progress(*l.Sample)
		}
	}
}
