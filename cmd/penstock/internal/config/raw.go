package config

import (
	"reflect"
	"regexp"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
)

// rawFile is the file as go-toml decodes it. Leaves are of type any, so that a
// value of the wrong type is one mistake among others instead of the only one.
type rawFile struct {
	Node    rawNode    `toml:"node"`
	TUN     rawTUN     `toml:"tun"`
	Peer    []rawPeer  `toml:"peer"`
	Forward []rawPort  `toml:"forward"`
	Publish []rawPort  `toml:"publish"`
	DNS     rawDNS     `toml:"dns"`
	Proxy   rawProxy   `toml:"proxy"`
	Router  rawRouter  `toml:"router"`
	ACL     []rawACL   `toml:"acl"`
	Filter  rawFilter  `toml:"filter"`
	Offload rawOffload `toml:"offload"`
	TCP     rawTCP     `toml:"tcp"`
	Timing  rawTiming  `toml:"timing"`
}

type rawNode struct {
	PrivateKey     any `toml:"private_key"`
	PrivateKeyFile any `toml:"private_key_file"`
	Address        any `toml:"address"`
	Listen         any `toml:"listen"`
	MTU            any `toml:"mtu"`
	Queues         any `toml:"queues"`
	Device         any `toml:"device"`
	Control        any `toml:"control"`
	ControlGroup   any `toml:"control_group"`
	CipherSuites   any `toml:"cipher_suites"`
	Speedtest      any `toml:"speedtest"`
	Log            any `toml:"log"`
	LogFormat      any `toml:"log_format"`
}

type rawTUN struct {
	Name   any `toml:"name"`
	Queues any `toml:"queues"`
	Routes any `toml:"routes"`
	FwMark any `toml:"fwmark"`
	DNS    any `toml:"dns"`
}

type rawPeer struct {
	Name       any `toml:"name"`
	PublicKey  any `toml:"public_key"`
	Endpoint   any `toml:"endpoint"`
	AllowedIPs any `toml:"allowed_ips"`
	KnownAs    any `toml:"known_as"`
}

type rawPort struct {
	Listen any `toml:"listen"`
	To     any `toml:"to"`
}

type rawDNS struct {
	Servers any        `toml:"servers"`
	Search  any        `toml:"search"`
	Split   []rawSplit `toml:"split"`
}

type rawSplit struct {
	Domains any `toml:"domains"`
	Servers any `toml:"servers"`
	Via     any `toml:"via"`
}

type rawProxy struct {
	SOCKS5   any `toml:"socks5"`
	HTTP     any `toml:"http"`
	User     any `toml:"user"`
	Password any `toml:"password"`
}

type rawRouter struct {
	Allow             any       `toml:"allow"`
	TCP               any       `toml:"tcp"`
	TCPPerPeer        any       `toml:"tcp_per_peer"`
	HalfOpen          any       `toml:"half_open"`
	HalfOpenPerPeer   any       `toml:"half_open_per_peer"`
	HalfOpenPerTarget any       `toml:"half_open_per_target"`
	UDP               any       `toml:"udp"`
	UDPPerPeer        any       `toml:"udp_per_peer"`
	ICMP              any       `toml:"icmp"`
	ICMPPerPeer       any       `toml:"icmp_per_peer"`
	DialTimeout       any       `toml:"dial_timeout"`
	UDPIdle           any       `toml:"udp_idle"`
	DNSIdle           any       `toml:"dns_idle"`
	ICMPIdle          any       `toml:"icmp_idle"`
	Rule              []rawRule `toml:"rule"`
}

type rawRule struct {
	Action   any `toml:"action"`
	Peer     any `toml:"peer"`
	Protocol any `toml:"protocol"`
	Ports    any `toml:"ports"`
	To       any `toml:"to"`
}

type rawACL struct {
	Action    any `toml:"action"`
	Direction any `toml:"direction"`
	Peer      any `toml:"peer"`
	Protocol  any `toml:"protocol"`
	Ports     any `toml:"ports"`
	From      any `toml:"from"`
	To        any `toml:"to"`
}

type rawFilter struct {
	Flows        any `toml:"flows"`
	FlowsPerPeer any `toml:"flows_per_peer"`
	TCPIdle      any `toml:"tcp_idle"`
	UDPIdle      any `toml:"udp_idle"`
}

type rawOffload struct {
	Superpackets  any `toml:"superpackets"`
	GSO           any `toml:"gso"`
	GRO           any `toml:"gro"`
	SendBuffer    any `toml:"send_buffer"`
	ReceiveBuffer any `toml:"receive_buffer"`
	MaxSegments   any `toml:"max_segments"`
	PacingRate    any `toml:"pacing_rate"`
}

type rawTCP struct {
	CongestionControl any `toml:"congestion_control"`
	SACK              any `toml:"sack"`
	RACK              any `toml:"rack"`
}

type rawTiming struct {
	HandshakeRetry    any `toml:"handshake_retry"`
	HandshakeRetryMax any `toml:"handshake_retry_max"`
	HandshakeTimeout  any `toml:"handshake_timeout"`
	FlightInterval    any `toml:"flight_interval"`
	DPD               any `toml:"dpd"`
	DPDTimeout        any `toml:"dpd_timeout"`
	Keepalive         any `toml:"keepalive"`
	Rekey             any `toml:"rekey"`
	RekeyRecords      any `toml:"rekey_records"`
	Overlap           any `toml:"overlap"`
}

