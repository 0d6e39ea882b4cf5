// Package gateway is a VPN server for OpenConnect and AnyConnect clients, on top of a
// [netstack.Node]: in userspace, without privileges unless it is to drive a kernel interface.
//
//	TCP ── doorman ── TLS ── openconnect.Handler ┬ signIn ──── Users
//	       bans, rates                           └ connector ─ sessions ─ Store
//	                                                             │
//	UDP ── netstack.Node ═══════ transport.Session ══════════════╯
//	         └ router or kernel interface
//
// Who may come in is asked of [Users], of which [UserFile] is one. A sign-in keeps nothing in memory: its
// state is sealed in a cookie. Who is in has a session, named by another cookie of which only a
// hash is kept, in a [Store]; it outlives the connections of its client, and with a store that lasts, or is
// shared, the server.
//
// docs/server.md is the operator's page.
package gateway
