package config

import (
	"log/slog"
	"net/netip"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// Server is the file of penstock serve, checked.
type Server struct {
	File string

	Listen           []netip.AddrPort // TCP and UDP; empty: [::]:443
	PublicPort       int              // by which clients reach it; 0: the same
	Certificate, Key string           // files; empty: self-signed
	State            string           // folder; empty: the default
	Names            []string         // by which clients call the server
	ID               string           // among servers that share a store; empty: random
	Addresses        []netip.Prefix   // inside
	MTU              int
	MaxClients       int
	MaxPerUser       int
	ClientToClient   bool
	Socket           string // path of the control socket; empty: the default
	LogLevel         slog.Level
	LogFormat        string

	Auth    Auth
	Clients gateway.Profile
	Groups  []gateway.Group
	Ban     gateway.BanConfig
	Store   Store

	TUN       *ServerTUN             // nil: no interface of the kernel
	Router    *netstack.RouterConfig // nil: nothing is routed
	Publishes []Port
	Offload   Offload
	TCP       netstack.TCPOptions

	Warnings Mistakes
}

// ServerTUN is server.device = "tun" with the [tun] table.
type ServerTUN struct {
	Name   string
	Queues int // 0: the default
}

// Auth is the [auth] table.
type Auth struct {
	Method          gateway.Method
	Users           string // file
	ClientCA        string // file
	CertificateUser gateway.CertificateUser
}

// Store is the [store] table.
type Store struct {
	Engine   string // "memory", "bbolt" or "redis"
	Path     string // of bbolt; empty: in the state folder
	URL      string // of Redis
	Password string // of Redis, from password_file
	Name     string // of the service, in Redis
}

type rawServerFile struct {
	Server  rawServer    `toml:"server"`
	Auth    rawAuth      `toml:"auth"`
	Clients rawClients   `toml:"clients"`
	Group   []rawGroup   `toml:"group"`
	Ban     rawBan       `toml:"ban"`
	Store   rawStore     `toml:"store"`
	TUN     rawServerTUN `toml:"tun"`
	Router  rawRouter    `toml:"router"`
	Publish []rawPort    `toml:"publish"`
	Offload rawOffload   `toml:"offload"`
	TCP     rawTCP       `toml:"tcp"`
}

type rawServer struct {
	Listen         any `toml:"listen"`
	PublicPort     any `toml:"public_port"`
	Certificate    any `toml:"certificate"`
	Key            any `toml:"key"`
	State          any `toml:"state"`
	Name           any `toml:"name"`
	ID             any `toml:"id"`
	Address        any `toml:"address"`
	Device         any `toml:"device"`
	MTU            any `toml:"mtu"`
	MaxClients     any `toml:"max_clients"`
	MaxPerUser     any `toml:"max_per_user"`
	ClientToClient any `toml:"client_to_client"`
	Control        any `toml:"control"`
	Log            any `toml:"log"`
	LogFormat      any `toml:"log_format"`
}

type rawServerTUN struct {
	Name   any `toml:"name"`
	Queues any `toml:"queues"`
}

type rawAuth struct {
	Method          any `toml:"method"`
	Users           any `toml:"users"`
	ClientCA        any `toml:"client_ca"`
	CertificateUser any `toml:"certificate_user"`
}

// rawClients is [clients]; a [[group]] has the same keys and some of its own.
type rawClients struct {
	Pool                any `toml:"pool"`
	Routes              any `toml:"routes"`
	NoRoutes            any `toml:"no_routes"`
	OnlyRoutes          any `toml:"only_routes"`
	DNS                 any `toml:"dns"`
	Search              any `toml:"search"`
	SplitDNS            any `toml:"split_dns"`
	AllDNS              any `toml:"all_dns"`
	Banner              any `toml:"banner"`
	MTU                 any `toml:"mtu"`
	DPD                 any `toml:"dpd"`
	Keepalive           any `toml:"keepalive"`
	Rekey               any `toml:"rekey"`
	UDP                 any `toml:"udp"`
	IdleTimeout         any `toml:"idle_timeout"`
	SessionTimeout      any `toml:"session_timeout"`
	DisconnectedTimeout any `toml:"disconnected_timeout"`
}

type rawGroup struct {
	Name  any `toml:"name"`
	Label any `toml:"label"`
	Open  any `toml:"open"`
	rawClients
}

type rawBan struct {
	Enabled       any `toml:"enabled"`
	WrongPassword any `toml:"wrong_password"`
	Connection    any `toml:"connection"`
	Limit         any `toml:"limit"`
	Reset         any `toml:"reset"`
	Exempt        any `toml:"exempt"`
	Rate          any `toml:"rate"`
	Burst         any `toml:"burst"`
	PerAddress    any `toml:"per_address"`
	Unknown       any `toml:"unknown"`
}

type rawStore struct {
	Engine       any `toml:"engine"`
	Path         any `toml:"path"`
	URL          any `toml:"url"`
	PasswordFile any `toml:"password_file"`
	Name         any `toml:"name"`
}
