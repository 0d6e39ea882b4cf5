// Package stock runs the stock programs of the OpenConnect protocol in tests: openconnect as client,
// ocserv as server, as Debian has them. Both need root, and a network namespace that may be
// spoilt: they are started in the one of the calling thread (package hosts, or runtime.LockOSThread and
// netns.Set). Linux only.
//
// A test in which a program is missing is skipped, unless PENSTOCK_REQUIRE_TOOLS=1 says that this
// is a failure. All programs end with the test, and their words are in its log if it failed.
package stock
