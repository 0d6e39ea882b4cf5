package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// This is the rule of docs/architecture.md that a compiler cannot hold:
//
//	cmd ─> netstack ─> linkep, tunwrap, transport
//
// The three on the right never import each other. A package of another folder,
// or an arrow that is not drawn here, fails the tests below.

const module = "github.com/penstock-vpn/penstock/"

// arrows tells for each folder which others its packages may import.
var arrows = map[string][]string{
	"cmd":       {"netstack"},
	"netstack":  {"linkep", "tunwrap", "transport"},
	"linkep":    {},
	"tunwrap":   {},
	"transport": {},
}

// keepers tells which folders alone may import a dependency.
var keepers = map[string][]string{
	"github.com/pion/":         {"transport"}, // the handshake
	"gvisor.dev/":              {"netstack", "linkep", "tunwrap"},
	"golang.zx2c4.com/":        {"netstack", "tunwrap"}, // transport's engine must not lean on the one it is compared with
	"github.com/spf13/":        {"cmd"},
	"github.com/pelletier/":    {"cmd"},
	"github.com/schollz/":      {"cmd"},
	"github.com/gaissmai/bart": {"transport", "netstack", "tunwrap"},
}

// besides are the top-level folders without packages: the second and third are
// where make builds, and git ignores them.
var besides = []string{"docs", "bin", "dist"}

type listed struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func TestArrows(t *testing.T) {
	for _, goos := range []string{"linux", "darwin", "windows"} {
		for _, p := range list(t, goos) {
			folder := folderOf(p.ImportPath)
			if _, known := arrows[folder]; !known {
				t.Errorf("%s: a package outside %v", p.ImportPath, folders())
				continue
			}
			for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
				if why := forbidden(folder, i); why != "" {
					t.Errorf("GOOS=%s: %s imports %s: %s", goos, p.ImportPath, i, why)
				}
			}
		}
	}
}

// forbidden says why a package in folder must not import path; "" when it may.
func forbidden(folder, path string) string {
	for prefix, who := range keepers {
		if strings.HasPrefix(path, prefix) && !slices.Contains(who, folder) {
			return "only " + strings.Join(who, ", ") + " may"
		}
	}
	if !strings.HasPrefix(path, module) {
		return ""
	}
	if to := folderOf(path); to != folder && !slices.Contains(arrows[folder], to) {
		return "no arrow from " + folder + " to " + to
	}
	return ""
}

// TestForbidden keeps TestArrows able to fail.
func TestForbidden(t *testing.T) {
	for _, tt := range []struct {
		folder, path string
		allowed      bool
	}{
		{"cmd", module + "netstack", true},
		{"cmd", module + "cmd/penstock/internal/config", true},
		{"cmd", module + "transport", false},
		{"netstack", module + "transport", true},
		{"netstack", module + "cmd/penstock/internal/config", false},
		{"transport", module + "tunwrap", false},
		{"tunwrap", module + "linkep", false},
		{"linkep", module + "transport", false},
		{"transport", module + "netstack/vpntest", false},
		{"transport", "gvisor.dev/gvisor/pkg/tcpip", false},
		{"transport", "github.com/pion/dtls/v2", true},
		{"netstack", "github.com/pion/dtls/v2", false},
		{"linkep", "net/netip", true},
	} {
		if why := forbidden(tt.folder, tt.path); (why == "") != tt.allowed {
			t.Errorf("%s imports %s: allowed %v, want %v (%s)", tt.folder, tt.path, why == "", tt.allowed, why)
		}
	}
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		_, isFolder := arrows[e.Name()]
		if e.IsDir() && !isFolder && !slices.Contains(besides, e.Name()) && !strings.HasPrefix(e.Name(), ".") {
			t.Errorf("%s does not belong at the top of the tree; there are %v and %v", e.Name(), folders(), besides)
		}
	}
}

// list returns the module's packages as go list sees them for a system.
func list(t *testing.T, goos string) (packages []listed) {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "GOOS="+goos, "GOARCH=amd64", "CGO_ENABLED=0")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if len(packages) < len(arrows) {
		t.Fatalf("go list found %d packages, fewer than there are folders", len(packages))
	}
	return packages
}

func folderOf(path string) string {
	folder, _, _ := strings.Cut(strings.TrimPrefix(path, module), "/")
	return folder
}

func folders() (names []string) {
	for name := range arrows {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
