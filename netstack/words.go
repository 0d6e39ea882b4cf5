package netstack

import "github.com/penstock-vpn/penstock/transport"

// The words of the transport that appear in this package's API, so that a
// program that embeds a node imports one package.
type (
	// PrivateKey is the identity of a node.
	PrivateKey = transport.PrivateKey
	// PublicKey names a peer.
	PublicKey = transport.PublicKey
	// Timing are the clocks of a tunnel; zero fields take their defaults.
	Timing = transport.Timing
	// CipherSuite is a DTLS 1.2 suite by its IANA number.
	CipherSuite = transport.CipherSuite
)

// PeerEstablished is the PeerStatus.State of a peer to which packets flow.
const PeerEstablished = transport.PeerEstablished

// The suites a tunnel can use.
const (
	AES128GCM        = transport.AES128GCM
	AES256GCM        = transport.AES256GCM
	ChaCha20Poly1305 = transport.ChaCha20Poly1305
)

// GenerateKey makes a PrivateKey from the system's random source.
func GenerateKey() (PrivateKey, error) { return transport.GenerateKey() }

// ParsePrivateKey reads the base64 text form of a private key.
func ParsePrivateKey(s string) (PrivateKey, error) { return transport.ParsePrivateKey(s) }

// ParsePublicKey reads the base64 text form of a public key.
func ParsePublicKey(s string) (PublicKey, error) { return transport.ParsePublicKey(s) }
