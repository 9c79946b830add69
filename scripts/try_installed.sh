#!/usr/bin/env bash
# Try an installed qat from an empty folder, where nothing of the repository can help: scripts/try_installed.sh VENV/bin
set -euo pipefail
bin="$(cd "${1:?usage: scripts/try_installed.sh VENV/bin}" && pwd)"
empty="$(mktemp -d)"
trap 'rm -rf "$empty"' EXIT
cd "$empty"
set -x
"$bin/qat" --help
"$bin/qat" describe --model.arch deit_tiny_patch16_224 --model.recipe vvtq --model.w_bits 4 --model.a_bits 4
"$bin/qat" make-softlabels --help
"$bin/python" -c 'import qat; model = qat.build_float("deit_tiny_patch16_224", None); qat.quantize(model, qat.build_recipe("lsq", w_bits=4, a_bits=4))'
