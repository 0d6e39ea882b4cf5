//go:build !unix

package netstack

import (
	"testing"
	"time"
)

// processTime is not known here; nothing is reported.
func processTime(testing.TB) time.Duration { return 0 }
