package netstack

import (
	"container/list"
	"net/netip"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// Bounds of the cache: at most a thousand messages of a few KiB.
const (
	maxCached     = 1024
	maxCachedSize = 4 << 10 // bytes; larger answers are not kept
	// maxTTL and maxNegativeTTL bound how long a mistake in a zone is believed (RFC 2308 5
	// suggests one to three hours for negative ones; we are closer to the user).
	maxTTL         = time.Hour
	maxNegativeTTL = 5 * time.Minute
	// failureTTL keeps programs that retry from asking servers that do not answer (RFC 9520
	// 3.2: at least a second).
	failureTTL = time.Second
)

type dnsKey struct {
	name  string // canonical
	qtype dnsmessage.Type
	class dnsmessage.Class
	of    netip.AddrPort // see dnsRule
}

// A dnsCache holds answers until they expire. It has no lock of its own.
type dnsCache struct {
	byKey map[dnsKey]*list.Element
	used  list.List // of *dnsEntry, the last used in front
}

// dnsEntry is a message, or an error.
type dnsEntry struct {
	key     dnsKey
	msg     []byte // not to be changed
	err     error
	expires time.Time
}

// get returns what is known at now.
func (c *dnsCache) get(k dnsKey, now time.Time) (*dnsEntry, bool) {
	el := c.byKey[k]
	if el == nil {
		return nil, false
	}
	e := el.Value.(*dnsEntry)
	if !now.Before(e.expires) {
		c.remove(el)
		return nil, false
	}
	c.used.MoveToFront(el)
	return e, true
}

// put takes e. The one used longest ago goes when there are too many.
func (c *dnsCache) put(e *dnsEntry) {
	if len(e.msg) > maxCachedSize {
		return
	}
	if el := c.byKey[e.key]; el != nil {
		c.remove(el)
	}
	if c.byKey == nil {
		c.byKey = map[dnsKey]*list.Element{}
	}
	c.byKey[e.key] = c.used.PushFront(e)
	if c.used.Len() > maxCached {
		c.remove(c.used.Back())
	}
}

func (c *dnsCache) remove(el *list.Element) {
	c.used.Remove(el)
	delete(c.byKey, el.Value.(*dnsEntry).key)
}
