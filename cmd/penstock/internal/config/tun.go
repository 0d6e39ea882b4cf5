package config

import (
	"fmt"
	"strings"
)

// TUN is node.device = "tun" with the [tun] table: the host's own traffic goes through a kernel
// interface.
type TUN struct {
	Name   string // of the interface; "%d" in it is the first number that is free
	Queues int    // 0: the default
	// Routes is the number of the routing table that gets a route for each prefix of the peers;
	// RoutesAuto and RoutesNone are the others.
	Routes int
	FwMark uint32 // of the UDP sockets' packets; 0: the default where the routes need one
	NoDNS  bool   // the host's resolver is left alone
}

// What TUN.Routes can be besides the number of a table.
const (
	RoutesAuto = 0  // a table of its own, with rules, so that no packet of the tunnel enters it
	RoutesNone = -1 // none at all
)

const (
	// DefaultTUN is the interface's name.
	DefaultTUN = "penstock%d"
	// maxInterface is what the kernel's IFNAMSIZ leaves without the final zero.
	maxInterface = 15
	// maxQueues is the kernel's MAX_TAP_QUEUES.
	maxQueues = 256

	wantDevice    = `"netstack" or "tun"`
	wantInterface = `the name of an interface, such as "penstock0", of at most 15 bytes`
	wantRoutes    = `"auto", "main", the number of a routing table, or false`

	tableMain, tableLocal = 254, 255 // rtnetlink(7)
)

// tun reads node.device and [tun]; nil: the node has no interface of the kernel.
func (r *reader) tun(device any, raw *rawTUN) *TUN {
	isTUN := false
	if s, ok := r.text("node.device", device, wantDevice); ok {
		if isTUN = s == "tun"; !isTUN && s != "netstack" {
			r.wrong("node.device", quoted(s)+" is no device", wantDevice)
		}
	}
	t := &TUN{Name: r.interfaceName(raw.Name), Routes: r.routes(raw.Routes)}
	t.Queues = int(r.integer("tun.queues", raw.Queues, 1, maxQueues))
	t.FwMark = uint32(r.integer("tun.fwmark", raw.FwMark, 1, 1<<32-1))
	t.NoDNS = !r.flag("tun.dns", raw.DNS)
	if isTUN {
		return t
	}
	if _, written := r.index.kinds["tun"]; written {
		r.warn("tun", "has no effect", `device = "tun" in [node]`)
	}
	return nil
}

func (r *reader) interfaceName(v any) string {
	s, ok := r.text("tun.name", v, wantInterface)
	if !ok {
		return DefaultTUN
	}
	// What dev_valid_name of the kernel refuses, and what only confuses.
	bad := strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' || c == '/' || c == ':' })
	if rest, _ := strings.CutSuffix(s, "%d"); bad || s == "." || s == ".." || strings.Contains(rest, "%") {
		r.wrong("tun.name", quoted(s)+" cannot be the name of an interface", wantInterface)
	} else if len(s) > maxInterface {
		r.wrong("tun.name", fmt.Sprintf("%s is %d bytes long", quoted(s), len(s)), wantInterface)
	}
	return s
}

func (r *reader) routes(v any) int {
	switch v := v.(type) {
	case nil:
		return RoutesAuto
	case bool:
		if !v {
			return RoutesNone
		}
		r.wrong("tun.routes", "is true", wantRoutes)
	case int64:
		switch {
		case v == tableLocal:
			r.wrong("tun.routes", "is 255, the table of the machine's own addresses", wantRoutes)
		case v < 1 || v > 1<<31-1:
			r.wrong("tun.routes", fmt.Sprintf("is %d", v), wantRoutes)
		default:
			return int(v)
		}
	case string:
		switch v {
		case "auto":
			return RoutesAuto
		case "main":
			return tableMain
		}
		r.wrong("tun.routes", quoted(v)+" is no routing table", wantRoutes)
	default:
		r.wrong("tun.routes", "is "+typeOf(v), wantRoutes)
	}
	return RoutesAuto
}
