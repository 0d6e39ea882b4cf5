package netstack

// A refusal is why a flow or a packet was not routed. It is an error so that dialling
// can return it.
type refusal uint8

const (
	notRefused refusal = iota

	// The rules.
	refusedByRule
	refusedRouterItself
	refusedAddress
	refusedInsideVPN
	refusedPeer

	// The limits.
	refusedFlows
	refusedPeerFlows
	evictedHalfOpen
	evictedFlow

	// The targets.
	failedRefused
	failedNetwork
	failedHost
	failedProhibited
	failedTimeout
	failedSystem
	failedClient

	// Packets.
	refusedTTL
	refusedNoEcho
	refusedProtocol
	refusedMalformed
	droppedWaiting
	droppedSend

	refusals
)

var refusalNames = [refusals]string{
	notRefused:          "not refused",
	refusedByRule:       "not allowed",
	refusedRouterItself: "target on the router itself",
	refusedAddress:      "address of no host",
	refusedInsideVPN:    "target inside the VPN",
	refusedPeer:         "unknown peer",
	refusedFlows:        "too many flows",
	refusedPeerFlows:    "too many flows of the peer",
	evictedHalfOpen:     "too many half-open, the oldest given up",
	evictedFlow:         "too many UDP or ping flows, the oldest given up",
	failedRefused:       "refused by the target",
	failedNetwork:       "network unreachable",
	failedHost:          "host unreachable",
	failedProhibited:    "prohibited on the way",
	failedTimeout:       "no answer from the target",
	failedSystem:        "no socket to be had",
	failedClient:        "given up by the client",
	refusedTTL:          "TTL exceeded",
	refusedNoEcho:       "ping not possible here",
	refusedProtocol:     "protocol not routed",
	refusedMalformed:    "malformed",
	droppedWaiting:      "datagram while the target was dialled",
	droppedSend:         "datagram that the system did not take",
}

// Error implements error.
func (f refusal) Error() string { return refusalNames[f] }
