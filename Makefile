# sempervirt: what there is to do. Each target is one script in scripts/, which CI calls as well.
#
#   make            this list
#   make demo       everything from a fresh Debian machine to a VM that survives 20 kills

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo libvirt standby setup system-packages venv binaries guest debian-guest newer-qemu test lint format wheel deb deb-trial \
	lock fuzz fuzz-api worlds records layers layers-kills layers-cuts torture torture-guard guard-debug guard-end-to-end guard-reboot restarts saved-states corruption moves passthrough-moves passthrough-kills passthrough-nested passthrough-captures bench-passthrough mediator-kills migration-kills split-brain standby-hosts standby-randomness standby-refresh store-scale bench bench-layers bench-migrate \
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

newer-qemu: ## a QEMU that can hand devices to its guest, for the tests (needs root or sudo the first time)
	@scripts/newer-qemu

system-packages: ## the Debian packages only (this part needs root)
	@scripts/system-packages

venv: ## the Python environment only
	@scripts/venv

binaries: ## the Rust programs only
	@scripts/binaries

deb: setup ## Debian packages for this host and others, in dist/ (ARGS="--lint": lintian as well)
	@scripts/system-packages debhelper dh-dkms help2man
	@scripts/deb $(ARGS)

wheel: setup ## one wheel with the Python package and the Rust programs, in dist/
	@scripts/wheel

## To check
test: ## everything CI runs: setup, guest, lint, cargo test, pytest (ARGS="-k name" for pytest)
	@scripts/test $(ARGS)

lint: setup ## formatting, types, the import contract and the house rules, in Python and Rust
	@scripts/lint

libvirt: setup guest ## a domain of libvirt with a guarded disk: 20 kills of its backend (root; ARGS="--count 100")
	@scripts/libvirt $(ARGS)

deb-trial: setup guest ## the packages on a fresh Debian with systemd: installed, upgraded under VMs, removed, purged (root)
	@scripts/system-packages debhelper dh-dkms help2man mmdebstrap
	.venv/bin/python -m tests.packages $(ARGS)

format: setup ## put Python and Rust into their standard form
	.venv/bin/ruff check --quiet --fix-only .
	.venv/bin/ruff format --quiet .
	source scripts/toolchain && cargo fmt --all

worlds: setup ## every order of events and two faults of a move and of an evacuation, by stepping the real drivers
	SEMPERVIRT_WORLD_FAULTS=2 .venv/bin/pytest -q tests/unit/test_migration_worlds.py tests/unit/test_evacuation_worlds.py $(ARGS)

records: setup ## every file that outlives a process, damaged 100,000 times: no VM is lost, none runs twice
	SEMPERVIRT_MUTATIONS=$${SEMPERVIRT_MUTATIONS:-100000} .venv/bin/pytest -q tests/unit/test_records_damaged.py $(ARGS)

layers: setup ## snapshots: 100,000 histories of writes, merges, deaths and power cuts on the real code
	source scripts/toolchain && SEMPERVIRT_HISTORIES=$${SEMPERVIRT_HISTORIES:-100000} \
		cargo test --quiet -p semper-layers model -- --nocapture $(ARGS)

layers-kills: setup ## snapshots: 1,000 SIGKILLs of snapshots, undos and merges under 16 writers, and after each act
	source scripts/toolchain && SEMPERVIRT_LAYER_KILLS=$${SEMPERVIRT_LAYER_KILLS:-1000} \
		SEMPERVIRT_LAYER_ROUNDS=$${SEMPERVIRT_LAYER_ROUNDS:-3} SEMPERVIRT_LAYER_HOSTS=$${SEMPERVIRT_LAYER_HOSTS:-100} \
		cargo test --quiet -p semper-blkd --features crash-points --test service layer_kills -- --nocapture $(ARGS)

layers-cuts: setup ## snapshots: 200 power cuts of a real file system, 100 take-overs by another host that is not alone (root)
	source scripts/toolchain && SEMPERVIRT_LAYER_CUTS=$${SEMPERVIRT_LAYER_CUTS:-200} \
		SEMPERVIRT_LAYER_HOSTS=$${SEMPERVIRT_LAYER_HOSTS:-100} \
		cargo test --quiet -p semper-blkd --test service -- --nocapture layer_cuts layer_hosts $(ARGS)

