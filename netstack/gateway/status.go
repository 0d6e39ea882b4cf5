package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Status is a snapshot of a [Server] for people and programs; its JSON form is stable. What
// the node does is in its own.
type Status struct {
	Listen       []netip.AddrPort `json:"listen"`
	Started      time.Time        `json:"started"`
	Clients      int              `json:"clients"`  // with a tunnel now
	Sessions     int              `json:"sessions"` // those that wait for their client included
	SignIns      uint64           `json:"sign_ins"`
	WrongSignIns uint64           `json:"wrong_sign_ins"`
	// Refused are connections that were closed unread, by reason; only what happened.
	Refused map[string]uint64 `json:"refused"`
	Bans    uint64            `json:"bans"`   // since the start
	Banned  []BanStatus       `json:"banned"` // now
}

// SessionStatus is one session.
type SessionStatus struct {
	ID        string         `json:"id"`
	User      string         `json:"user"`
	Group     string         `json:"group,omitempty"`
	Addresses []netip.Addr   `json:"addresses"`
	Connected bool           `json:"connected"`
	Server    string         `json:"server"` // which of those that share the store has it
	Remote    netip.AddrPort `json:"remote"`
	Agent     string         `json:"agent"` // what the client says of itself
	Since     time.Time      `json:"since"` // of sign-in
	Expires   time.Time      `json:"expires,omitzero"`
	// What follows is known to the server that has it.
	Path          string        `json:"path,omitempty"` // "datagrams" or "stream": by which packets go
	CipherSuite   string        `json:"cipher_suite,omitempty"`
	MTU           int           `json:"mtu,omitempty"`
	RTT           time.Duration `json:"rtt_ns,omitempty"`
	InboundBytes  uint64        `json:"inbound_bytes"`
	OutboundBytes uint64        `json:"outbound_bytes"`

	id string
}

// Status takes a snapshot.
func (s *Server) Status() Status {
	st := Status{
		Listen: s.Addrs(), Started: s.started,
		SignIns: s.signIns.Load(), WrongSignIns: s.wrongSignIns.Load(),
		Refused: map[string]uint64{},
	}
	for _, session := range s.sessions.all() {
		st.Sessions++
		if session.connected() {
			st.Clients++
		}
	}
	st.Banned, st.Bans = s.scores.status(time.Now())
	for why, reason := range map[admission]string{refusedBanned: "banned", refusedRate: "too often", refusedTooMany: "too many at once"} {
		if n := s.refused[why].Load(); n > 0 {
			st.Refused[reason] = n
		}
	}
	s.strangers.mu.Lock()
	if n := s.strangers.full; n > 0 {
		st.Refused["displaced by newer ones"] = n
	}
	s.strangers.mu.Unlock()
	return st
}

// Sessions lists all sessions in the store, those of other servers too, by user.
func (s *Server) Sessions(ctx context.Context) ([]SessionStatus, error) {
	found, err := s.cfg.Store.List(ctx, sessionKey)
	if err != nil {
		return nil, storeError(err)
	}
	list := make([]SessionStatus, 0, len(found))
	for key, raw := range found {
		var r record
		if json.Unmarshal(raw, &r) != nil {
			continue
		}
		id := strings.TrimPrefix(key, sessionKey)
		st := SessionStatus{
			ID: publicID(id), id: id, User: r.User, Group: r.Group, Addresses: r.Address, Connected: r.Connected,
			Server: r.Server, Remote: r.Remote, Agent: r.Agent, Since: r.Created, Expires: r.Expires,
		}
		if session := s.sessions.find(id); session != nil {
			session.fill(&st)
		}
		list = append(list, st)
	}
	slices.SortFunc(list, func(a, b SessionStatus) int {
		return cmp.Or(strings.Compare(a.User, b.User), a.Since.Compare(b.Since), strings.Compare(a.id, b.id))
	})
	return list, nil
}

// fill adds what only this server knows.
func (s *session) fill(st *SessionStatus) {
	s.mu.Lock()
	t := s.tunnel
	s.mu.Unlock()
	if t == nil {
		return
	}
	p := t.handle.Status()
	st.Path, st.CipherSuite, st.MTU, st.RTT = string(p.Path), p.CipherSuite, p.InnerMTU, p.RTT
	st.InboundBytes, st.OutboundBytes = p.InboundBytes, p.OutboundBytes
	if p.Remote.IsValid() {
		st.Remote = p.Remote
	}
}