// table is what the schema knows of one table of the file.
type table struct {
	name string // with that of the table around it, "dns.split"
	many bool   // [[name]]
	keys []string
}

// A schema is the tables of a kind of file, read off the struct that it is decoded into.
type schema []table

var nodeSchema = schema(tablesIn("", reflect.TypeFor[rawFile]()))

// tablesIn reads the tables in a struct, each followed by those in it. A table of which there
// are many has none in it.
func tablesIn(around string, in reflect.Type) (tables []table) {
	for i := range in.NumField() {
		f := in.Field(i)
		if f.Type.Kind() == reflect.Interface || f.Anonymous {
			continue // a leaf, or several
		}
		t := table{name: join(around, f.Tag.Get("toml")), many: f.Type.Kind() == reflect.Slice}
		fields := f.Type
		if t.many {
			fields = fields.Elem()
		}
		for _, key := range reflect.VisibleFields(fields) {
			if !key.Anonymous { // what is embedded has its keys in this table
				t.keys = append(t.keys, key.Tag.Get("toml"))
			}
		}
		tables = append(append(tables, t), tablesIn(t.name, fields)...)
	}
	return tables
}

// Keys are all keys a node's file may have, "peer.allowed_ips" for one, in the order
// of the documentation.
func Keys() []string { return nodeSchema.names() }

func (s schema) names() (keys []string) {
	tables := map[string]bool{}
	for _, t := range s {
		tables[t.name] = true
	}
	for _, t := range s {
		for _, k := range t.keys {
			if !tables[t.name+"."+k] {
				keys = append(keys, t.name+"."+k)
			}
		}
	}
	return keys
}

var subscript = regexp.MustCompile(`\[\d+\]`)

// checkKeys reports every key that the schema does not know, with the nearest
// that it does.
func (r *reader) checkKeys() {
	known, table := map[string]bool{}, map[string]bool{}
	var tables []string
	for _, t := range r.schema {
		known[t.name], table[t.name] = true, true
		if !strings.Contains(t.name, ".") {
			tables = append(tables, t.name)
		}
		for _, k := range t.keys {
			known[t.name+"."+k] = true
		}
	}
	for _, path := range r.index.keys {
		plain := subscript.ReplaceAllString(path, "")
		inside, key, nested := "", plain, false
		if dot := strings.LastIndexByte(plain, '.'); dot >= 0 {
			inside, key, nested = plain[:dot], plain[dot+1:], true
		}
		switch {
		case known[plain]:
			continue
		case nested && !table[inside]:
			// What is around it is the mistake: an unknown table, or a leaf written as one,
			// which is a mistake of type, found later.
			continue
		case !nested:
			r.wrongAt(path, "", "unknown key "+quoted(plain), r.wantKey(plain, "", tables))
		default:
			r.wrongAt(path, inside, "unknown key "+quoted(key), r.wantKey(key, inside, tables))
		}
	}
}

// wantKey says which key was meant: one of the same table, a table, or the same
// key of another table.
func (r *reader) wantKey(key, inside string, tables []string) string {
	candidates := tables
	for _, t := range r.schema {
		if t.name == inside {
			candidates = t.keys
		}
	}
	if n := nearest(key, candidates); n != "" {
		return n
	}
	for _, t := range r.schema {
		for _, k := range t.keys {
			if k == key {
				return k + " in " + header(t)
			}
		}
	}
	return "one of " + strings.Join(candidates, ", ")
}

// checkTables reports every table that is none, and [x] where [[x]] is meant or
// the other way round.
func (r *reader) checkTables() {
	for _, t := range r.schema {
		kind, written := r.index.kinds[t.name]
		if !written {
			continue
		}
		switch {
		case t.many && kind == unstable.Array:
			for n := 0; ; n++ {
				p := element(t.name, n)
				kind, written := r.index.kinds[p]
				if !written {
					break
				}
				if kind != unstable.InlineTable && kind != unstable.Table {
					r.wrong(p, "is "+kindName(kind), "a table, {...}")
				}
			}
		case t.many && kind != unstable.ArrayTable:
			r.wrong(t.name, "is "+kindName(kind), header(t)+", in two brackets, since there may be several")
		case !t.many && kind == unstable.ArrayTable:
			r.wrong(t.name, "is in two brackets", header(t)+", since there is only one")
		case !t.many && kind != unstable.Table && kind != unstable.InlineTable:
			r.wrong(t.name, "is "+kindName(kind), "a table, "+header(t))
		}
	}
}

func header(t table) string {
	if t.many {
		return "[[" + t.name + "]]"
	}
	return "[" + t.name + "]"
}

func kindName(k unstable.Kind) string {
	switch k {
	case unstable.Table, unstable.InlineTable:
		return "a table"
	case unstable.ArrayTable:
		return "a list of tables"
	case unstable.Array:
		return "a list"
	case unstable.String:
		return "a string"
	case unstable.Bool:
		return "true or false"
	case unstable.Integer:
		return "an integer"
	case unstable.Float:
		return "a number with a fraction"
	default:
		return "a date or a time"
	}
}
