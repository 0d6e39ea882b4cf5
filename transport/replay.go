package transport

// replayWindowSize is the number of sequence numbers behind the newest one that
// may still arrive. RFC 6347 4.1.2.6 asks for 32 and prefers 64; a GSO burst is up to 128 records,
// several of them are in flight on several queues, and a reordered burst is not a replay.
const replayWindowSize = 4096

// replayWords is one word more than the window, so that the word being
// entered never holds a bit that the window still needs (RFC 6479).
const replayWords = replayWindowSize/64 + 1

// replayWindow tells records that were seen from those that were not, for the
// 48-bit sequence numbers of one epoch. It takes 528 bytes; the zero value has
// seen nothing. It is not safe for concurrent use: check without the
// association's lock is only a hint, and mark must follow a check under the same lock.
type replayWindow struct {
	newest uint64 // the highest number marked
	seen   [replayWords]uint64
}

// check tells whether seq may still be opened: it is newer than any before it, or inside the
// window and not seen. It changes nothing, as the record is not authenticated yet.
func (w *replayWindow) check(seq uint64) bool {
	if seq > w.newest {
		return true
	}
	if w.newest-seq >= replayWindowSize {
		return false
	}
	return w.seen[seq/64%replayWords]&(1<<(seq%64)) == 0
}

// mark remembers seq, which passed check and belongs to a record that was opened. It returns
// whether the record is newer than any before it: only such a one may move the
// peer's address.
func (w *replayWindow) mark(seq uint64) (newest bool) {
	word, bit := seq/64%replayWords, uint64(1)<<(seq%64)
	if seq > w.newest {
		entered := min(seq/64-w.newest/64, replayWords)
		for i := range entered {
			w.seen[(seq/64-i)%replayWords] = 0
		}
		w.newest = seq
		w.seen[word] |= bit
		return true
	}
	// The newest number itself is unmarked only before the first record.
	newest = seq == w.newest && w.seen[word]&bit == 0
	w.seen[word] |= bit
	return newest
}

// ahead tells whether seq is newer than every record marked.
func (w *replayWindow) ahead(seq uint64) bool { return seq > w.newest }
