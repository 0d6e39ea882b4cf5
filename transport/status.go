package transport

import (
	"net/netip"
	"time"
)

// Status is a snapshot of a [Transport] for people and programs. The counters
// are not taken at one instant.
type Status struct {
	Peers    []PeerStatus      `json:"peers"`
	Sessions []SessionStatus   `json:"sessions,omitempty"`
	Sockets  []SocketStatus    `json:"sockets"`
	Drops    map[string]uint64 `json:"drops"` // by DropReason, only what happened
	HalfOpen int               `json:"half_open"`
}

// PeerState is how far a peer is connected.
type PeerState string

const (
	PeerIdle        PeerState = "idle"        // waits for the peer to call: it has no endpoint
	PeerConnecting  PeerState = "connecting"  // a handshake runs or is due
	PeerEstablished PeerState = "established" // packets flow
)

// PeerStatus is a peer's part of a [Status].
type PeerStatus struct {
	Name            string         `json:"name"`
	PublicKey       PublicKey      `json:"public_key"`
	Endpoint        string         `json:"endpoint,omitempty"` // as configured
	Remote          netip.AddrPort `json:"remote"`             // where it is now; invalid before the first handshake
	State           PeerState      `json:"state"`
	CipherSuite     string         `json:"cipher_suite,omitempty"`
	LastHandshake   time.Time      `json:"last_handshake"` // zero: never
	LastInbound     time.Time      `json:"last_inbound"`   // last authenticated record
	RTT             time.Duration  `json:"rtt_ns"`         // of the last DPD exchange
	InnerMTU        int            `json:"inner_mtu"`      // largest packet the path carries, bytes
	OutboundPackets uint64         `json:"outbound_packets"`
	OutboundBytes   uint64         `json:"outbound_bytes"` // of IP packets, without frame and record
	InboundPackets  uint64         `json:"inbound_packets"`
	InboundBytes    uint64         `json:"inbound_bytes"`
	Handshakes      uint64         `json:"handshakes"` // completed: the first, reconnects and rekeys
	Roamings        uint64         `json:"roamings"`
	LastError       string         `json:"last_error,omitempty"` // of the last failed handshake
	AllowedIPs      []netip.Prefix `json:"allowed_ips"`
}

// SocketStatus is a socket's part of a [Status].
type SocketStatus struct {
	Local        netip.AddrPort `json:"local"`
	Capabilities Capabilities   `json:"capabilities"` // zero for a PacketConn that is no *UDPSocket
	Stats        SocketStats    `json:"stats"`
}

// Status takes a snapshot. It is cheap enough to call every second.
func (t *Transport) Status() Status {
	s := Status{Drops: t.drops.nonZero(), HalfOpen: t.halfOpen.len()}
	for _, c := range t.conns {
		ss := SocketStatus{Local: c.LocalAddr()}
		if u, ok := c.(interface {
			Capabilities() Capabilities
			Stats() SocketStats
		}); ok {
			ss.Capabilities, ss.Stats = u.Capabilities(), u.Stats()
		}
		s.Sockets = append(s.Sockets, ss)
	}
	for _, p := range t.sortedPeers() {
		s.Peers = append(s.Peers, p.status())
	}
	for _, session := range t.sessionList() {
		s.Sessions = append(s.Sessions, session.Status())
	}
	return s
}

func (p *peer) status() PeerStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := PeerStatus{
		Name: p.name, PublicKey: p.key, Endpoint: p.endpoint, AllowedIPs: p.allowed,
		State:           p.stateLocked(),
		InnerMTU:        int(p.innerMTU.Load()),
		OutboundPackets: p.out.packets.Load(), OutboundBytes: p.out.bytes.Load(),
		InboundPackets: p.in.packets.Load(), InboundBytes: p.in.bytes.Load(),
		Handshakes: p.handshakes, Roamings: p.roamings.Load(),
		LastHandshake: p.lastHandshake,
		RTT:           p.rtt,
	}
	if at := p.lastInbound.Load(); at != 0 {
		st.LastInbound = p.t.clock.wall(at)
	}
	if p.lastErr != nil {
		st.LastError = p.lastErr.Error()
	}
	if a := p.slots.Load().newest(); a != nil {
		st.CipherSuite = a.suite.String()
		st.Remote = a.path.Load().remote
	}
	return st
}
