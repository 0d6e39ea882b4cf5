package config

import (
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/penstock-vpn/penstock/netstack/gateway"
)

var serverSchema = schema(tablesIn("", reflect.TypeFor[rawServerFile]()))

// ServerKeys are all keys a server's file may have.
func ServerKeys() []string { return serverSchema.names() }

// IsServer tells whether file is that of a server: it has a table [server]. A file that cannot be read is none.
func IsServer(file string) bool {
	data, _, err := readFile(file)
	if err != nil {
		return false
	}
	var whole map[string]any
	if toml.Unmarshal(data, &whole) != nil {
		return strings.Contains("\n"+string(data), "\n[server]")
	}
	_, server := whole["server"]
	_, node := whole["node"]
	return server && !node
}

// LoadServer reads the file of a server. Its error is [Mistakes], or what the system says when the
// file cannot be read.
func LoadServer(file string) (*Server, error) {
	data, _, err := readFile(file)
	if err != nil {
		return nil, err
	}
	c, r, err := parseServer(file, data)
	if err != nil {
		return nil, err
	}
	for _, path := range []*string{&c.Certificate, &c.Key, &c.State, &c.Socket, &c.Auth.Users, &c.Auth.ClientCA, &c.Store.Path} {
		if *path != "" {
			*path = beside(file, *path)
		}
	}
	if name := c.Store.Password; name != "" {
		text, mode, err := readFile(beside(file, name))
		if err != nil {
			r.wrong("store.password_file", err.Error(), "a file with the password")
			return nil, r.sorted()
		}
		if othersRead(mode) {
			r.warn("store.password_file", fmt.Sprintf("%s can be read by every user (mode %04o)", quoted(name), mode.Perm()), "0600")
		}
		c.Store.Password = strings.TrimSpace(string(text))
	}
	if st, err := os.Stat(c.Key); c.Key != "" && err == nil && othersRead(st.Mode()) {
		r.warn("server.key", fmt.Sprintf("%s can be read by every user (mode %04o)", quoted(c.Key), st.Mode().Perm()), "0600")
	}
	c.Warnings = r.warnings
	return c, nil
}

// ParseServer checks data, the content of file, without looking at other files: paths are as they are
// written. Its error is [Mistakes]. It borrows data.
func ParseServer(file string, data []byte) (*Server, error) {
	c, _, err := parseServer(file, data)
	return c, err
}

func parseServer(file string, data []byte) (*Server, *reader, error) {
	raw, r, err := decode[rawServerFile](file, data, serverSchema)
	if err != nil {
		return nil, nil, err
	}
	c := &Server{File: file}
	r.server(c, &raw.Server)
	c.Auth = r.auth(&raw.Auth)
	c.Clients = r.profile("clients", &raw.Clients)
	for i := range raw.Group {
		c.Groups = append(c.Groups, r.group(element("group", i), &raw.Group[i]))
	}
	c.Ban = r.ban(&raw.Ban)
	c.Store = r.store(&raw.Store)
	c.TUN = r.serverTUN(raw.Server.Device, &raw.TUN)
	c.Router = r.router(&raw.Router, nil)
	for i := range raw.Publish {
		c.Publishes = append(c.Publishes, r.port(element("publish", i), &raw.Publish[i]))
	}
	c.Offload = r.offload(&raw.Offload)
	c.TCP = r.tcp(&raw.TCP)
	r.serverTogether(c)
	if err := r.sorted(); err != nil {
		return nil, nil, err
	}
	c.Warnings = r.warnings
	return c, r, nil
}

const (
	wantServerListen = `an address and a port of this machine, such as "0.0.0.0:443" or "[::]:443"`
	wantServerName   = `a name or an address by which clients call this server, such as "vpn.example.net"`
	wantInside       = `an address inside the VPN with the clients' network, such as "10.9.0.1/24" or "fd66:9::1/64"`
	wantPool         = `a prefix or a range of addresses, such as "10.9.0.0/24" or "10.9.0.10-10.9.0.99"`
	wantRoute        = `a prefix that clients reach here, such as "192.168.1.0/24" or "::/0"`
)

