package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// MaxPath is what a socket's path may have: sun_path on the narrowest system (104
// bytes with the final zero on macOS and the BSDs; 108 on Linux).
const MaxPath = 103

// ErrRunning: another node answers on the socket.
var ErrRunning = errors.New("already running")

// systemFolder has a folder for each node that runs as a service of the system.
var systemFolder = "/run/penstock"

// Folder is where the sockets of this user's nodes are if the configuration does
// not say otherwise: the one that the service manager has made for this service,
// $XDG_RUNTIME_DIR/penstock, or a folder for this user among the system's temporary files.
func Folder() string {
	if dir := serviceFolder(); dir != "" {
		return dir
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "penstock")
	}
	return filepath.Join(os.TempDir(), "penstock-"+strconv.Itoa(os.Getuid()))
}

// serviceFolder is the folder that the service manager has made for this service, the first in
// $RUNTIME_DIRECTORY (systemd.exec(5)); empty if there is none.
func serviceFolder() string {
	if dir, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":"); filepath.IsAbs(dir) {
		return filepath.Clean(dir)
	}
	return ""
}

// Path is the default socket of the node that a configuration file describes.
func Path(configFile string) string { return filepath.Join(Folder(), nodeName(configFile)+".sock") }

func nodeName(configFile string) string {
	return strings.TrimSuffix(filepath.Base(configFile), filepath.Ext(configFile))
}

// Find is where the node of a configuration file is to be asked: at Path, or, when there is
// nothing, where it is if it runs as a service.
func Find(configFile string) string {
	path, name := Path(configFile), nodeName(configFile)
	if _, err := os.Lstat(path); err != nil {
		service := filepath.Join(systemFolder, name, name+".sock")
		if _, err := os.Lstat(service); err == nil {
			return service
		}
	}
	return path
}

// Sockets are those in Folder, and those of services of the system.
func Sockets() (paths []string) {
	folders := []string{Folder()}
	services, _ := os.ReadDir(systemFolder) // mostly there is none
	for _, s := range services {
		folders = append(folders, filepath.Join(systemFolder, s.Name()))
	}
	for _, folder := range folders {
		files, _ := os.ReadDir(folder)
		for _, f := range files {
			if path := filepath.Join(folder, f.Name()); filepath.Ext(path) == ".sock" && !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// Live are those of several sockets that somebody may answer on. A node that was killed leaves its own behind.
func Live(paths []string) []string {
	return slices.DeleteFunc(slices.Clone(paths), func(path string) bool {
		c, err := net.DialTimeout("unix", path, 2*time.Second)
		if err == nil {
			c.Close()
		}
		return err != nil && stale(err)
	})
}

// Share lets the members of a group, by name or number, open the socket at path. Who calls it is
// a member, or privileged.
func Share(path, group string) error {
	gid, err := strconv.Atoi(group)
	if err != nil {
		g, err := user.LookupGroup(group)
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return fmt.Errorf("control socket: group %s has the identifier %s", group, g.Gid)
		}
	}
	if err := os.Chown(path, -1, gid); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// Listen makes the socket at path, which only this user can open. A socket left
// behind by a node that is gone is replaced; one whose node still answers gives
// ErrRunning. The default folder is made; it must belong to this user and to nobody
// else. Any other folder must be there, that of a service included.
//
// Closing the listener removes the socket.
func Listen(path string) (net.Listener, error) {
	if len(path) > MaxPath {
		return nil, fmt.Errorf("control socket %s: the path has more than %d bytes; set [node] control", path, MaxPath)
	}
	dir := filepath.Dir(path)
	if dir == Folder() && dir != serviceFolder() {
		if err := makePrivate(dir); err != nil {
			return nil, fmt.Errorf("control socket: %w", err)
		}
	}
	// Two nodes that start at once must not both find the same stale socket.
	unlock, err := lock(dir)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(restrict) // the file is born with the mode of the socket, on Linux
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil && runtime.GOOS != "windows" {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// makePrivate makes dir, or sees that it is this user's alone: among temporary
// files anybody may have made it first.
func makePrivate(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !st.IsDir() || !ours(st) {
		return fmt.Errorf("%s is not a folder of mode 0700 that belongs to this user", dir)
	}
	return nil
}

// removeStale makes way for a new socket at path.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	// Windows shows sockets as irregular files.
	if st.Mode().Type()&(fs.ModeSocket|fs.ModeIrregular) == 0 {
		return fmt.Errorf("control socket: %s is there and is not a socket", path)
	}
	c, err := net.DialTimeout("unix", path, 2*time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("%w: a node answers on %s", ErrRunning, path)
	}
	if !stale(err) {
		return fmt.Errorf("control socket: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// stale tells whether dialling a socket failed because nobody listens.
func stale(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}
