# Penstock. "make help" lists the targets; CI runs .ci/run.

GO ?= go
# Which benchmarks, as a regular expression, and how often.
BENCH ?= .
COUNT ?= 1
# Seconds of fuzzing, shared by all targets.
FUZZTIME ?= 60
# Seconds of fuzzing for each parser of what OpenConnect's strangers send; empty: their share.
PARSERTIME ?=
# Where the demo's file gets its size.
SIZE ?= 512MiB

ifeq ($(CI),true)
export PENSTOCK_REQUIRE_TOOLS ?= 1
endif
export FUZZTIME PARSERTIME

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/penstock, a static program
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/penstock ./cmd/penstock

.PHONY: demo
demo: ## download a file through a tunnel between two nodes, with GSO and without
	@$(GO) run ./cmd/penstock demo --size $(SIZE)

.PHONY: tools
tools:
	@.ci/tools

.PHONY: test
test: tools ## go vet and every test that can run here
	$(GO) vet ./...
	$(GO) test ./...

.PHONY: race
race: ## every test under the race detector (needs a C compiler)
	$(GO) test -race ./...

.PHONY: netns
netns: ## the tests in network namespaces, required to run (as root)
	PENSTOCK_REQUIRE_NETNS=1 $(GO) test ./tunwrap/... ./transport/... ./netstack/... ./cmd/...

.PHONY: fuzz
fuzz: ## every fuzz target in turn, FUZZTIME seconds in all
	@.ci/fuzz

.PHONY: bench
bench: ## benchmarks: BENCH=regexp, COUNT=n
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -count $(COUNT) ./...

.PHONY: bench-tun
bench-tun: ## kernel interfaces beside wireguard-go's, in namespaces (as root): PAIRS=n SPAN=seconds
	@.ci/bench-tun

.PHONY: bench-openconnect
bench-openconnect: ## the same for the OpenConnect protocol, beside openconnect and ocserv
	@.ci/bench-openconnect

.PHONY: lint
lint: ## gofmt, go vet, staticcheck
	@unformatted=$$(gofmt -l $$($(GO) list -f '{{.Dir}}' ./...)); \
	if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# What else has to build, tests included (vet compiles them).
SYSTEMS := darwin/arm64 windows/amd64 freebsd/amd64 linux/arm64 linux/386 linux/arm

.PHONY: cross
cross: ## build and vet for the other systems and for 32 bits
	@set -e; for system in $(SYSTEMS); do \
		echo "$$system"; \
		CGO_ENABLED=0 GOOS=$${system%/*} GOARCH=$${system#*/} $(GO) build ./...; \
		CGO_ENABLED=0 GOOS=$${system%/*} GOARCH=$${system#*/} $(GO) vet ./...; \
	done

.PHONY: long
long: ## the tests that are shortened in the ordinary run, at full length
	PENSTOCK_LONG=1 $(GO) test -count 1 -run 'ShortFlows' ./netstack
	PENSTOCK_LONG=1 $(GO) test -count 1 -run 'Container' ./cmd/penstock

.PHONY: check
check: PARSERTIME := 60
check: lint test long race fuzz cross ## everything: lint, tests, race, fuzzing, other systems
