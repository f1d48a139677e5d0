# Everything is installed into .venv and Debian packages; `make` alone prints the targets.

# bcc exists only for the system's Python; another python3 may come first on PATH.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

PACKAGES_RUN := python3-venv python3-bpfcc
PACKAGES_DEMO := $(PACKAGES_RUN) qemu-system-x86 qemu-utils busybox-static elfutils gdb
PACKAGES_TEST := $(PACKAGES_DEMO) gcc libc6-dev clang lld libvirt-daemon-system libvirt-clients
PACKAGES_MATRIX := $(PACKAGES_TEST) debootstrap
PACKAGES_KERNELS := $(PACKAGES_MATRIX) e2fsprogs
PACKAGES_ARM64 := $(PACKAGES_KERNELS) qemu-system-arm
PACKAGES_BENCH := $(PACKAGES_TEST) bpftrace bpfcc-tools linux-perf strace

RINGS := tests/unit tests/kernel tests/qemu
SOURCES := cli.py tracer bpf bench tests

# What root made in the tree goes back to whoever owns it, whichever way root came by it.
GIVE_BACK := owner=$$(stat -c %u:%g .); case $$(id -u)/$$owner in 0/0:*) ;; 0/*) find . -xdev -path ./.git -prune \
	-o -user 0 \( -type d -o -links 1 \) -exec chown --no-dereference --from=0 "$$owner" {} +;; esac

# Targets that need root raise themselves where sudo is there; then nothing else of this file is read.
NEED_ROOT := demo test test-matrix test-kernels test-arm64 soak bench
ifneq ($(filter $(NEED_ROOT),$(MAKECMDGOALS)),)
ifneq ($(shell id -u),0)
SUDO := $(shell command -v sudo 2>/dev/null)
endif
endif
ifneq ($(SUDO),)
comma := ,
space := $(subst ,, )
KEPT := $(foreach name,$(filter CI AIO_TRACE_% BENCH_%,$(.VARIABLES)),$(if $(filter environment,$(origin $(name))),$(name)))
.NOTPARALLEL:
.PHONY: raise $(MAKECMDGOALS)
$(MAKECMDGOALS): raise ; @:
raise:
	@echo "as root, by sudo: make $(MAKECMDGOALS)"
	@$(SUDO) $(if $(KEPT),--preserve-env=$(subst $(space),$(comma),$(strip $(KEPT)))) make $(MAKEOVERRIDES) $(MAKECMDGOALS)
else

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: packages-run $(VENV)/.installed ## Install into .venv: .venv/bin/aio-trace

.PHONY: bundle
bundle: packages-run $(VENV)/.created ## One archive in dist for hosts without pip or network; Python 3.9 and later
	@bash .ci/bundle $(BIN)/python dist; status=$$?; $(GIVE_BACK); exit $$status

.PHONY: demo
demo: root packages-demo install ## Boot a small guest, lose one completion, show what aio-trace says (root)
	@status=0; $(BIN)/aio-trace demo || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: test
test: root packages-test lint ## All checks and tests, with real QEMUs (root)
	@status=0; $(BIN)/python -m pytest $(RINGS) || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: test-matrix
test-matrix: root packages-matrix $(VENV)/.dev ## Live tests on the QEMUs of other Debian releases, in roots of their own (root)
	@status=0; $(BIN)/python -m pytest -m matrix tests/matrix || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: test-kernels
test-kernels: root packages-kernels $(VENV)/.dev ## Other Debian releases booted with their own kernels, each tried whole (root)
	@status=0; $(BIN)/python -m pytest -m 'kernels and not arm64' tests/kernels || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: test-arm64
test-arm64: root packages-arm64 $(VENV)/.dev ## The same on Debian for arm64 with its own kernel, emulated (root)
	@status=0; $(BIN)/python -m pytest -m arm64 tests/kernels || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: soak
soak: root packages-arm64 $(VENV)/.dev ## The tests' long forms, hours of them (root)
	@AIO_TRACE_SOAK_S=120 AIO_TRACE_REPEAT=20 AIO_TRACE_INSPECT_LOAD=10000 AIO_TRACE_BUSY_INSPECTS=200 AIO_TRACE_MUTATIONS=1000 \
	AIO_TRACE_MUTANTS=10000 AIO_TRACE_FUZZ=20000 AIO_TRACE_MATRIX=1 AIO_TRACE_NUDGE_ROUNDS=100 AIO_TRACE_NUDGE_REFUSALS=1000 \
	AIO_TRACE_BENCH_ROUNDS=2 \
	$(BIN)/python -m pytest --override-ini timeout=10800 $(RINGS)
	@AIO_TRACE_REPEAT=20 AIO_TRACE_NUDGE_ROUNDS=100 \
	$(BIN)/python -m pytest --override-ini timeout=10800 -m matrix tests/matrix
	@AIO_TRACE_REAL_TIME=1 $(BIN)/python -m pytest -m kernels tests/kernels

.PHONY: bench
bench: root packages-bench install ## What tracing costs, beside what others would use (root, 25 minutes)
	@status=0; $(BIN)/python -m bench || status=$$?; $(GIVE_BACK); exit $$status

.PHONY: check
check: lint ## Format, lint, types and unit tests (no root)
	@$(BIN)/python -m pytest tests/unit

.PHONY: lint
lint: packages-run $(VENV)/.dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/vermin --quiet --no-tips --violations --no-parse-comments --target=3.9- --exclude-regex '/targets/' $(SOURCES)

.PHONY: format
format: packages-run $(VENV)/.dev ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove everything that was made in this folder
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root, and there is no sudo: make $(MAKECMDGOALS), as root" >&2; exit 1; }

.PHONY: packages-run packages-demo packages-test packages-matrix packages-kernels packages-arm64 packages-bench
packages-run:
	@bash .ci/packages $(PACKAGES_RUN)
packages-demo:
	@bash .ci/packages $(PACKAGES_DEMO)
packages-test:
	@bash .ci/packages $(PACKAGES_TEST)
packages-matrix:
	@bash .ci/packages $(PACKAGES_MATRIX)
packages-kernels:
	@bash .ci/packages $(PACKAGES_KERNELS)
packages-arm64:
	@bash .ci/packages $(PACKAGES_ARM64)
packages-bench:
	@bash .ci/packages $(PACKAGES_BENCH)

$(VENV)/.created:
	$(PYTHON) -m venv --clear --system-site-packages $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(PIP) install --editable .
	@touch $@
	@$(GIVE_BACK)

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --editable '.[dev]'
	@touch $@
	@$(GIVE_BACK)

endif
