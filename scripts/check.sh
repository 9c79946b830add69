#!/usr/bin/env bash
# The one check: ruff, formatting, types, tests. Runs every step, fails at the end if any failed.
#
#   scripts/check.sh           all of it
#   scripts/check.sh --fast    without the tests (what pre-commit runs)
#
# PYTHON names the interpreter: .venv/bin/python by default, else a python3 that finds qat and torch.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
exec </dev/null # no step may wait for an answer

fast=false
case "$#:${1:-}" in
    0:) ;;
    1:--fast) fast=true ;;
    *) echo "check: unknown arguments '$*'; usage: scripts/check.sh [--fast]" >&2; exit 2 ;;
esac

has_qat='import importlib.util as util, qat, sys; sys.exit(sys.version_info < (3, 11) or not util.find_spec("torch"))'
python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then
    if [[ -z "${PYTHON:-}" ]] && python3 -c "$has_qat" 2>/dev/null; then
        python=python3
    else
        echo "check: no interpreter at '$python'; run 'make install', or name one with PYTHON=/path/to/python" >&2
        exit 2
    fi
fi

failed=()
step() { # step NAME ARGUMENTS...: announce, run as a Python module, remember a failure
    local name="$1"
    shift
    echo "== $name"
    "$python" -m "$@" || failed+=("$name")
}

step "ruff check" ruff check .
step "ruff format" ruff format --check .
step "mypy" mypy
if ((${#failed[@]})); then
    printf 'check: FAILED: %s\n' "${failed[@]}" >&2
fi
$fast || step "pytest" pytest -n 2

((${#failed[@]} == 0))
