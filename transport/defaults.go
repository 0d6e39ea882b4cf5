package transport

import (
	"log/slog"
	"time"
)

// The defaults of Config and Timing.
const (
	defaultMaxHalfOpen          = 256
	defaultMaxHalfOpenPerSource = 32

	defaultHandshakeRetry    = time.Second
	defaultHandshakeRetryMax = 30 * time.Second
	defaultHandshakeTimeout  = 10 * time.Second
	defaultDPD               = 10 * time.Second
	defaultDPDTimeout        = 30 * time.Second
	defaultKeepalive         = 25 * time.Second
	defaultRekeyAfter        = time.Hour
	defaultRekeyAfterRecords = 1 << 28 // of 1.4 KB: the AES-GCM block limit of RFC 8446 5.5
	defaultOverlap           = 30 * time.Second
)

func (c *Config) setDefaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.TooBig == nil {
		c.TooBig = func([]byte, int) {}
	}
	setDefault(&c.InnerMTU, DefaultInnerMTU)
	setDefault(&c.MaxHalfOpen, defaultMaxHalfOpen)
	setDefault(&c.MaxHalfOpenPerSource, defaultMaxHalfOpenPerSource)
	if len(c.CipherSuites) == 0 {
		c.CipherSuites = defaultSuites()
	}
	tm := &c.Timing
	// What is set moves what belongs to it and is not. With a DPDTimeout no longer than DPD a peer that is
	// merely silent would be called anew for ever.
	if tm.DPDTimeout > 0 && tm.DPD == 0 {
		tm.DPD = min(defaultDPD, tm.DPDTimeout/3)
	}
	if tm.DPD > 0 && tm.DPDTimeout == 0 {
		tm.DPDTimeout = max(defaultDPDTimeout, 3*tm.DPD)
	}
	setDefault(&tm.HandshakeRetry, defaultHandshakeRetry)
	setDefault(&tm.HandshakeRetryMax, defaultHandshakeRetryMax)
	setDefault(&tm.HandshakeTimeout, defaultHandshakeTimeout)
	setDefault(&tm.FlightInterval, defaultFlightInterval)
	setDefault(&tm.DPD, defaultDPD)
	setDefault(&tm.DPDTimeout, defaultDPDTimeout)
	setDefault(&tm.Keepalive, defaultKeepalive)
	setDefault(&tm.RekeyAfter, defaultRekeyAfter)
	setDefault(&tm.RekeyAfterRecords, defaultRekeyAfterRecords)
	setDefault(&tm.Overlap, defaultOverlap)
	tm.RekeyAfterRecords = min(tm.RekeyAfterRecords, maxRecords/2) // sealing stops at maxRecords: leave time for the rekey
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}
