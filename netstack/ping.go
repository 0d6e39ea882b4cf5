package netstack

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/penstock-vpn/penstock/tunwrap"
)

// PingOptions say what an echo request looks like.
type PingOptions struct {
	Size     int    // bytes of data behind the ICMP header, at most 65,000
	Sequence uint16 // tells requests apart in a packet capture
}

// PingReply is what came back.
type PingReply struct {
	From netip.Addr    `json:"from"`
	Size int           `json:"size"` // bytes of ICMP, header included
	TTL  int           `json:"ttl"`  // that was left, or the hop limit
	RTT  time.Duration `json:"rtt_ns"`
}

const maxPing = 65000

// Ping sends an ICMP echo request (RFC 792, RFC 4443 4.1) from the node and waits for its reply. ctx
// bounds the waiting. The data is compared with what was sent.
func (n *Node) Ping(ctx context.Context, to netip.Addr, o PingOptions) (PingReply, error) {
	to = to.Unmap().WithZone("")
	fail := func(err error) (PingReply, error) {
		return PingReply{}, opError("ping", "ip", nil, &net.IPAddr{IP: to.AsSlice()}, n.dialErr(ctx, err))
	}
	if o.Size < 0 || o.Size > maxPing {
		return fail(syscall.EMSGSIZE)
	}
	if err := n.reachable(to); err != nil {
		return fail(err)
	}
	ctx, cancel := n.bound(ctx)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	proto, request := icmp.ProtocolNumber4, make([]byte, header.ICMPv4MinimumSize+o.Size)
	if to.Is4() {
		h := header.ICMPv4(request)
		h.SetType(header.ICMPv4Echo)
		h.SetSequence(o.Sequence)
	} else {
		proto = icmp.ProtocolNumber6
		h := header.ICMPv6(request)
		h.SetType(header.ICMPv6EchoRequest)
		h.SetSequence(o.Sequence)
	}
	data := request[header.ICMPv4MinimumSize:] // both headers have 8 bytes
	for i := range data {
		data[i] = byte(i)
	}
	var wq waiter.Queue
	ep, terr := n.stack.NewEndpoint(proto, protocolOf(to), &wq)
	if terr != nil {
		return fail(errnoOf(terr))
	}
	defer ep.Close()
	so := ep.SocketOptions()
	so.SetReceiveTTL(true)
	so.SetReceiveHopLimit(true)
	entry, readable := waiter.NewChannelEntry(waiter.ReadableEvents | alwaysEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if terr := ep.Connect(fullAddress(netip.AddrPortFrom(to, 0))); terr != nil {
		return fail(errnoOf(terr))
	}
	if at, terr := ep.GetLocalAddress(); terr == nil {
		any := netip.IPv4Unspecified()
		if to.Is6() {
			any = netip.IPv6Unspecified()
		}
		defer n.claim(tunwrap.ClaimEcho, netip.AddrPortFrom(any, at.Port), false)() // the port is the identifier
	}
	sent := time.Now()
	if _, terr := ep.Write(bytes.NewReader(request), tcpip.WriteOptions{}); terr != nil {
		return fail(errnoOf(terr))
	}
	for {
		var reply bytes.Buffer
		res, terr := ep.Read(&reply, tcpip.ReadOptions{NeedRemoteAddr: true})
		switch terr.(type) {
		case nil:
			if b := reply.Bytes(); len(b) >= header.ICMPv4MinimumSize && header.ICMPv4(b).Sequence() == o.Sequence && bytes.Equal(b[header.ICMPv4MinimumSize:], data) {
				ttl := int(res.ControlMessages.TTL)
				if res.ControlMessages.HasHopLimit {
					ttl = int(res.ControlMessages.HopLimit)
				}
				return PingReply{From: addrPort(res.RemoteAddr).Addr(), Size: len(b), TTL: ttl, RTT: time.Since(sent)}, nil
			}
		case *tcpip.ErrWouldBlock:
			select {
			case <-readable:
			case <-ctx.Done():
				return fail(ctx.Err())
			}
		default:
			return fail(errnoOf(terr))
		}
	}
}
