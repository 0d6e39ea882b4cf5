package netstack

import (
	"github.com/penstock-vpn/penstock/transport"
	"github.com/penstock-vpn/penstock/tunwrap"
)

// A systemTUN is an interface of the kernel.
type systemTUN struct{ *tunwrap.TUN }

func openTUN(o tunwrap.TUNOptions) (kernelTUN, error) {
	t, err := tunwrap.OpenTUN(o)
	if err != nil {
		return nil, err
	}
	return systemTUN{t}, nil
}

func (t systemTUN) streams() (all []transport.Reader) {
	for _, r := range t.Readers() {
		all = append(all, r)
	}
	return all
}

func (t systemTUN) status() TUNStatus {
	name, _ := t.Name()
	carried := t.Stats()
	s := TUNStatus{
		Name: name, Capabilities: t.Capabilities(), Drops: map[string]uint64{},
		Outbound: OutboundStatus(carried.Outbound), Inbound: InboundStatus(carried.Inbound),
	}
	addDrops(s.Drops, t.Drops())
	return s
}