func (r *reader) server(c *Server, raw *rawServer) {
	c.Listen = r.listenAt("server.listen", raw.Listen, wantServerListen)
	c.PublicPort = int(r.integer("server.public_port", raw.PublicPort, 1, 65535))
	c.Certificate, _ = r.text("server.certificate", raw.Certificate, "the path of a PEM file")
	c.Key, _ = r.text("server.key", raw.Key, "the path of a PEM file")
	if (raw.Certificate == nil) != (raw.Key == nil) {
		there, missing := "server.certificate", "server.key"
		if raw.Certificate == nil {
			there, missing = missing, there
		}
		r.wrongAt(there, missing, "is missing", "certificate and key together, or neither for a self-signed one")
	}
	c.State, _ = r.text("server.state", raw.State, "the path of a folder")
	for _, it := range r.texts("server.name", raw.Name, wantServerName) {
		if _, err := netip.ParseAddr(it.text); err != nil && !isHostName(it.text) {
			r.wrong(it.path, quoted(it.text)+" is neither a name nor an address", wantServerName)
		}
		c.Names = append(c.Names, it.text)
	}
	if s, ok := r.text("server.id", raw.ID, "a name among the servers that share a store"); ok {
		c.ID = s
	}
	c.Addresses = r.addressesAt("server.address", raw.Address, wantInside)
	least := int64(minMTU4)
	if slices.ContainsFunc(c.Addresses, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		least = minMTU6
	}
	c.MTU = int(r.integer("server.mtu", raw.MTU, least, maxMTU))
	c.MaxClients = int(r.integer("server.max_clients", raw.MaxClients, 1, 1<<20))
	c.MaxPerUser = int(r.integer("server.max_per_user", raw.MaxPerUser, 1, 1<<20))
	c.ClientToClient = raw.ClientToClient != nil && r.flag("server.client_to_client", raw.ClientToClient)
	c.Socket = r.socket("server.control", raw.Control)
	c.LogLevel, c.LogFormat = r.log("server", raw.Log, raw.LogFormat)
}

func (r *reader) auth(raw *rawAuth) (a Auth) {
	const wantMethod = `"password", "certificate", "either" or "both"`
	a.Method = gateway.Password
	if s, ok := r.text("auth.method", raw.Method, wantMethod); ok {
		a.Method = gateway.Method(s)
		if !slices.Contains([]gateway.Method{gateway.Password, gateway.Certificate, gateway.Either, gateway.Both}, a.Method) {
			r.wrong("auth.method", quoted(s)+" is no way to sign in", wantMethod)
		}
	}
	const wantUsers = "the path of the users' file, which penstock user makes"
	var ok bool
	if a.Users, ok = r.text("auth.users", raw.Users, wantUsers); !ok && raw.Users == nil {
		r.wrong("auth.users", "is missing", wantUsers)
	}
	const wantCA = "the path of a PEM file with who signs the clients' certificates"
	if a.ClientCA, ok = r.text("auth.client_ca", raw.ClientCA, wantCA); !ok && raw.ClientCA == nil && a.Method != gateway.Password {
		r.wrong("auth.client_ca", "is missing", wantCA)
	}
	const wantUser = `"cn", "uid", "email", "dns" or "uri"`
	if s, ok := r.text("auth.certificate_user", raw.CertificateUser, wantUser); ok {
		a.CertificateUser = gateway.CertificateUser(s)
		if !slices.Contains([]gateway.CertificateUser{gateway.CertificateCN, gateway.CertificateUID, gateway.CertificateEmail, gateway.CertificateDNS, gateway.CertificateURI}, a.CertificateUser) {
			r.wrong("auth.certificate_user", quoted(s)+" is no name that certificates have", wantUser)
		}
	}
	return a
}

