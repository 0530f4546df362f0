# Every task is one short command. A machine needs make and Python 3.11 or newer beforehand, nothing else.
#
#   make setup     create .venv and install hwpoison with its tools      make demo     watch it work
#   make test      check, then all tests but the soak tests              make soak     the tests that run long
#   make check     formatting, lint, types, layers                       make bench    the benchmarks
#   make format    format and fix what can be fixed                      make clean    remove all that make made
#   make explore   every order of events in simulation: several at once, two pages, the manager's death (10 minutes)

# More arguments for pytest: make test ARGS='-k quarantine'
ARGS ?=
# An interpreter to use instead of the one that is found: make setup PYTHON=/opt/python/bin/python3
PYTHON ?=
# What one run of the tests may take before it counts as hung.
TEST_SECONDS_MAX ?= 900

CANDIDATES := $(or $(PYTHON),python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11)
BIN := .venv/bin

# A manager, and each of its clients, is a Python that starts: none of them is to compile everything again.
unexport PYTHONDONTWRITEBYTECODE

# Each recipe is one shell script.
.ONESHELL:
SHELL := /bin/sh
.SHELLFLAGS := -euc
.DELETE_ON_ERROR:
.PHONY: setup demo test check soak explore bench format clean

setup: .venv/.installed

# Tests run processes as other users, so root prefers an interpreter that everybody can run to one in its own home.
.venv/.installed: pyproject.toml
	@new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
	become_nobody='import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)'
	run_again='os.execv(sys.executable, [sys.executable, "-I", "-c", "import ctypes"])'
	for_everybody() { [ "$$(id -u)" -ne 0 ] || "$$1" -c "$$become_nobody; $$run_again" >/dev/null 2>&1; }
	has_ensurepip() { "$$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
	python=
	for candidate in $(CANDIDATES); do
	    new_enough "$$candidate" || continue
	    if for_everybody "$$candidate"; then python=$$candidate; break; fi
	    [ -n "$$python" ] || python=$$candidate
	done
	if [ -z "$$python" ]; then
	    echo 'hwpoison needs Python 3.11 or newer, and none of these is: $(CANDIDATES). Install one, or name it with PYTHON=/path/to/python3.' >&2
	    exit 1
	fi
	if ! { new_enough $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1; }; then
	    if ! has_ensurepip "$$python"; then
	        package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
	        if [ "$$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
	            echo "installing $$package"
	            apt-get update -qq >/dev/null || true
	            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$package" >/dev/null || true
	        fi
	        if ! has_ensurepip "$$python"; then
	            echo "$$python cannot make a virtual environment: install the package $$package." >&2
	            exit 1
	        fi
	    fi
	    echo "creating .venv with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
	    "$$python" -m venv --clear .venv
	fi
	echo 'installing hwpoison and its tools into .venv'
	$(BIN)/python -m pip install -qq --no-input --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: setup
	@$(BIN)/hwpoison demo

test: check
	timeout --foreground --signal=INT --kill-after=30 $(TEST_SECONDS_MAX) $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(ARGS)

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/sets.py src/hwpoison/core

explore: setup
	$(BIN)/hwpoison explore --exhaustive --mode batch --limit 5000
	$(BIN)/hwpoison explore --exhaustive --matrix deaths --mode batch
	$(BIN)/hwpoison explore --exhaustive --matrix two-pages --limit 2500
	$(BIN)/hwpoison explore --exhaustive --matrix restart-pairs --limit 5000

soak: setup
	$(BIN)/hwpoison explore --exhaustive --matrix all-pairs --mode batch --limit 6000
	$(BIN)/hwpoison explore --exhaustive --matrix restarts
	$(BIN)/hwpoison explore --exhaustive --matrix old-kernels --limit 3000
	$(BIN)/hwpoison explore --seed 1 --runs 20000
	$(BIN)/python -m pytest -m soak -o faulthandler_timeout=0 $(ARGS)

bench: setup
	@$(BIN)/hwpoison bench

format: setup
	$(BIN)/ruff check --fix || true
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
