package openconnect

import (
	"bufio"
	"net/http"
	"net/netip"
	"net/textproto"
	"reflect"
	"strings"
	"testing"
	"time"
)

// headerOf reads header lines as a client does.
func headerOf(t testing.TB, block []byte) http.Header {
	t.Helper()
	h, err := textproto.NewReader(bufio.NewReader(strings.NewReader(string(block) + "\r\n"))).ReadMIMEHeader()
	if err != nil {
		t.Fatalf("%v in\n%s", err, block)
	}
	return http.Header(h)
}

func TestInnerMTU(t *testing.T) {
	for _, tt := range []struct {
		base  int
		outer string
		inner int
	}{
		{1500, "192.0.2.1", 1434}, // seen on both sides, stock client and stock server
		{1500, "2001:db8::1", 1414},
		{1500, "::ffff:192.0.2.1", 1434},
		{1280, "2001:db8::1", 1194},
	} {
		if got := InnerMTU(tt.base, netip.MustParseAddr(tt.outer)); got != tt.inner {
			t.Errorf("%d over %s: %d, want %d", tt.base, tt.outer, got, tt.inner)
		}
	}
}

func fullSettings() *Settings {
	prefix := netip.MustParsePrefix
	return &Settings{
		ServerName: "Penstock", Hostname: "laptop",
		Addresses: []netip.Prefix{prefix("10.1.2.3/20"), prefix("fd00::3/64")},
		Include:   []netip.Prefix{prefix("10.0.0.0/8"), prefix("0.0.0.0/1"), prefix("fd00::/8")},
		Exclude:   []netip.Prefix{prefix("10.9.0.0/16"), prefix("fd00:9::/32")},
		DNS:       []netip.Addr{netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fd00::53")}, DefaultDomain: "corp.example lab.example",
		SplitDNS: []string{"corp.example", "lab.example"}, TunnelAllDNS: true,
		Banner: " Two\nlines, 100% of \"them\" é ",
		MTU:    1434, BaseMTU: 1500,
		CSTP:        Timers{30 * time.Second, 20 * time.Second, time.Hour, RekeyNewTunnel},
		DTLS:        Timers{31 * time.Second, 21 * time.Second, 2 * time.Hour, RekeyNone},
		IdleTimeout: 20 * time.Minute, SessionTimeout: 12 * time.Hour, SessionRemaining: 11 * time.Hour,
		DisconnectedTimeout: time.Minute, LeaseDuration: 24 * time.Hour,
		DTLSPort: 443, AppID: []byte{0, 1, 0xfe}, SessionID: make([]byte, 32),
		CipherSuite: PSKNegotiate, CipherSuite12: "AES256-GCM-SHA384",
		ClientBypass: true, CSTPEncoding: "lzs", DTLSEncoding: "oc-lz4",
	}
}

func TestSettingsRoundTrip(t *testing.T) {
	for name, want := range map[string]*Settings{"full": fullSettings(), "empty": {}} {
		block := want.AppendTo(nil)
		got, err := ParseSettings(headerOf(t, block))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v\n%+v, want\n%+v in\n%s", name, err, got, want, block)
		}
	}
}

// TestSettingsSpelling: openconnect compares header names with their case.
func TestSettingsSpelling(t *testing.T) {
	block := string(fullSettings().AppendTo(nil))
	for _, line := range []string{
		"X-CSTP-Version: 1", "X-CSTP-Address: 10.1.2.3", "X-CSTP-Netmask: 255.255.240.0", "X-CSTP-Address-IP6: fd00::3/64",
		"X-CSTP-DNS: 10.0.0.53", "X-CSTP-DNS: fd00::53", "X-CSTP-Split-Include: 0.0.0.0/128.0.0.0", "X-CSTP-Split-Exclude-IP6: fd00:9::/32",
		"X-CSTP-Rekey-Method: new-tunnel", "X-CSTP-MTU: 1434", "X-DTLS-App-ID: 0001fe", "X-DTLS-CipherSuite: PSK-NEGOTIATE",
	} {
		if !strings.Contains(block, line+"\r\n") {
			t.Errorf("no %q in\n%s", line, block)
		}
	}
}

// TestSettingsAreOneLineEach: no value makes a header of its own.
func TestSettingsAreOneLineEach(t *testing.T) {
	evil := "a\r\nX-Evil: 1\r\n\r\n"
	s := fullSettings()
	s.ServerName, s.Hostname, s.DefaultDomain, s.Banner, s.CipherSuite, s.CSTPEncoding = evil, evil, evil, evil, evil, evil
	s.SplitDNS = []string{evil}
	s.CSTP.RekeyMethod = RekeyMethod(evil)
	if h := headerOf(t, s.AppendTo(nil)); h.Get("X-Evil") != "" {
		t.Errorf("%v", h)
	}
}

