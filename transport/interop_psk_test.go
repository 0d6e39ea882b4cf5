package transport

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// Strangers with a pre-shared key, as in a session: OpenSSL and GnuTLS, as client and as server. They cannot be told a
// session ID, so the handshaker is asked without the App-ID having been looked up; stock openconnect and
// ocserv show that elsewhere.

// pskStranger is one DTLS implementation with a pre-shared key.
type pskStranger struct {
	name           string
	client, server func(t *testing.T, suite CipherSuite, psk, port string) *tool
	clientTool     string
	serverTool     string
}

var (
	opensslPSK = map[CipherSuite]string{PSKAES256GCM: "PSK-AES256-GCM-SHA384", PSKAES128GCM: "PSK-AES128-GCM-SHA256"}
	gnutlsPSK  = map[CipherSuite]string{
		PSKAES256GCM: "NONE:+VERS-DTLS1.2:+PSK:+AES-256-GCM:+AEAD:+COMP-NULL:+SIGN-ALL:+GROUP-ALL",
		PSKAES128GCM: "NONE:+VERS-DTLS1.2:+PSK:+AES-128-GCM:+AEAD:+COMP-NULL:+SIGN-ALL:+GROUP-ALL",
	}
)

var pskStrangers = []pskStranger{
	{
		name: "openssl", clientTool: "openssl", serverTool: "openssl",
		client: func(t *testing.T, suite CipherSuite, psk, port string) *tool {
			return startTool(t, "openssl", "s_client", "-dtls1_2", "-connect", "127.0.0.1:"+port,
				"-cipher", opensslPSK[suite], "-psk_identity", "psk", "-psk", psk, "-quiet", "-no_ign_eof")
		},
		server: func(t *testing.T, suite CipherSuite, psk, port string) *tool {
			return startTool(t, "openssl", "s_server", "-dtls1_2", "-accept", "127.0.0.1:"+port, "-naccept", "1", "-listen",
				"-cipher", opensslPSK[suite], "-nocert", "-psk", psk, "-quiet")
		},
	},
	{
		name: "gnutls", clientTool: "gnutls-cli", serverTool: "gnutls-serv",
		client: func(t *testing.T, suite CipherSuite, psk, port string) *tool {
			return startTool(t, "gnutls-cli", "-u", "-p", port, "--insecure", "--priority", gnutlsPSK[suite],
				"--pskusername", "psk", "--pskkey", psk, "127.0.0.1")
		},
		server: func(t *testing.T, suite CipherSuite, psk, port string) *tool {
			file := filepath.Join(t.TempDir(), "psk")
			if err := os.WriteFile(file, []byte("psk:"+psk+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			return startTool(t, "gnutls-serv", "-u", "-p", port, "--echo", "--priority", gnutlsPSK[suite], "--pskpasswd", file)
		},
	},
}

func forEachPSKStranger(t *testing.T, toolOf func(pskStranger) string, test func(t *testing.T, s pskStranger, suite CipherSuite, secret *sharedSecret)) {
	for _, s := range pskStrangers {
		for _, suite := range sessionSuites {
			t.Run(s.name+"/"+suite.String(), func(t *testing.T) {
				requireTool(t, toolOf(s))
				t.Parallel()
				secret := &sharedSecret{appID: "no stranger is asked for this one"[:maxAppID]}
				rand.Read(secret.psk[:])
				test(t, s, suite, secret)
			})
		}
	}
}

func testPSKHandshaker(t *testing.T) *handshaker {
	t.Helper()
	h, err := newHandshaker(PrivateKey{}, nil, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// session runs our side with a shared secret and takes the agreement over.
func (e *loopbackEnd) session(h *handshaker, client bool, secret *sharedSecret) {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	run := h.sessionClient
	if !client {
		run = h.sessionServer
		e.wantHello(ctx)
	}
	s, err := run(ctx, e.conn, secret)
	if err != nil {
		e.t.Fatal(err)
	}
	e.takeOver(s)
}

func TestStrangerCallsWithAPSK(t *testing.T) {
	toolOf := func(s pskStranger) string { return s.clientTool }
	forEachPSKStranger(t, toolOf, func(t *testing.T, s pskStranger, suite CipherSuite, secret *sharedSecret) {
		e := newLoopbackEnd(t)
		p := s.client(t, suite, hex.EncodeToString(secret.psk[:]), e.port())
		e.session(testPSKHandshaker(t), false, secret)
		e.converse(p, suite, false)
		p.stdin.Close()
		e.wantCloseNotify()
	})
}

func TestWeCallAStrangerWithAPSK(t *testing.T) {
	toolOf := func(s pskStranger) string { return s.serverTool }
	forEachPSKStranger(t, toolOf, func(t *testing.T, s pskStranger, suite CipherSuite, secret *sharedSecret) {
		remote := freePort(t)
		e := newLoopbackEnd(t)
		e.connect(remote)
		p := s.server(t, suite, hex.EncodeToString(secret.psk[:]), fmt.Sprint(remote.Port()))
		e.session(testPSKHandshaker(t), true, secret)
		e.converse(p, suite, s.name == "gnutls")
	})
}