// profile reads [clients], or the part of a [[group]] that is like it.
func (r *reader) profile(at string, raw *rawClients) (p gateway.Profile) {
	for _, it := range r.texts(at+".pool", raw.Pool, wantPool) {
		a, err := gateway.ParseRange(it.text)
		if err != nil {
			r.wrong(it.path, strings.TrimPrefix(err.Error(), "gateway: "), wantPool)
			continue
		}
		p.Pool = append(p.Pool, a)
	}
	p.Routes = r.prefixes(at+".routes", raw.Routes, wantRoute)
	p.NoRoutes = r.prefixes(at+".no_routes", raw.NoRoutes, wantRoute)
	p.OnlyRoutes = raw.OnlyRoutes != nil && r.flag(at+".only_routes", raw.OnlyRoutes)
	const wantDNS = `the address of a name server, such as "10.9.0.1"`
	for _, it := range r.texts(at+".dns", raw.DNS, wantDNS) {
		a, err := netip.ParseAddr(it.text)
		if err != nil || unusable(a) != "" {
			r.wrong(it.path, quoted(it.text)+" cannot be a name server's address", wantDNS)
			continue
		}
		p.DNS = append(p.DNS, a)
	}
	domains := func(key string, v any) (names []string) {
		for _, it := range r.texts(at+"."+key, v, wantDomain) {
			if name, ok := r.domain(it, false); ok {
				names = append(names, name)
			}
		}
		return names
	}
	p.Search, p.SplitDNS = domains("search", raw.Search), domains("split_dns", raw.SplitDNS)
	p.AllDNS = raw.AllDNS != nil && r.flag(at+".all_dns", raw.AllDNS)
	const maxBanner = 4 << 10
	if p.Banner, _ = r.text(at+".banner", raw.Banner, "a text"); len(p.Banner) > maxBanner {
		r.wrong(at+".banner", fmt.Sprintf("has %d bytes", len(p.Banner)), fmt.Sprintf("at most %d", maxBanner))
	}
	p.MTU = int(r.integer(at+".mtu", raw.MTU, minMTU4, maxMTU))
	const day = 24 * time.Hour
	p.DPD = r.duration(at+".dpd", raw.DPD, time.Second, time.Hour, false)
	p.Keepalive = r.duration(at+".keepalive", raw.Keepalive, time.Second, day, false)
	p.Rekey = r.duration(at+".rekey", raw.Rekey, 10*time.Second, 30*day, true)
	p.NoUDP = !r.flag(at+".udp", raw.UDP)
	p.IdleTimeout = r.duration(at+".idle_timeout", raw.IdleTimeout, 10*time.Second, 365*day, false)
	p.SessionTimeout = r.duration(at+".session_timeout", raw.SessionTimeout, 10*time.Second, 365*day, false)
	p.DisconnectedTimeout = r.duration(at+".disconnected_timeout", raw.DisconnectedTimeout, time.Second, 30*day, false)
	return p
}

// prefixes reads a list of networks.
func (r *reader) prefixes(path string, v any, want string) (list []netip.Prefix) {
	for _, it := range r.texts(path, v, want) {
		p, problem := parsePrefix(it.text)
		switch {
		case problem != "":
			r.wrong(it.path, quoted(it.text)+" "+problem, want)
			continue
		case p != p.Masked():
			r.wrong(it.path, quoted(it.text)+" has bits set after its prefix",
				fmt.Sprintf("%v for the network or %v for the one address", p.Masked(), netip.PrefixFrom(p.Addr(), p.Addr().BitLen())))
		case slices.Contains(list, p):
			r.wrong(it.path, quoted(it.text)+" is there twice", "each prefix once")
		}
		list = append(list, p)
	}
	return list
}

func (r *reader) group(at string, raw *rawGroup) (g gateway.Group) {
	const wantName = "a name without spaces, colons and commas, and not \"default\""
	var ok bool
	if g.Name, ok = r.text(at+".name", raw.Name, wantName); !ok && raw.Name == nil {
		r.wrong(at+".name", "is missing", wantName)
	} else if problem := gateway.CheckName(g.Name); ok && (problem != "" || strings.Contains(g.Name, ",") || g.Name == gateway.DefaultGroup) {
		r.wrong(at+".name", quoted(g.Name)+" cannot be a group's name", wantName)
	}
	g.Label, _ = r.text(at+".label", raw.Label, "what users see")
	g.Open = raw.Open != nil && r.flag(at+".open", raw.Open)
	g.Profile = r.profile(at, &raw.rawClients)
	return g
}

func (r *reader) ban(raw *rawBan) (b gateway.BanConfig) {
	points := func(key string, v any) int {
		n := int(r.integer("ban."+key, v, 0, 1<<20))
		if v != nil && n == 0 {
			return -1 // none, unlike the default
		}
		return n
	}
	number := func(key string, v any) int { return int(r.integer("ban."+key, v, 1, 1<<20)) }
	b.Off = !r.flag("ban.enabled", raw.Enabled)
	b.WrongPassword, b.Connection = points("wrong_password", raw.WrongPassword), points("connection", raw.Connection)
	b.Limit = number("limit", raw.Limit)
	b.Reset = r.duration("ban.reset", raw.Reset, time.Second, 30*24*time.Hour, false)
	b.Exempt = r.prefixes("ban.exempt", raw.Exempt, `a prefix, such as "192.0.2.0/24"`)
	b.Rate, b.Burst = number("rate", raw.Rate), number("burst", raw.Burst)
	b.PerAddress, b.Unknown = number("per_address", raw.PerAddress), number("unknown", raw.Unknown)
	return b
}

