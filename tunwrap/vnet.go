package tunwrap

import "encoding/binary"

// vnetHeaderSize is the length of struct virtio_net_hdr (linux/virtio_net.h), which stands
// before every packet of a TUN with IFF_VNET_HDR. A file may be set to longer ones.
const vnetHeaderSize = 10

// Flags in the first byte of a vnet header. The kernel also sets DATA_VALID (2), which
// says nothing that matters here.
const vnetNeedsCsum = 1

// vnetHeader is a vnet header as it lies in memory. Its fields have the byte order of the machine.
type vnetHeader [vnetHeaderSize]byte

// get reads the header. Nothing in it has been checked.
func (h *vnetHeader) get() GSO {
	return GSO{
		Type:       GSOType(h[1]),
		HdrLen:     binary.NativeEndian.Uint16(h[2:]),
		GSOSize:    binary.NativeEndian.Uint16(h[4:]),
		CsumStart:  binary.NativeEndian.Uint16(h[6:]),
		CsumOffset: binary.NativeEndian.Uint16(h[8:]),
		NeedsCsum:  h[0]&vnetNeedsCsum != 0,
	}
}

// put writes the header.
func (h *vnetHeader) put(g GSO) {
	h[0] = 0
	if g.NeedsCsum {
		h[0] = vnetNeedsCsum
	}
	h[1] = uint8(g.Type)
	binary.NativeEndian.PutUint16(h[2:], g.HdrLen)
	binary.NativeEndian.PutUint16(h[4:], g.GSOSize)
	binary.NativeEndian.PutUint16(h[6:], g.CsumStart)
	binary.NativeEndian.PutUint16(h[8:], g.CsumOffset)
}
