package transport

import (
	"testing"
	"time"
)

// A peer is asked whether it is there before it is called anew, whichever of the two times is set.
func TestDefaultsOfDPD(t *testing.T) {
	for _, set := range []Timing{{}, {DPD: time.Minute}, {DPDTimeout: 5 * time.Second}, {DPD: 40 * time.Second, DPDTimeout: 50 * time.Second}} {
		c := Config{Timing: set}
		c.setDefaults()
		if got := c.Timing; got.DPDTimeout <= got.DPD || set.DPD > 0 && got.DPD != set.DPD || set.DPDTimeout > 0 && got.DPDTimeout != set.DPDTimeout {
			t.Errorf("%v and %v become %v and %v", set.DPD, set.DPDTimeout, got.DPD, got.DPDTimeout)
		}
	}
}
