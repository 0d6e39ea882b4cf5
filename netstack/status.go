package netstack

import (
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"

	"github.com/penstock-vpn/penstock/linkep"
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// Status is a snapshot of a [Node] for people and programs; its JSON form is stable.
// The counters are not taken at one instant.
type Status struct {
	PublicKey PublicKey        `json:"public_key"`
	Addresses []netip.Prefix   `json:"addresses"`
	Started   time.Time        `json:"started"`
	MTU       int              `json:"mtu"` // largest packet that leaves now, bytes
	GSO       bool             `json:"gso"` // whether the stack sends superpackets
	Tunnel    transport.Status `json:"tunnel"`
	Queue     QueueStatus      `json:"queue"`
	Outbound  OutboundStatus   `json:"outbound"`
	Inbound   InboundStatus    `json:"inbound"`
	TCP       TCPStatus        `json:"tcp"`
	UDP       UDPStatus        `json:"udp"`
	Relays    []RelayStatus    `json:"relays"` // of Forward and Publish
	// OpenConnect is nil when the node is no client of an OpenConnect server.
	OpenConnect *OpenConnectStatus `json:"openconnect,omitempty"`
	// Router is nil when the node routes nothing.
	Router *RouterStatus `json:"router,omitempty"`
	// ACL is nil when everything may pass.
	ACL *ACLStatus `json:"acl,omitempty"`
	// TUN is nil when the node has no interface of the kernel.
	TUN *TUNStatus `json:"tun,omitempty"`
	// Drops are packets given up outside of the tunnel, by reason; only what
	// happened. Those of the tunnel are in Tunnel.Drops.
	Drops map[string]uint64 `json:"drops"`
}

// QueueStatus is about the queue between the stack and the tunnel.
type QueueStatus struct {
	Packets int    `json:"packets"` // waiting now, a superpacket being one
	Bytes   int    `json:"bytes"`   // memory they are charged with
	Bound   int    `json:"bound"`   // of Bytes
	Wakeups uint64 `json:"wakeups"` // how often the tunnel slept and was woken
}

// OutboundStatus counts packets on their way from the stack to the tunnel.
type OutboundStatus struct {
	Packets      uint64 `json:"packets"`      // from the stack, a superpacket being one
	Superpackets uint64 `json:"superpackets"` // of these, those that needed splitting
	Segments     uint64 `json:"segments"`     // what they became
	Bytes        uint64 `json:"bytes"`        // of the segments, IP headers included
}

// InboundStatus counts packets on their way from the tunnel to the stack.
type InboundStatus struct {
	Segments     uint64 `json:"segments"`
	Bytes        uint64 `json:"bytes"`
	Packets      uint64 `json:"packets"`      // for the stack, a superpacket being one
	Superpackets uint64 `json:"superpackets"` // of these, those made of several segments
}

// TCPStatus counts over all connections of the node.
type TCPStatus struct {
	Established       uint64 `json:"established"` // connections now
	ActiveOpens       uint64 `json:"active_opens"`
	PassiveOpens      uint64 `json:"passive_opens"`
	FailedConnections uint64 `json:"failed_connections"`
	SegmentsSent      uint64 `json:"segments_sent"` // superpackets count once
	SegmentsReceived  uint64 `json:"segments_received"`
	Retransmits       uint64 `json:"retransmits"`
	FastRetransmits   uint64 `json:"fast_retransmits"`
	Timeouts          uint64 `json:"timeouts"`
	SACKRecoveries    uint64 `json:"sack_recoveries"`
	ResetsSent        uint64 `json:"resets_sent"`
	ResetsReceived    uint64 `json:"resets_received"`
	ListenOverflows   uint64 `json:"listen_overflows"` // connections refused for a full backlog
}

// UDPStatus counts over all UDP sockets of the node.
type UDPStatus struct {
	Sent          uint64 `json:"sent"`
	Received      uint64 `json:"received"`
	UnknownPort   uint64 `json:"unknown_port"`
	ReceiveErrors uint64 `json:"receive_errors"` // no room in the socket's buffer
}

// Status takes a snapshot. It is cheap enough to call every second.
func (n *Node) Status() Status {
	link, wrapped, drops := n.link.Stats(), n.wrapper.Stats(), n.wrapper.Drops()
	s := Status{
		PublicKey: n.public,
		Addresses: n.Addresses(),
		Started:   n.started,
		MTU:       int(n.link.MTU()),
		GSO:       !n.cfg.NoGSO,
		Tunnel:    n.transport.Status(),
		Queue:     QueueStatus{Bound: n.cfg.QueueBytes * len(link.Queues)},
		Outbound:  OutboundStatus(wrapped.Outbound),
		Inbound:   InboundStatus(wrapped.Inbound),
		Drops:     dropsOf(link, drops),
	}
	for _, q := range link.Queues {
		s.Queue.Packets += q.Depth
		s.Queue.Bytes += q.DepthBytes
		s.Queue.Wakeups += q.Wakeups
	}
	st := n.stack.Stats()
	s.TCP, s.UDP = tcpStatus(&st), udpStatus(&st)
	s.Relays = n.relays()
	s.OpenConnect = n.OpenConnect()
	s.ACL = n.aclStatus()
	if n.router != nil {
		s.Router = n.router.status()
	}
	if n.tun != nil {
		t := n.tun.status()
		divided := n.fork.Stats()
		t.ToKernel, t.ToStack, t.PortConflict = divided.ToKernel, divided.ToStack, n.portConflict
		s.TUN = &t
	}
	return s
}

// dropsOf names the drops of link endpoint and wrapper.
func dropsOf(link linkep.Stats, wrapped tunwrap.Drops) map[string]uint64 {
	m := map[string]uint64{}
	add := func(reason string, n uint64) {
		if n > 0 {
			m[reason] += n
		}
	}
	for _, q := range link.Queues {
		add("outbound queue full", q.DroppedFull)
		add("outbound queue closed", q.Refused)
	}
	add("stack not attached", link.NotAttached)
	add("not an IP packet", link.Malformed)
	addDrops(m, wrapped)
	return m
}

// addDrops adds the reasons that have happened.
func addDrops(m map[string]uint64, drops tunwrap.Drops) {
	for d, n := range drops {
		if n > 0 {
			m[tunwrap.Drop(d).String()] += n
		}
	}
}

func tcpStatus(st *tcpip.Stats) TCPStatus {
	t := &st.TCP
	return TCPStatus{
		Established:       t.CurrentEstablished.Value(),
		ActiveOpens:       t.ActiveConnectionOpenings.Value(),
		PassiveOpens:      t.PassiveConnectionOpenings.Value(),
		FailedConnections: t.FailedConnectionAttempts.Value(),
		SegmentsSent:      t.SegmentsSent.Value(),
		SegmentsReceived:  t.ValidSegmentsReceived.Value(),
		Retransmits:       t.Retransmits.Value(),
		FastRetransmits:   t.FastRetransmit.Value(),
		Timeouts:          t.Timeouts.Value(),
		SACKRecoveries:    t.SACKRecovery.Value(),
		ResetsSent:        t.ResetsSent.Value(),
		ResetsReceived:    t.ResetsReceived.Value(),
		ListenOverflows:   t.ListenOverflowSynDrop.Value() + t.ListenOverflowAckDrop.Value(),
	}
}

func udpStatus(st *tcpip.Stats) UDPStatus {
	u := &st.UDP
	return UDPStatus{
		Sent:          u.PacketsSent.Value(),
		Received:      u.PacketsReceived.Value(),
		UnknownPort:   u.UnknownPortErrors.Value(),
		ReceiveErrors: u.ReceiveBufferErrors.Value(),
	}
}
