package tunwrap

import (
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/time/rate"
	"golang.zx2c4.com/wireguard/tun"
)

// TUNOptions say which interface [OpenTUN] opens, and how.
type TUNOptions struct {
	// Name of the interface. It is made if it does not exist; "" lets the system choose,
	// and so does a name with "%d" in it on Linux.
	Name string
	// MTU of the interface in bytes; 0 leaves it as it is.
	MTU int
	// Queues is how many streams the kernel spreads flows over (IFF_MULTI_QUEUE);
	// 0 means 1. An interface that exists may allow fewer. Linux only.
	Queues int
	// FD, if positive, is an open file of a TUN interface to use instead of opening one, as a privileged
	// program hands it on. OpenTUN takes it, also when it fails. Not on Windows. On Linux it must have been
	// opened with IFF_NO_PI, which cannot be asked for afterwards (Linux 6.18 says yes to everybody).
	FD int
	// NoVnetHdr does without the vnet header, so without any offload.
	NoVnetHdr bool
	// NoGSO has the kernel split superpackets and finish checksums itself.
	NoGSO bool
	// NoGRO gives the kernel every inbound packet by itself.
	NoGRO bool
	// BatchSize is the largest number of packets of one Read; 0 means
	// DefaultBatchSize.
	BatchSize int
	// Logger takes what an operator should know; nil means none.
	Logger *slog.Logger
}

// An Ability is something that the kernel does, or does not do.
type Ability struct {
	On bool `json:"on"`
	// Reason says why it is off.
	Reason string `json:"reason,omitempty"`
}

// String is "on", or "off: " and why.
func (a Ability) String() string {
	if a.On {
		return "on"
	}
	return "off: " + a.Reason
}

func abilityOn() Ability { return Ability{On: true} }

func abilityOff(reason string) Ability { return Ability{Reason: reason} }

// TUNCapabilities are what the kernel does for a [TUN]: negotiated when it is opened, then trusted
// until a refusal withdraws it.
type TUNCapabilities struct {
	// VnetHdr: packets carry offload metadata (IFF_VNET_HDR).
	VnetHdr Ability `json:"vnet_hdr"`
	// TSO: the kernel gives TCP superpackets, and leaves checksums to us.
	TSO Ability `json:"tso"`
	// USO: likewise UDP superpackets, of a socket with UDP_SEGMENT (Linux 6.2).
	USO Ability `json:"uso"`
	// GROTCP and GROUDP: the kernel takes superpackets, UDP ones since Linux 6.2.
	GROTCP Ability `json:"gro_tcp"`
	GROUDP Ability `json:"gro_udp"`
	// Queues is how many there are.
	Queues int `json:"queues"`
}

// A TUN is a network interface of the operating system as the packet side of a tunnel. What the
// kernel sends through the interface is outbound: Read gives it, split and with finished
// checksums. Write gives inbound packets to the kernel, coalesced. Both translate addresses.
//
// One goroutine may be in Read, and one in that of each further [TUNReader]; any number in Write
// and TooBig. It has no goroutines of its own. It is also a wireguard tun.Device.
type TUN struct {
	name      string
	batchSize int
	log       *slog.Logger

	mtu    atomic.Int64
	closed atomic.Bool

	common

	readers []*TUNReader

	mu        sync.Mutex
	abilities TUNCapabilities
	events    chan tun.Event // closed by Close

	tunPlatform
}

var _ tun.Device = (*TUN)(nil)

// OpenTUN opens the interface that o describes, making it if need be. It is neither up nor
// has it addresses; both are the caller's to change. It needs CAP_NET_ADMIN, unless the interface exists
// and belongs to the user, or o.FD is given.
func OpenTUN(o TUNOptions) (*TUN, error) {
	o.Queues = max(o.Queues, 1)
	t := newTUN(o)
	if err := t.open(o); err != nil {
		name := o.Name
		if name == "" {
			name = "a new interface"
		}
		return nil, fmt.Errorf("tunwrap: open TUN %s: %w", name, err)
	}
	t.events <- tun.EventUp
	return t, nil
}

// newTUN makes a TUN without an interface.
func newTUN(o TUNOptions) *TUN {
	if o.BatchSize <= 0 {
		o.BatchSize = DefaultBatchSize
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	t := &TUN{batchSize: o.BatchSize, log: o.Logger, events: make(chan tun.Event, 4)}
	t.mtu.Store(int64(o.MTU))
	t.tooBig.limit = rate.NewLimiter(tooBigPerSecond, tooBigBurst)
	return t
}

// Name is the name that the interface had when it was opened.
func (t *TUN) Name() (string, error) { return t.name, nil }

// BatchSize is TUNOptions.BatchSize.
func (t *TUN) BatchSize() int { return t.batchSize }

// Readers are the streams of outbound packets beyond the first, which Read reads.
func (t *TUN) Readers() []*TUNReader { return t.readers[1:] }

// Read is that of the first stream; see [TUNReader.Read].
func (t *TUN) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	return t.readers[0].Read(bufs, sizes, offset)
}

// BatchSize is that of the TUN.
func (r *TUNReader) BatchSize() int { return r.t.batchSize }

// TooBig is [Wrapper.TooBig] with the kernel as the stack: its message goes into the kernel as if it had
// come through the tunnel, and fragments come out of a later Read.
func (t *TUN) TooBig(packet []byte, mtu int) {
	if t.closed.Load() {
		return
	}
	t.tooBig.report(packet, mtu, t.nat.Load(), &t.drops, t)
}

// Events tells that the device is there, once. Close closes it.
func (t *TUN) Events() <-chan tun.Event { return t.events }

// Capabilities tells what the kernel does for this interface now. Safe from any goroutine.
func (t *TUN) Capabilities() TUNCapabilities {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.abilities
}

// Close takes the interface back, unless it is a persistent one, and makes Read and Write fail with
// [os.ErrClosed], those that wait included. It does not wait for a Write that is in
// progress, and may be called twice.
func (t *TUN) Close() error {
	t.mu.Lock()
	if t.closed.Swap(true) {
		t.mu.Unlock()
		return nil
	}
	close(t.events)
	t.mu.Unlock()
	return t.closePlatform()
}

func errTUNClosed(op string) error { return fmt.Errorf("tunwrap: %s: %w", op, os.ErrClosed) }
