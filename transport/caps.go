package transport

import (
	"fmt"
	"sync"
)

// Capabilities is what the kernel does for a [UDPSocket]: probed once when the
// socket is opened, then trusted until an error withdraws it.
type Capabilities struct {
	// GSO: one message carries a whole run (UDP_SEGMENT, Linux 4.18).
	GSO Ability `json:"gso"`
	// GRO: one receive carries several datagrams of a remote (UDP_GRO, Linux 5.0).
	GRO Ability `json:"gro"`
	// DontFragment: datagrams are never fragmented on the way, so that one too
	// big is an error or a loss that path MTU discovery sees.
	DontFragment Ability `json:"dont_fragment"`
	// MessageBatches: one system call sends and receives many messages (sendmmsg,
	// recvmmsg).
	MessageBatches Ability `json:"message_batches"`
	// SourceAddress: [Run.Local] is honoured and [Inbound.Local] filled.
	SourceAddress Ability `json:"source_address"`

	// ProbedSegments is the most datagrams the kernel took in one message: 64
	// before Linux 6.9, 128 after; 0 when it was not or could not be tried.
	ProbedSegments int `json:"probed_segments"`
	// MaxSegments and MaxBytes cap one message now, by configuration and by what
	// was probed. MaxSegments is 1 when GSO is off.
	MaxSegments int `json:"max_segments"`
	MaxBytes    int `json:"max_bytes"`

	// ReceiveBuffer and SendBuffer are the sizes in force in bytes, as getsockopt
	// tells them. Linux counts its own bookkeeping in and reports twice what was
	// asked for.
	ReceiveBuffer int `json:"receive_buffer"`
	SendBuffer    int `json:"send_buffer"`
}

// An Ability is something the kernel does, or does not do.
type Ability struct {
	On bool `json:"on"`
	// Reason says why it is off, or what to watch for while it is on.
	Reason string `json:"reason,omitempty"`
}

// String is "on" or "off", with the reason if there is one.
func (a Ability) String() string {
	s := "off"
	if a.On {
		s = "on"
	}
	if a.Reason != "" {
		s += ": " + a.Reason
	}
	return s
}

func abilityOn() Ability { return Ability{On: true} }

func abilityOff(reason string) Ability { return Ability{Reason: reason} }

// ability is on when err is nil, and off because of err otherwise.
func ability(err error) Ability {
	if err != nil {
		return abilityOff(err.Error())
	}
	return abilityOn()
}

const reasonConfigured = "switched off by configuration"

// gsoCorruption cautions about the kernels that garble runs of equal segments.
// It does not switch GSO off: many paths on them work.
const gsoCorruption = "Linux 7.0 to 7.1.4 can corrupt runs of equal segments; switch GSO off if records fail to open at the peer"

// gsoCaution looks up the kernel release, as uname tells it, among those known
// to misbehave.
func gsoCaution(release string) string {
	var major, minor, patch int
	n, _ := fmt.Sscanf(release, "%d.%d.%d", &major, &minor, &patch)
	if n >= 2 && major == 7 && (minor == 0 || minor == 1 && patch <= 4) {
		return gsoCorruption
	}
	return ""
}

// capabilityState is a Capabilities that may lose an ability while in use.
type capabilityState struct {
	mu  sync.Mutex
	now Capabilities
}

func (c *capabilityState) snapshot() Capabilities {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *capabilityState) update(change func(*Capabilities)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.now)
}
