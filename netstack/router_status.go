package netstack

// RouterStatus is about a subnet router.
type RouterStatus struct {
	TCP  RouterTCPStatus `json:"tcp"`
	UDP  RouterUDPStatus `json:"udp"`
	ICMP RouterUDPStatus `json:"icmp"` // ping
	// Echo4 and Echo6 are how ping is forwarded: "unprivileged sockets", "raw
	// sockets", or "not possible: " and why.
	Echo4 string `json:"echo4"`
	Echo6 string `json:"echo6"`
	// Switched are packets passed on from one peer to another, a superpacket being one.
	Switched uint64 `json:"switched"`
	// Refused are flows and packets that were not routed, by reason; only what
	// happened.
	Refused map[string]uint64 `json:"refused"`
}

// RouterTCPStatus counts connections. The bytes are payload.
type RouterTCPStatus struct {
	Open          int    `json:"open"`      // now, half-open ones included
	HalfOpen      int    `json:"half_open"` // of these, targets that have not answered yet
	Total         uint64 `json:"total"`     // that the rules and limits let through
	Completed     uint64 `json:"completed"` // of these, connections on both sides
	BytesToTarget uint64 `json:"bytes_to_target"`
	BytesToClient uint64 `json:"bytes_to_client"`
}

// RouterUDPStatus counts flows and datagrams. The bytes are payload.
type RouterUDPStatus struct {
	Open              int    `json:"open"`
	Total             uint64 `json:"total"`
	DatagramsToTarget uint64 `json:"datagrams_to_target"`
	DatagramsToClient uint64 `json:"datagrams_to_client"`
	BytesToTarget     uint64 `json:"bytes_to_target"`
	BytesToClient     uint64 `json:"bytes_to_client"`
}

func (r *router) status() *RouterStatus {
	s := &RouterStatus{
		UDP: r.udp.status(), ICMP: r.icmp.status(),
		Echo4: r.icmp.ability[0].String(), Echo6: r.icmp.ability[1].String(),
		Refused: map[string]uint64{},
	}
	s.Switched = r.switched.Load()
	f := &r.tcp
	f.mu.Lock()
	s.TCP.Open, s.TCP.HalfOpen = f.flows, f.halfOpen.Len()
	f.mu.Unlock()
	s.TCP.Total, s.TCP.Completed = f.total.Load(), f.completed.Load()
	s.TCP.BytesToTarget, s.TCP.BytesToClient = f.toTarget.Load(), f.toClient.Load()
	for i := range r.refused {
		if n := r.refused[i].Load(); n > 0 {
			s.Refused[refusalNames[i]] = n
		}
	}
	return s
}

func (t *flowTable) status() RouterUDPStatus {
	return RouterUDPStatus{
		Open: t.open(), Total: t.total.Load(),
		DatagramsToTarget: t.datagramsToTarget.Load(), DatagramsToClient: t.datagramsToClient.Load(),
		BytesToTarget: t.bytesToTarget.Load(), BytesToClient: t.bytesToClient.Load(),
	}
}
