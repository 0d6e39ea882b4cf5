package hostnet

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Recover takes back what dead nodes have left in this network namespace and in /etc/resolv.conf. want
// chooses by the node's interface and owner; nil: all of them. What a living node has done is
// left alone.
func Recover(folder string, want func(name, owner string) bool) (did []Recovered, err error) {
	if want == nil {
		want = func(string, string) bool { return true }
	}
	ns, err := thisNetNS()
	if err != nil {
		return nil, err
	}
	unlock, err := lockFolder(folder)
	if errors.Is(err, fs.ErrNotExist) {
		unlock, err = func() {}, nil // no folder, no journal
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	paths, err := filepath.Glob(filepath.Join(folder, "*"+journalEnd))
	if err != nil {
		return nil, err
	}
	alive := map[string]bool{} // interfaces, of whichever namespace: /etc may be shared
	for _, path := range paths {
		j, err := openJournal(path, 0)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // taken back by its owner meanwhile
		case errors.Is(err, ErrInUse):
			name, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(path), journalEnd), "@")
			alive[name] = true
			continue
		case err != nil:
			did = append(did, Recovered{Owner: path, Err: err})
			continue
		}
		if j.owner.NetNS != ns && path == journalPath(folder, j.owner.Interface, ns) {
			// Of a container that was started anew: what it had in the kernel is gone.
			j.steps = slices.DeleteFunc(j.steps, func(s step) bool { return s.File == nil && s.Resolvconf == nil })
		} else if len(j.steps) > 0 && (j.owner.NetNS != ns || !want(j.owner.Interface, j.owner.Owner)) {
			j.file.Close()
			continue
		}
		r := Recovered{Interface: j.owner.Interface, Owner: j.owner.Owner, Steps: len(j.steps)}
		h, err := openHost(j.owner.Interface, j.owner.Index)
		if err != nil {
			j.file.Close()
			return did, err
		}
		r.Err = j.takeBack(h)
		h.close()
		if r.Steps > 0 || r.Err != nil {
			did = append(did, r)
		}
	}
	if f, name := orphan(resolvConfPath); f != nil && !alive[name] && want(name, "") {
		if _, err := os.Stat(journalPath(folder, name, ns)); errors.Is(err, fs.ErrNotExist) {
			did = append(did, Recovered{Interface: name, Steps: 1, Err: f.undo()})
		}
	}
	return did, nil
}
