#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up both environments and run all tests: those of compressing and of loading with real
# llm-compressor and Transformers, then those of serving with real vLLM on the CPU, on
# checkpoints that the first environment makes. Safe to run again.
#
#     bash tests/run.sh

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environments.sh"
cd "$ROOT"

set_up_compress
set_up_serve

say "Checking the style"
"$COMPRESS" -m ruff check .
"$COMPRESS" -m ruff format --check .

say "Testing the mathematics, calibration, compressing, loading and the analysis"
command -v chromium > /dev/null || say "(without chromium, a report is not tested in a browser)"
"$COMPRESS" -m pytest tests/mathematics tests/calibration tests/checkpoint tests/compress \
    tests/training tests/load tests/analysis

export CAT_TEST_CHECKPOINTS="$ROOT/.cache/test-checkpoints"
rm -rf "$CAT_TEST_CHECKPOINTS"
mkdir -p "$CAT_TEST_CHECKPOINTS"
say "Making the checkpoints to serve, in .cache/test-checkpoints"
"$COMPRESS" tests/serve/make_checkpoints.py "$CAT_TEST_CHECKPOINTS" \
    > "$CAT_TEST_CHECKPOINTS/log" 2>&1 \
    || { tail -n 40 "$CAT_TEST_CHECKPOINTS/log"; fail "no checkpoints to serve"; }

say "Testing the kernels and serving in the environment of vLLM"
"$SERVE" -m pytest tests/kernels
"$SERVE" -m pytest tests/calibration tests/checkpoint/test_config.py tests/serve

say "All tests passed"
