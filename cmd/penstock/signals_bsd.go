//go:build unix && !linux

package main

import "os"

func moreEndings() []os.Signal { return nil }
