package main

import (
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// make writes the file: random data, which nothing on the way can compress.
func (d *demoFile) make(ctx context.Context) (err error) {
	f, err := os.Create(filepath.Join(d.dir, demoName))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var seed [32]byte
	crand.Read(seed[:]) // never fails, says its documentation
	h := sha256.New()
	random := io.LimitReader(rand.NewChaCha8(seed), d.size)
	if err := d.progress.copy(ctx, "making the file", io.MultiWriter(f, h), random, d.size); err != nil {
		return fmt.Errorf("make a file of %d bytes: %w", d.size, err)
	}
	d.sum = [sha256.Size]byte(h.Sum(nil))
	return nil
}

// progress shows how far a copy is: a bar on a terminal, else a line now and then.
type progress struct {
	w        io.Writer
	terminal bool
}

func newProgress(w io.Writer) *progress {
	f, ok := w.(*os.File)
	return &progress{w: w, terminal: ok && term.IsTerminal(int(f.Fd()))}
}

// copy moves size bytes, no more and no less.
func (p *progress) copy(ctx context.Context, what string, dst io.Writer, src io.Reader, size int64) error {
	show := p.start(what, size)
	buf := make([]byte, 256<<10) // several superpackets
	for done := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return err
			}
			done += int64(n)
			show(done)
		}
		switch {
		case err == io.EOF && done == size:
			return nil
		case err == io.EOF:
			return fmt.Errorf("%d bytes of %d: %w", done, size, io.ErrUnexpectedEOF)
		case err != nil:
			return err
		}
	}
}

// start returns what is to be told of each step.
func (p *progress) start(what string, size int64) (show func(done int64)) {
	if p.terminal {
		bar := progressbar.NewOptions64(size,
			progressbar.OptionSetWriter(p.w),
			progressbar.OptionSetDescription(fmt.Sprintf("%-15s", what)),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(),
		)
		return func(done int64) { _ = bar.Set64(done) } // an error is the terminal's
	}
	next := 25
	return func(done int64) {
		if percent := int(done * 100 / size); percent >= next {
			fmt.Fprintf(p.w, "%s: %d %%\n", what, percent)
			next = percent/25*25 + 25
		}
	}
}
