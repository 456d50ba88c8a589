# sempervirt: what there is to do. Each target is one script in scripts/, which CI calls as well.
#
#   make            this list
#   make demo       everything from a fresh Debian machine to a VM that survives 20 kills

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo setup system-packages venv binaries guest debian-guest test lint format wheel \
	lock fuzz fuzz-api worlds records layers torture torture-guard restarts saved-states corruption moves migration-kills bench bench-migrate \
	scale fresh clean

help: ## this list
	@echo "sempervirt: keeps QEMU/KVM virtual machines running, and moves them"
	@echo
	@awk -F ' *## *' '/^[a-z-]+:.*## /  { sub(/:.*/, "", $$1); printf "  make %-16s %s\n", $$1, $$2 } \
	                  /^## /            { printf "\n%s\n", substr($$0, 4) }' Makefile
	@echo
	@echo "A new machine (Debian 12 or 13) needs only git and make; 'make demo' installs the rest."

## To see it work
demo: setup guest ## boot a VM, kill its disk's backend 20 times under load, show that nothing was lost
	.venv/bin/semper demo $(ARGS)

## To build
setup: ## system packages, Python environment and Rust programs; leaves semper in .venv/bin
	@scripts/setup

guest: setup ## the small Linux guest of the demo and the tests: Debian's own kernel, our first process
	@scripts/guest

debian-guest: guest ## the second guest: a lean Debian with systemd on a disk (needs root or sudo the first time)
	@scripts/debian-guest

system-packages: ## the Debian packages only (this part needs root)
	@scripts/system-packages

venv: ## the Python environment only
	@scripts/venv

binaries: ## the Rust programs only
	@scripts/binaries

wheel: setup ## one wheel with the Python package and the Rust programs, in dist/
	@scripts/wheel

## To check
test: ## everything CI runs: setup, guest, lint, cargo test, pytest (ARGS="-k name" for pytest)
	@scripts/test $(ARGS)

lint: setup ## formatting, types, the import contract and the house rules, in Python and Rust
	@scripts/lint

format: setup ## put Python and Rust into their standard form
	.venv/bin/ruff check --quiet --fix-only .
	.venv/bin/ruff format --quiet .
	source scripts/toolchain && cargo fmt --all

worlds: setup ## every order of events and two faults of a move, by stepping the real drivers
	SEMPERVIRT_WORLD_FAULTS=2 .venv/bin/pytest -q tests/unit/test_migration_worlds.py $(ARGS)

records: setup ## every file that outlives a process, damaged 100,000 times: no VM is lost, none runs twice
	SEMPERVIRT_MUTATIONS=$${SEMPERVIRT_MUTATIONS:-100000} .venv/bin/pytest -q tests/unit/test_records_damaged.py $(ARGS)

layers: setup ## snapshots: 100,000 histories of writes, merges, deaths and power cuts on the real code
	source scripts/toolchain && SEMPERVIRT_HISTORIES=$${SEMPERVIRT_HISTORIES:-100000} \
		cargo test --quiet -p semper-layers model -- --nocapture $(ARGS)

torture: setup guest ## 1,000 kills over engines, queues, loads and file systems; must lose nothing
	@scripts/torture $(ARGS)

torture-guard: setup ## 34 ways to kill a host's kernel, on each kernel that the guard knows, with controls
	@scripts/torture-guard $(ARGS)

moves: setup guest ## a live guest moves between two hosts 50 times, on links of three kinds (root)
	@scripts/moves $(ARGS)

migration-kills: setup guest ## 300 deaths and cuts at every phase of a move; one writer, one guest (root)
	@scripts/migration-kills $(ARGS)

restarts: setup guest ## 100 times another QEMU under a running guest with disk and network (root)
	@scripts/restarts $(ARGS)

saved-states: setup guest ## a guest of 1 GiB saved and restored 20 times: how small, and how soon
	@scripts/saved-states $(ARGS)

corruption: setup guest ## blocks are overwritten while a guest moves, 200 times; every page is compared
	@scripts/corruption $(ARGS)

fuzz: setup ## hostile rings, regions and messages, guided by coverage
	@scripts/fuzz $(ARGS)

fuzz-api: setup ## 100,000 requests that nobody should send, to a real agent, from the API's schema and raw
	@scripts/fuzz-api $(ARGS)

bench: setup ## side by side with qemu-storage-daemon and QEMU's contrib backend, interleaved
	@scripts/bench $(ARGS)

bench-migrate: setup guest ## guests that move: QEMU alone, packed, steered, and semper-wired (root; an hour)
	@scripts/bench-migrate $(ARGS)

scale: setup guest ## what 64 disks with 256 queues hold, and what 20 idle disks use
	@scripts/scale $(ARGS)

fresh: ## 'make demo' on a fresh Debian root made for it (root; ARGS="trixie test" for another)
	@scripts/fresh-root $(ARGS)

## To maintain
lock: ## take newer versions of the Python packages into requirements.lock
	@scripts/lock

clean: ## remove what was built here (packages of the system stay)
	rm -rf .venv .cache build dist target results src/*.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
