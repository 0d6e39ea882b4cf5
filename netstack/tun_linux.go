package netstack

import (
	"fmt"
	"os"
	"strings"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// portConflict says what is wrong when the kernel may take a port of the stack's for a
// connection of its own; "" if it may not.
func portConflict() string {
	ports, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return ""
	}
	reserved, _ := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	return portsOverlap(string(ports), string(reserved))
}

// portsOverlap compares what those two files say with the stack's range.
func portsOverlap(ports, reserved string) string {
	var first, last int
	if _, err := fmt.Sscan(ports, &first, &last); err != nil || last < tunwrap.StackPorts {
		return ""
	}
	for _, r := range strings.Split(strings.TrimSpace(reserved), ",") {
		var from, to int
		if _, err := fmt.Sscanf(r, "%d-%d", &from, &to); err == nil && from <= max(first, tunwrap.StackPorts) && to >= last {
			return ""
		}
	}
	return fmt.Sprintf("net.ipv4.ip_local_port_range is %d to %d, and the node's own connections use %d to 65535; set net.ipv4.ip_local_reserved_ports to %d-65535",
		first, last, tunwrap.StackPorts, tunwrap.StackPorts)
}
