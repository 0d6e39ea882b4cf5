package transport

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// SessionStatus is a snapshot of a [Session].
type SessionStatus struct {
	Name   string      `json:"name"`
	Client bool        `json:"client"` // our role
	Path   SessionPath `json:"path"`   // that packets take outbound
	Why    string      `json:"why"`    // they take it
	// Remote is where datagrams go; invalid before the first handshake.
	Remote       netip.AddrPort `json:"remote"`
	StreamRemote string         `json:"stream_remote,omitempty"` // empty while there is no stream
	CipherSuite  string         `json:"cipher_suite,omitempty"`  // of the datagrams
	NoDatagrams  string         `json:"no_datagrams,omitempty"`  // why there is no channel for them

	LastHandshake   time.Time      `json:"last_handshake"` // zero: never
	LastInbound     time.Time      `json:"last_inbound"`   // by either channel
	RTT             time.Duration  `json:"rtt_ns"`         // of the last DPD exchange by datagram
	StreamRTT       time.Duration  `json:"stream_rtt_ns"`  // and by the stream
	InnerMTU        int            `json:"inner_mtu"`      // largest packet that Path carries, bytes
	OutboundPackets uint64         `json:"outbound_packets"`
	OutboundBytes   uint64         `json:"outbound_bytes"` // of IP packets
	InboundPackets  uint64         `json:"inbound_packets"`
	InboundBytes    uint64         `json:"inbound_bytes"`
	StreamOutbound  uint64         `json:"stream_outbound_packets"` // of the packets above, those by the stream
	StreamInbound   uint64         `json:"stream_inbound_packets"`
	StreamQueue     int            `json:"stream_queue_bytes"` // that wait for the stream
	Handshakes      uint64         `json:"handshakes"`
	Roamings        uint64         `json:"roamings"`
	LastError       string         `json:"last_error,omitempty"` // of the last failed handshake
	AllowedIPs      []netip.Prefix `json:"allowed_ips"`
}

// Status takes a snapshot.
func (s *Session) Status() SessionStatus {
	p := s.peer
	st := p.status()
	p.mu.Lock()
	defer p.mu.Unlock()
	out := SessionStatus{
		Name: s.cfg.Name, Client: s.cfg.Client, Path: s.path, Why: s.why, Remote: st.Remote,
		CipherSuite: st.CipherSuite, NoDatagrams: s.noDatagrams,
		LastHandshake: st.LastHandshake, LastInbound: st.LastInbound, RTT: st.RTT, StreamRTT: s.streamRTT,
		InnerMTU:        st.InnerMTU,
		OutboundPackets: st.OutboundPackets, OutboundBytes: st.OutboundBytes,
		InboundPackets: st.InboundPackets, InboundBytes: st.InboundBytes,
		StreamOutbound: s.byStream.out.packets.Load(), StreamInbound: s.byStream.in.packets.Load(),
		Handshakes: st.Handshakes, Roamings: st.Roamings, LastError: st.LastError, AllowedIPs: st.AllowedIPs,
	}
	if s.path == PathStream {
		out.InnerMTU = int(s.mtu.Load())
	}
	if stream := s.stream; stream != nil {
		out.StreamRemote = stream.conn.RemoteAddr().String()
		out.StreamQueue = stream.out.size()
		if at := s.t.clock.wall(stream.lastInbound.Load()); at.After(out.LastInbound) {
			out.LastInbound = at
		}
	}
	return out
}

func (q *streamQueue) size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.bytes
}

// sessionList is the sessions by name.
func (t *Transport) sessionList() []*Session {
	t.mu.Lock()
	list := slices.Collect(maps.Keys(t.sessions))
	t.mu.Unlock()
	slices.SortFunc(list, func(a, b *Session) int { return cmp.Compare(a.cfg.Name, b.cfg.Name) })
	return list
}