func TestSettingsSeconds(t *testing.T) {
	s := &Settings{IdleTimeout: 1500 * time.Millisecond, SessionTimeout: time.Nanosecond}
	block := string(s.AppendTo(nil))
	for _, want := range []string{"X-CSTP-Idle-Timeout: 2\r\n", "X-CSTP-Session-Timeout: 1\r\n", "X-CSTP-Lease-Duration: none\r\n"} {
		if !strings.Contains(block, want) {
			t.Errorf("no %q in\n%s", want, block)
		}
	}
}

func TestSettingsMalformed(t *testing.T) {
	for _, line := range []string{
		"X-CSTP-Address: 10.0.0.256", "X-CSTP-Address: fe80::1%eth0", "X-CSTP-Netmask: 255.0.255.0", "X-CSTP-Address-IP6: fd00::1",
		"X-CSTP-Address-IP6: 10.0.0.1/8", "X-CSTP-Address: 10.0.0.1\r\nX-CSTP-Address: 10.0.0.2", "X-CSTP-DNS: example.com",
		"X-CSTP-Split-Include: 10.0.0.0/33", "X-CSTP-Split-Include: fd00::/255.0.0.0", "X-CSTP-Split-Exclude-IP6: everything", "X-CSTP-MTU: many",
		"X-CSTP-MTU: 99999999", "X-CSTP-DPD: -1", "X-CSTP-Session-Timeout: 99999999999999999999", "X-DTLS-Port: 70000",
		"X-DTLS-Port: 1\r\nX-DTLS-App-ID: xyz", "X-DTLS-Port: 1\r\nX-DTLS-App-ID: " + strings.Repeat("00", 33),
		strings.Repeat("X-CSTP-Split-Include: 10.0.0.0/8\r\n", maxRoutes) + "X-CSTP-Split-Include: 10.0.0.0/8",
	} {
		if s, err := ParseSettings(headerOf(t, []byte(line+"\r\n"))); err == nil {
			t.Errorf("%.80s: %+v", line, s)
		}
	}
}

// TestSettingsOfOthers reads spellings that stock servers use and we do not write.
func TestSettingsOfOthers(t *testing.T) {
	got, err := ParseSettings(headerOf(t, []byte(strings.ReplaceAll(`X-CSTP-Version: 1
X-CSTP-Address: 192.168.1.7
X-CSTP-Netmask: 255.255.255.0
X-CSTP-Address: fd00::7
X-CSTP-Netmask: fd00::/64
X-CSTP-DNS-IP6: fd00::53
X-CSTP-Split-Include: 10.1.2.3/255.255.255.255
X-CSTP-Split-Include: fd00:1::/32
X-CSTP-Split-Exclude: 10.9.9.9/16
X-CSTP-Split-DNS: a.example, b.example
X-CSTP-Banner: 100% sure, 50%21
X-CSTP-Rekey-Method: something
X-DTLS-MTU: 1400
X-CSTP-MTU: 1300
X-CSTP-Smartcard-Removal-Disconnect: true
`, "\n", "\r\n"))))
	if err != nil {
		t.Fatal(err)
	}
	prefix := netip.MustParsePrefix
	want := &Settings{
		Addresses: []netip.Prefix{prefix("192.168.1.7/24"), prefix("fd00::7/64")},
		DNS:       []netip.Addr{netip.MustParseAddr("fd00::53")},
		Include:   []netip.Prefix{prefix("10.1.2.3/32"), prefix("fd00:1::/32")},
		Exclude:   []netip.Prefix{prefix("10.9.0.0/16")},
		SplitDNS:  []string{"a.example", "b.example"},
		Banner:    "100% sure, 50!", MTU: 1400,
		CSTP: Timers{RekeyMethod: RekeyNone},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want\n%+v", got, want)
	}
}

// TestFitKeepsSplitRoutes: a client of IPv4 alone must not get a default route because the
// only networks are of IPv6.
func TestFitKeepsSplitRoutes(t *testing.T) {
	s := &Settings{Include: []netip.Prefix{netip.MustParsePrefix("fd00::/8")}}
	if got := s.fit(&ConnectRequest{IPv4: true}, false); len(got.Include) != 1 {
		t.Errorf("%v", got.Include)
	}
}
