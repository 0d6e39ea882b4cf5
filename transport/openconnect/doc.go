// Package openconnect speaks the control channel of the OpenConnect (AnyConnect)
// protocol, in both roles: HTTPS on which a user signs in, and the CONNECT request
// that turns the TLS connection into a tunnel.
//
//	client                                   server
//	[SignIn]   ── config-auth documents ──▶  [Handler] asks an [Authenticator]
//	           ◀── forms, then a cookie ───
//	[Connect]  ── CONNECT, X-CSTP-* ─────▶  [Handler] asks [Sessions]
//	           ◀── [Settings] as headers ──
//	[Tunnel]   ══ frames on this connection, and on UDP ══ [Handover]
//
// It ends where frames begin: what travels on the connection afterwards, and on
// DTLS beside it, is the business of package transport, which this package does
// not import. It knows neither pion nor gVisor.
//
// docs/openconnect.md describes the protocol as spoken here, with its sources.
package openconnect
