package transport

// Device is the packet side of the transport: it gives outbound packets and
// takes inbound ones. It is the batching half of wireguard's tun.Device, so any
// such device will do.
type Device interface {
	Reader

	// Write takes the packets bufs[i][offset:] in order and returns how many it
	// accepted. It borrows them until it returns and may overwrite them. Every inbound pump
	// calls it.
	Write(bufs [][]byte, offset int) (n int, err error)
}

// Reader is one stream of outbound packets. One goroutine reads it.
type Reader interface {
	// Read waits for packets and writes the i-th to bufs[i][offset:], its
	// length to sizes[i]. It borrows the buffers until it returns. len(bufs) is
	// at least BatchSize. An error that wraps [os.ErrClosed] ends the outbound
	// pump; any other is counted and Read is called again.
	Read(bufs [][]byte, sizes []int, offset int) (n int, err error)

	// BatchSize is the largest number of packets Read returns; it never changes.
	BatchSize() int
}
