package transport

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/pion/logging"
)

// pionLog sends what pion has to say to slog, all of it at debug level: what matters of
// a handshake is its result, and that we log ourselves.
type pionLog struct{ log *slog.Logger }

var (
	_ logging.LoggerFactory = pionLog{}
	_ logging.LeveledLogger = pionLog{}
)

func (l pionLog) NewLogger(string) logging.LeveledLogger { return l }

func (l pionLog) printf(format string, args ...any) {
	if l.log.Enabled(context.Background(), slog.LevelDebug) {
		l.log.Debug("pion: " + fmt.Sprintf(format, args...))
	}
}

func (l pionLog) print(msg string) { l.log.Debug("pion: " + msg) }

func (l pionLog) Trace(msg string)                  { l.print(msg) }
func (l pionLog) Tracef(format string, args ...any) { l.printf(format, args...) }
func (l pionLog) Debug(msg string)                  { l.print(msg) }
func (l pionLog) Debugf(format string, args ...any) { l.printf(format, args...) }
func (l pionLog) Info(msg string)                   { l.print(msg) }
func (l pionLog) Infof(format string, args ...any)  { l.printf(format, args...) }
func (l pionLog) Warn(msg string)                   { l.print(msg) }
func (l pionLog) Warnf(format string, args ...any)  { l.printf(format, args...) }
func (l pionLog) Error(msg string)                  { l.print(msg) }
func (l pionLog) Errorf(format string, args ...any) { l.printf(format, args...) }