func (r *reader) store(raw *rawStore) (s Store) {
	const wantEngine = `"memory", "bbolt" or "redis"`
	s.Engine = "memory"
	if e, ok := r.text("store.engine", raw.Engine, wantEngine); ok {
		if s.Engine = e; e != "memory" && e != "bbolt" && e != "redis" {
			r.wrong("store.engine", quoted(e)+" is no engine", wantEngine)
		}
	}
	const wantURL = `a URL such as "redis://127.0.0.1:6379/0", "rediss://..." or "unix:///run/redis.sock"`
	s.Path, _ = r.text("store.path", raw.Path, "the path of a file")
	var ok bool
	if s.URL, ok = r.text("store.url", raw.URL, wantURL); ok && !strings.Contains(s.URL, "://") {
		r.wrong("store.url", "is no URL", wantURL)
	}
	s.Password, _ = r.text("store.password_file", raw.PasswordFile, "the path of a file")
	s.Name, _ = r.text("store.name", raw.Name, "a name for this service")
	for _, k := range []struct {
		key, engine string
		v           any
	}{{"path", "bbolt", raw.Path}, {"url", "redis", raw.URL}, {"password_file", "redis", raw.PasswordFile}, {"name", "redis", raw.Name}} {
		if k.v != nil && s.Engine != k.engine {
			r.wrong("store."+k.key, "is of no use to "+s.Engine, `engine = "`+k.engine+`", or not this key`)
		}
	}
	if s.Engine == "redis" && raw.URL == nil {
		r.wrong("store.url", "is missing", wantURL)
	}
	return s
}

// serverTogether finds what is wrong between the parts.
func (r *reader) serverTogether(c *Server) {
	names := map[string]int{}
	for i, g := range c.Groups {
		if j, twice := names[g.Name]; twice && g.Name != "" {
			r.wrong(element("group", i)+".name", quoted(g.Name)+fmt.Sprintf(" is also the group on line %d", r.index.line(element("group", j)+".name")), "a name of its own")
		}
		names[g.Name] = i
		if len(g.Pool) == 0 && len(c.Clients.Pool) == 0 && r.index.at["clients.pool"] == 0 && r.index.at[element("group", i)+".pool"] == 0 {
			r.wrong(element("group", i)+".pool", "is missing, here and in [clients]", wantPool)
		}
	}
	if len(c.Groups) == 0 && len(c.Clients.Pool) == 0 && r.index.at["clients.pool"] == 0 {
		r.wrong("clients.pool", "is missing", wantPool)
	}
	own := func(a netip.Addr) bool {
		return slices.ContainsFunc(c.Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
	}
	for i, p := range c.Publishes {
		if a := hostAddr(p.Listen); a.IsValid() && !a.IsUnspecified() && len(c.Addresses) > 0 && !own(a) {
			r.wrong(element("publish", i)+".listen", a.String()+" is not an address of this server", "one of server.address")
		}
	}
	r.portsTogether("publish", c.Publishes)
	switch {
	case c.TUN != nil && c.Router != nil:
		r.wrong("router", `is there beside device = "tun", with which the kernel routes`, "one of them")
	case c.TUN == nil && c.Router == nil:
		r.warn("server", "has no [router]: clients reach nothing but the server itself", `[router] with allow = [...], or device = "tun"`)
	}
	if c.TUN != nil {
		r.poolsOnLink(c, "clients.pool", c.Clients.Pool)
		for i, g := range c.Groups {
			r.poolsOnLink(c, element("group", i)+".pool", g.Pool)
		}
	}
}

// poolsOnLink finds pools to which the kernel would have no route: it has one to the network of each address.
func (r *reader) poolsOnLink(c *Server, path string, pool gateway.Pool) {
	for _, a := range pool {
		onLink := slices.ContainsFunc(c.Addresses, func(p netip.Prefix) bool { return p.Contains(a.First) && p.Contains(a.Last) })
		if !onLink && len(c.Addresses) > 0 {
			r.wrong(path, a.String()+" is not within the network of any address of the server", "a pool within one of server.address, which the kernel routes")
		}
	}
}

// serverTUN reads server.device and [tun].
func (r *reader) serverTUN(device any, raw *rawServerTUN) *ServerTUN {
	isTUN := false
	if s, ok := r.text("server.device", device, wantDevice); ok {
		if isTUN = s == "tun"; !isTUN && s != "netstack" {
			r.wrong("server.device", quoted(s)+" is no device", wantDevice)
		}
	}
	t := &ServerTUN{Name: r.interfaceName(raw.Name), Queues: int(r.integer("tun.queues", raw.Queues, 1, maxQueues))}
	if isTUN {
		return t
	}
	if _, written := r.index.kinds["tun"]; written {
		r.warn("tun", "has no effect", `device = "tun" in [server]`)
	}
	return nil
}
