package transport

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// controlMessage builds one as put_cmsg of the kernel does.
func controlMessage(level, typ int32, data []byte) []byte {
	b := make([]byte, unix.CmsgSpace(len(data)))
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(len(data)))
	copy(b[unix.CmsgLen(0):], data)
	return b
}

func word(n int32) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(n)) }

func aligned(b []byte) []byte {
	words := make([]uint64, (len(b)+7)/8+1)
	a := unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), len(b))
	copy(a, b)
	return a
}

func TestParseControl(t *testing.T) {
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	mapped := v4.As16()
	gro := controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(1438))
	info4 := controlMessage(unix.SOL_IP, unix.IP_PKTINFO, append(append(word(3), v4.AsSlice()...), 1, 2, 3, 4))
	info6 := controlMessage(unix.SOL_IPV6, unix.IPV6_PKTINFO, append(v6.AsSlice(), word(4)...))
	infoMapped := controlMessage(unix.SOL_IPV6, unix.IPV6_PKTINFO, append(mapped[:], word(5)...))
	ovfl := controlMessage(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, word(-1))
	other := controlMessage(unix.SOL_SOCKET, unix.SCM_TIMESTAMP, make([]byte, 16))
	joined := func(bs ...[]byte) []byte { return bytes.Join(bs, nil) }
	for _, c := range []struct {
		name string
		in   []byte
		want receiveControl
	}{
		{"none", nil, receiveControl{}},
		{"GRO", gro, receiveControl{segment: 1438}},
		{"GRO last", joined(other, info4, ovfl, gro), receiveControl{segment: 1438, local: v4, index: 3, overflow: 1<<32 - 1, overflew: true}},
		{"GRO first", joined(gro, other, info6), receiveControl{segment: 1438, local: v6, index: 4}},
		{"mapped", infoMapped, receiveControl{local: v4, index: 5}},
		{"GRO zero", controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(0)), receiveControl{}},
		{"GRO negative", controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(-5)), receiveControl{}},
		{"GRO short", controlMessage(unix.SOL_UDP, unix.UDP_GRO, []byte{1}), receiveControl{}},
		{"no padding at the end", gro[:unix.CmsgLen(4)], receiveControl{segment: 1438}},
		{"cut", gro[:unix.CmsgLen(4)-1], receiveControl{}},
		{"length zero", joined(make([]byte, unix.SizeofCmsghdr), gro), receiveControl{}},
		{"length huge", joined(bytes.Repeat([]byte{0xff}, unix.SizeofCmsghdr), gro), receiveControl{}},
	} {
		if got := parseControl(aligned(c.in)); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// FuzzParseControl compares with the parser of x/sys wherever that one accepts.
func FuzzParseControl(f *testing.F) {
	f.Add([]byte{})
	f.Add(controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(1438)))
	f.Add(append(controlMessage(unix.SOL_IPV6, unix.IPV6_PKTINFO, make([]byte, 20)), controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(9))...))
	f.Add(append(controlMessage(unix.SOL_IP, unix.IP_PKTINFO, make([]byte, 12)), controlMessage(unix.SOL_SOCKET, unix.SO_RXQ_OVFL, word(7))...))
	f.Add(append(controlMessage(1, 2, []byte{1, 2, 3}), controlMessage(unix.SOL_UDP, unix.UDP_GRO, word(0))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = aligned(b)
		input := bytes.Clone(b)
		got := parseControl(b)
		if !bytes.Equal(b, input) {
			t.Fatal("input changed")
		}
		if got.segment < 0 {
			t.Fatalf("segment %d", got.segment)
		}
		messages, err := unix.ParseSocketControlMessage(b)
		if err != nil {
			return
		}
		var want receiveControl
		for _, m := range messages {
			want.take(m.Header.Level, m.Header.Type, m.Data)
		}
		if got != want {
			t.Fatalf("%+v, want %+v", got, want)
		}
	})
}

// TestInboundTally: segment sizes that the kernel should not give divide nothing.
func TestInboundTally(t *testing.T) {
	for _, c := range []struct{ n, segment, wantSegment, wantDatagrams int }{
		{0, 0, 0, 1}, {0, 1438, 0, 1}, {100, 0, 100, 1}, {100, -1, 100, 1}, {100, 100, 100, 1},
		{100, 101, 100, 1}, {100, 99, 99, 2}, {100, 50, 50, 2}, {101, 50, 50, 3}, {3, 1, 1, 3},
	} {
		var tally inboundTally
		var in Inbound
		tally.fill(&in, c.n, c.segment)
		if in.N != c.n || in.SegmentSize != c.wantSegment || tally.datagrams != c.wantDatagrams {
			t.Errorf("%+v: %+v, %+v", c, in, tally)
		}
	}
}
