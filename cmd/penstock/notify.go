package main

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/penstock-vpn/penstock/netstack"
	"github.com/penstock-vpn/penstock/netstack/gateway"
)

// notifyEvery is how often the service manager is told how many peers or clients there are, if its watchdog does not
// want to hear more often.
const notifyEvery = 5 * time.Second

// A serviceManager is systemd, or whoever speaks its protocol (sd_notify(3)): it knows that the node
// is ready, how it fares and that it closes. Without $NOTIFY_SOCKET nothing is sent.
type serviceManager struct {
	log     *slog.Logger
	stop    chan struct{}
	stopped chan struct{}
}

// notifyReady tells that the node is up, and from then on how it fares, a line each time, until closing is called. The
// watchdog hears of every look at the node that came to an end: a node that is stuck is not heard of.
func notifyReady(line func() string, log *slog.Logger) *serviceManager {
	m := &serviceManager{log: log, stop: make(chan struct{}), stopped: make(chan struct{})}
	text := line()
	if !m.send(daemon.SdNotifyReady + "\nSTATUS=" + text) {
		close(m.stopped)
		return m
	}
	every, message := notifyEvery, ""
	if limit, err := daemon.SdWatchdogEnabled(false); err != nil {
		log.Warn("the service manager's watchdog", "err", err)
	} else if limit > 0 {
		every, message = min(every, limit/3), daemon.SdNotifyWatchdog+"\n"
	}
	go m.keepTelling(line, every, message, text)
	return m
}

// keepTelling sends message, and the state whenever it has changed from last.
func (m *serviceManager) keepTelling(line func() string, every time.Duration, message, last string) {
	defer close(m.stopped)
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-m.stop:
			return
		case <-tick.C:
		}
		text := line()
		switch {
		case text != last:
			m.send(message + "STATUS=" + text)
		case message != "":
			m.send(message)
		}
		last = text
	}
}

// closing tells that the node closes. A node that is stuck does not keep it waiting.
func (m *serviceManager) closing() {
	close(m.stop)
	select {
	case <-m.stopped:
	case <-time.After(time.Second):
	}
	m.send(daemon.SdNotifyStopping + "\nSTATUS=closing")
}

// send reports whether there is somebody to hear it.
func (m *serviceManager) send(state string) bool {
	sent, err := daemon.SdNotify(false, state)
	if err != nil {
		m.log.Warn("the service manager cannot be told", "err", err)
	}
	return sent
}

// nodeLine is what systemctl status shows of a node.
func nodeLine(s netstack.Status) string {
	if o := s.OpenConnect; o != nil {
		return fmt.Sprintf("%s: %s, packets by %s", o.Server, o.State, o.Path)
	}
	up := 0
	for _, p := range s.Tunnel.Peers {
		if p.State == netstack.PeerEstablished {
			up++
		}
	}
	return fmt.Sprintf("%d of %d peers established", up, len(s.Tunnel.Peers))
}

// serverLine is the same of a server.
func serverLine(s gateway.Status) string {
	return fmt.Sprintf("%d clients connected, %d sessions", s.Clients, s.Sessions)
}
