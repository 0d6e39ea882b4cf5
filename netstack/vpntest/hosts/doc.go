// Package hosts makes the hosts of a test: network namespaces, joined by veths, in which the test
// makes sockets, interfaces and processes. Linux only, as root; a test that cannot have them
// is skipped, unless PENSTOCK_REQUIRE_NETNS=1 says that this is a failure.
package hosts
