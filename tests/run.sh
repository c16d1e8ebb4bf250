#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set up the environments and run the tests. Safe to run again.
#
#     bash tests/run.sh            everything
#     bash tests/run.sh --quick    style, types, and the tests of seconds; without vLLM

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environments.sh"
cd "$ROOT"
[ $# -eq 0 ] || [ "$*" = --quick ] || fail "$*: the only option is --quick"

set_up_compress

say "Checking style and types"
"$COMPRESS" -m ruff check .
"$COMPRESS" -m ruff format --check .
"$COMPRESS" -m mypy

COMPRESS_TESTS="tests/functional tests/calibration tests/checkpoint tests/modifiers
    tests/integrations/transformers tests/hub tests/analysis tests/commands tests/package"
NEW_USER=tests/package/test_new_user.py  # needs both environments
command -v chromium > /dev/null || say "(without chromium, a report is not tested in a browser)"
if [ "${1:-}" = --quick ]; then
    say "Testing what is quick"
    # shellcheck disable=SC2086
    exec "$COMPRESS" -m pytest -m "not slow" $COMPRESS_TESTS
fi
say "Testing the mathematics, compressing, loading, the analysis and the package"
# shellcheck disable=SC2086
"$COMPRESS" -m pytest --ignore "$NEW_USER" $COMPRESS_TESTS

set_up_serve

# vLLM cannot be installed beside llm-compressor: one environment makes what the other serves
export CAT_TEST_CHECKPOINTS="$ROOT/.cache/test-checkpoints"
rm -rf "$CAT_TEST_CHECKPOINTS"
mkdir -p "$CAT_TEST_CHECKPOINTS"
say "Making the checkpoints to serve, in .cache/test-checkpoints"
"$COMPRESS" tests/integrations/vllm/make_checkpoints.py "$CAT_TEST_CHECKPOINTS" \
    > "$CAT_TEST_CHECKPOINTS/log" 2>&1 \
    || { tail -n 40 "$CAT_TEST_CHECKPOINTS/log"; fail "no checkpoints to serve"; }

say "Testing the kernels and serving"
# apart from the others, because its tests turn on TRITON_INTERPRET
"$SERVE" -m pytest tests/kernels
"$SERVE" -m pytest tests/calibration tests/checkpoint tests/integrations/vllm

say "Testing all that a new user does"
CAT_TEST_SERVE="$SERVE" "$COMPRESS" -m pytest "$NEW_USER"

say "All tests passed"
