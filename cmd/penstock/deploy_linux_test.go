package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestUnit: systemd understands the units of docs/ and the drop-in for the kernel's interface, and finds
// little that they leave open. Nothing is started; TestSystemd does that.
func TestUnit(t *testing.T) {
	required(t, "systemd-analyze")
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	dir := t.TempDir()
	unit, err := os.ReadFile("../../docs/penstock@.service")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The program is looked for, too.
	changed := strings.Replace(string(unit), "/usr/local/bin/penstock", self, 1)
	if changed == string(unit) {
		t.Fatal("the unit starts something else than /usr/local/bin/penstock")
	}
	write := func(name, content string) {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("penstock@.service", changed)
	dropIn, err := os.ReadFile("../../docs/penstock-tun.conf")
	if err != nil {
		t.Fatal(err)
	}
	write("penstock@tun.service.d/tun.conf", string(dropIn))

	analyze := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), "systemd-analyze", args...)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":") // and the system's own
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	// What it may leave open, in tenths (0 is nothing, 100 everything): the network is what it is for.
	server, err := os.ReadFile("../../docs/penstock-serve@.service")
	if err != nil {
		t.Fatal(err)
	}
	write("penstock-serve@.service", strings.Replace(string(server), "/usr/local/bin/penstock", self, 1))
	for unit, exposure := range map[string]string{"penstock@plain.service": "14", "penstock@tun.service": "22", "penstock-serve@corp.service": "18"} {
		if out, err := analyze("verify", "--man=no", unit); err != nil || strings.Contains(out, "penstock") {
			t.Errorf("verify %s: %v\n%s", unit, err, out)
		}
		if out, err := analyze("security", "--offline=true", "--no-pager", "--threshold="+exposure, unit); err != nil {
			t.Errorf("security %s: %v\n%s", unit, err, out)
		}
	}
	broken := strings.Replace(changed, "DynamicUser=yes", "DynamicUser=perhaps", 1)
	write("penstock@.service", broken)
	if out, _ := analyze("verify", "--man=no", "penstock@plain.service"); !strings.Contains(out, "Failed to parse boolean value: perhaps") {
		t.Errorf("a mistake is not found: %s", out)
	}
}

// An image is what the last stage of docs/Containerfile makes: a folder with nothing in it but what is copied there.
type image struct {
	root                     string
	env                      []string
	uid                      uint32
	entrypoint, cmd, healthy []string
}

// buildImage follows the lines of the container file after FROM scratch.
func buildImage(t *testing.T) *image {
	t.Helper()
	file, err := os.ReadFile("../../docs/Containerfile")
	if err != nil {
		t.Fatal(err)
	}
	build, last, found := strings.Cut(string(file), "\nFROM scratch\n")
	if !found || !strings.Contains(build, "CGO_ENABLED=0 go build -trimpath -ldflags \"-s -w\" -o /root/penstock ./cmd/penstock") {
		t.Fatalf("not the container file that this test knows:\n%s", file)
	}
	im := &image{root: t.TempDir()}
	program := filepath.Join(t.TempDir(), "penstock")
	if os.Getenv("PENSTOCK_LONG") == "1" {
		goBuild := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, ".")
		goBuild.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := goBuild.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
	} else {
		copySelf(t, program, im.root)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, line := range strings.Split(last, "\n") {
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case "", "#", "EXPOSE":
		case "ENV":
			im.env = append(im.env, rest)
		case "USER":
			uid, err := strconv.ParseUint(strings.Split(rest, ":")[0], 10, 32)
			must(err)
			im.uid = uint32(uid)
		case "ENTRYPOINT":
			must(json.Unmarshal([]byte(rest), &im.entrypoint))
		case "CMD":
			must(json.Unmarshal([]byte(rest), &im.cmd))
		case "HEALTHCHECK":
			must(json.Unmarshal([]byte(strings.TrimPrefix(rest, "CMD ")), &im.healthy))
		case "COPY":
			var owner int
			var paths []string
			for _, w := range strings.Fields(rest) {
				if id, is := strings.CutPrefix(w, "--chown="); is {
					owner, err = strconv.Atoi(strings.Split(id, ":")[0])
					must(err)
				} else if !strings.HasPrefix(w, "--") {
					paths = append(paths, w)
				}
			}
			to := filepath.Join(im.root, paths[1])
			must(os.MkdirAll(filepath.Dir(to), 0o755))
			switch paths[0] {
			case "/root/penstock":
				must(os.Rename(program, to))
			case "/root/run":
				must(os.Mkdir(to, 0o755))
				must(os.Chown(to, owner, owner))
			case "/etc/ssl/certs/ca-certificates.crt": // no node of these tests needs it
			default:
				t.Fatalf("what is %s?", line)
			}
		default:
			t.Fatalf("what is %s?", line)
		}
	}
	return im
}

// copySelf makes a copy of this program, and of the libraries that a test has and the real one has not.
func copySelf(t *testing.T, program, root string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{self: program}
	libraries, _ := exec.Command("ldd", self).Output() // fails for a static one
	for _, word := range strings.Fields(string(libraries)) {
		if filepath.IsAbs(word) {
			files[word] = filepath.Join(root, word)
		}
	}
	for from, to := range files {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755)
		}
		if err == nil {
			err = os.WriteFile(to, data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// command is a program of the image, in it, as its user.
func (im *image) command(argv []string) *exec.Cmd {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Path, cmd.Dir, cmd.Env, cmd.Err = argv[0], "/", im.env, nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: im.root, Credential: &syscall.Credential{Uid: im.uid, Gid: im.uid}}
	return cmd
}

// TestContainer: the program (the static one with PENSTOCK_LONG=1, as make check sets it, which takes a build of
// everything; else this test's own) runs with nothing but what the container file gives it, as a user without
// privileges: a subnet router that answers its health check and ends at the signal for it.
func TestContainer(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("PENSTOCK_REQUIRE_NETNS") == "1" {
			t.Fatal("chroot needs root, and PENSTOCK_REQUIRE_NETNS=1")
		}
		t.Skip("chroot needs root")
	}
	im := buildImage(t)
	if out, err := im.command([]string{"/penstock", "genkey"}).CombinedOutput(); err != nil {
		t.Fatalf("genkey: %v\n%s", err, out)
	}
	config := filepath.Join(im.root, "etc/penstock/node.toml")
	if err := os.MkdirAll(filepath.Dir(config), 0o755); err != nil {
		t.Fatal(err)
	}
	key, err := im.command([]string{"/penstock", "genkey"}).Output()
	if err != nil {
		t.Fatal(err)
	}
	content := "[node]\nprivate_key = \"" + strings.TrimSpace(string(key)) + "\"\naddress = [\"10.66.0.1/24\", \"fd66::1/64\"]\nlisten = \"127.0.0.1:0\"\n" +
		"[router]\nallow = \"192.0.2.0/24\"\n"
	if err := os.WriteFile(config, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	cmd := im.command(append(im.entrypoint, im.cmd...))
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer stop.Stop()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := im.command(im.healthy).CombinedOutput()
		if err == nil && strings.Contains(string(out), "router") {
			break
		}
		if time.Now().After(end) {
			cmd.Process.Kill()
			<-ended
			t.Fatalf("never healthy: %v\n%s\n%s", err, out, log.String())
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("%v\n%s", err, log.String())
	}
	if left, _ := filepath.Glob(filepath.Join(im.root, "run/penstock/*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
