package tunwrap

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// An interface deleted while nobody reads: Go's poller then refuses the file, and Read still tells that it has ended.
func TestTUNGoneBetweenReads(t *testing.T) {
	leavesNothing(t)
	ns := newNamespace(t)
	dev := ns.openTUN(t, TUNOptions{Name: "pen0", MTU: 1280})
	ns.must(t, func() error {
		link, err := netlink.LinkByName("pen0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	time.Sleep(50 * time.Millisecond) // the poller learns of it
	bufs, sizes := buffers(4, 1500)
	for range 3 {
		for {
			n, err := dev.Read(bufs, sizes, headroom)
			if n > 0 {
				continue
			}
			if !errors.Is(err, os.ErrClosed) {
				t.Error(err)
			}
			break
		}
	}
}
