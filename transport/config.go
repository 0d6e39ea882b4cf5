package transport

import (
	"log/slog"
	"net/netip"
	"time"
)

// Config describes a [Transport]. Only Conns and Device are required.
type Config struct {
	// Key is what static peers know this node by. Without one there can be none, only sessions.
	Key PrivateKey
	// Conns are the sockets. The Transport takes them: Close closes them.
	Conns []PacketConn
	// Device is the packet side. The caller keeps it, and closes it before the
	// Transport, so that the outbound pump ends.
	Device Device
	// Readers are further streams of outbound packets, each with a pump of its own beside that of
	// Device. The caller keeps them too, and ends them before it closes the Transport.
	Readers []Reader
	// TooBig is called, by any pump, with an outbound packet that is larger than what its peer's path
	// carries, and the largest size that would pass. It borrows packet until it returns.
	// nil drops such packets, counted.
	TooBig func(packet []byte, mtu int)
	// PathMTUChanged is called, never from a pump, when the smallest inner MTU over all
	// established peers has changed. It must not call Close, which waits for it. nil is allowed.
	PathMTUChanged func(innerMTU int)

	// EarlyDrop is how many bytes may wait in a socket until TCP is asked to send less: while receives find more, a
	// packet is dropped now and then. 0: none is, until the socket's buffer is full.
	EarlyDrop int

	// InnerMTU is the largest packet the Device will give, in bytes; 0 means
	// [DefaultInnerMTU]. The path is not probed beyond it. At most [MaxInnerMTU].
	InnerMTU int

	Logger *slog.Logger // nil: discarded

	// CipherSuites for static peers, in order of preference; nil means AES-128-GCM, AES-256-GCM,
	// ChaCha20-Poly1305, the last first where the CPU has no AES instructions.
	CipherSuites []CipherSuite

	Timing Timing // zero fields take their defaults

	// Half-open handshakes: in all and per source (an IPv4 address or IPv6 /64).
	// 0 takes the defaults.
	MaxHalfOpen, MaxHalfOpenPerSource int

	// ResolveEndpoint turns a peer's Endpoint into addresses. nil uses the system
	// resolver. It is called on every reconnect.
	ResolveEndpoint func(endpoint string) ([]netip.AddrPort, error)
}

// DefaultInnerMTU fits, with every record and IPv6 header, a 1500-byte outer path.
const DefaultInnerMTU = 1400

// MaxInnerMTU leaves one byte for the frame type in the largest DTLS plaintext, 2^14 bytes
// (RFC 5246 6.2.1).
const MaxInnerMTU = maxPlaintext - frameHeaderSize

// Timing are the clocks of a Transport. Zero fields take the default named.
type Timing struct {
	HandshakeRetry    time.Duration // pause after a failed handshake, doubling with jitter; 1 s
	HandshakeRetryMax time.Duration // the longest such pause; 30 s
	HandshakeTimeout  time.Duration // one attempt; 10 s
	FlightInterval    time.Duration // repetition of a handshake flight; 400 ms
	DPD               time.Duration // silence after which the peer is asked (DPD-REQ); 10 s
	DPDTimeout        time.Duration // silence after which the peer is called anew; 30 s
	Keepalive         time.Duration // idle time after which a NAT is kept open; 25 s, negative never
	RekeyAfter        time.Duration // age of an association at which it is replaced; 1 h
	RekeyAfterRecords uint64        // records outbound after which it is; 2^28, RFC 8446 5.5; at most 2^30
	Overlap           time.Duration // silence after which a replaced association is forgotten; 30 s
}

// PeerConfig describes a static peer.
type PeerConfig struct {
	Name      string // for logs and status; the public key's first 8 characters when empty
	PublicKey PublicKey
	// Endpoint is "host:port"; empty: the peer will call. Host names are resolved
	// on every reconnect.
	Endpoint string
	// AllowedIPs are the inner addresses behind the peer: packets to them go to it,
	// and only packets from them are accepted of it.
	AllowedIPs []netip.Prefix
}

// CipherSuite is a DTLS 1.2 suite by its IANA number.
type CipherSuite uint16

const (
	AES128GCM        CipherSuite = 0xC02B // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 (RFC 5289)
	AES256GCM        CipherSuite = 0xC02C // TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 (RFC 5289)
	ChaCha20Poly1305 CipherSuite = 0xCCA9 // TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 (RFC 7905)

	// Those of sessions. They cannot be chosen for peers.
	PSKAES256GCM CipherSuite = 0x00A9 // TLS_PSK_WITH_AES_256_GCM_SHA384 (RFC 5487)
	PSKAES128GCM CipherSuite = 0x00A8 // TLS_PSK_WITH_AES_128_GCM_SHA256 (RFC 5487)
)