torture: setup guest ## 1,000 kills over engines, queues, loads and file systems; must lose nothing
	@scripts/torture $(ARGS)

torture-guard: setup ## 34 ways to kill a host's kernel, on each that the guard knows, with controls; crash kernels, ordinary days, and more
	@scripts/torture-guard $(ARGS)

guard-debug: setup ## the guard's device misused, and deaths survived, in a kernel with KASAN and lockdep (which is built: 20 min)
	@scripts/guard-debug-kernel
	@scripts/torture-guard --series 6.1-debug --part survived --part storm --part churn --loads 50 $(ARGS)

guard-reboot: setup debian-guest ## a host with systemd is rebooted in order: its VM is elsewhere before, or the bound is kept (root)
	@.venv/bin/python -m tests.guard.reboot $(ARGS)

guard-end-to-end: setup ## hosts whose kernels die, 50 times; their VMs are moved by our agent and skip nothing (root)
	@scripts/torture-guard --part moved $(ARGS)

moves: setup guest ## a live guest moves between two hosts 50 times, on links of three kinds (root)
	@scripts/moves $(ARGS)

passthrough-moves: setup guest newer-qemu ## a guest with a passed-through NVMe moves there and back 50 times, and the same guest without (root)
	@scripts/passthrough-moves $(ARGS)

mediator-kills: setup guest newer-qemu ## 1,000 deaths of a passed-through device's mediator under verified load
	@scripts/mediator-kills $(ARGS)

passthrough-captures: setup guest newer-qemu ## a device's doorbells are captured and given back 1,000 times under verified load
	@scripts/passthrough-captures $(ARGS)

bench-passthrough: setup guest newer-qemu ## requests in a second of a passed-through NVMe, of QEMU's own, and of a vhost-user disk, in turn
	@scripts/bench-passthrough $(ARGS)

passthrough-kills: setup guest newer-qemu ## 100 deaths and cuts while a guest with a passed-through NVMe moves (root)
	@scripts/passthrough-kills $(ARGS)

passthrough-nested: setup guest ## a PCI device of the host, in an emulated host: a guest in it moves to another device and back
	@scripts/passthrough-nested $(ARGS)

migration-kills: setup guest ## 300 deaths and cuts at every phase of a move; one writer, one guest (root)
	@scripts/migration-kills $(ARGS)

split-brain: setup ## 300 times a host is cut off, stopped, and comes back: never two write one disk (root)
	.venv/bin/python -m tests.standby.split_brain $(ARGS)

store-scale: setup ## what the store costs with 20,000 VMs and 100 agents: a hand-over, a change, an idle agent
	.venv/bin/python -m bench.store_scale $(ARGS)

standby-hosts: setup guest ## 20 times a host dies, is cut off or stands still, and a standby on another one goes on (root)
	.venv/bin/python -m tests.standby.two_hosts $(ARGS)

restarts: setup guest ## 100 times another QEMU under a running guest with disk and network (root)
	@scripts/restarts $(ARGS)

saved-states: setup guest ## a guest of 1 GiB saved and restored 20 times: how small, and how soon
	@scripts/saved-states $(ARGS)

standby: setup guest ## QEMU is killed 100 times in each tier of standby: how soon the guest goes on, and what is lost
	@scripts/standby $(ARGS)

standby-randomness: setup guest debian-guest ## 50 standbys of one snapshot draw 32 bytes each: no two the same, with and without the driver
	@scripts/guard-kernels
	.venv/bin/python -m tests.standby.randomness $(ARGS)

standby-refresh: setup guest ## what a refresh of a standby adds to its VM's writes and processor time
	.venv/bin/python -m tests.standby.refresh $(ARGS)

corruption: setup guest ## blocks are overwritten while a guest moves, 200 times; every page is compared
	@scripts/corruption $(ARGS)

fuzz: setup ## hostile rings, regions and messages, guided by coverage
	@scripts/fuzz $(ARGS)

fuzz-api: setup ## 100,000 requests that nobody should send, to a real agent, from the API's schema and raw
	@scripts/fuzz-api $(ARGS)

bench: setup ## side by side with qemu-storage-daemon and QEMU's contrib backend, interleaved
	@scripts/bench $(ARGS)

bench-layers: setup ## what snapshots cost a guest: no layer, four, the pause, a merge; beside QEMU's qcow2 (12 minutes)
	@scripts/bench --suite layers $(ARGS)

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
