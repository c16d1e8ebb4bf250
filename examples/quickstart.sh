#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Quantize a real model to W4A4 with and without CAT, compare perplexity on held-out text, and
# serve the CAT checkpoint. Needs Python 3.11 to 3.13 and nothing else; safe to run again.
#
#     bash examples/quickstart.sh [OUTPUT_FOLDER]

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environments.sh"
OUTPUT="${1:-$ROOT/output}"
EXAMPLES="$ROOT/examples"
COMMAND="$VENVS/compress/bin/cat-modifier"
LOG="$OUTPUT/logs"
PORT="${PORT:-8123}"
mkdir -p "$LOG"

# run LOG_NAME COMMAND...: with its output in a file, which is named if it fails
run() {
    local log="$LOG/$1.log"
    shift
    "$@" > "$log" 2>&1 &
    wait $! || fail "$(tail -n 5 "$log")"$'\n'"(the whole log: $log)"
}

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT TERM

set_up_compress
set_up_serve

MODEL="$OUTPUT/smollm2-135m-instruct"
if [ ! -f "$MODEL/config.json" ]; then
    say "Unpacking SmolLM2-135M-Instruct to $MODEL"
    rm -rf "$MODEL.incomplete"
    run embedded-model "$COMPRESS" "$EXAMPLES/embedded_model.py" "$MODEL.incomplete"
    mv "$MODEL.incomplete" "$MODEL"
fi

for recipe in w4a4_no_transform w4a4_hadamard w4a4; do
    say "Quantizing with the recipe $recipe to $OUTPUT/$recipe (minutes; log: $LOG/$recipe.log)"
    run "$recipe" "$COMMAND" quantize "$MODEL" \
        --recipe "$recipe" --output "$OUTPUT/$recipe" --overwrite
done

for recipe in w4a4_no_transform w4a4_hadamard; do
    say "Evaluating $recipe on held-out text (a minute; log: $LOG/evaluate-$recipe.log)"
    run "evaluate-$recipe" "$COMMAND" evaluate "$OUTPUT/$recipe" --output "$OUTPUT/$recipe.json"
done
say "Evaluating w4a4 and comparing it with the original (minutes; log: $LOG/evaluate-w4a4.log)"
run evaluate-w4a4 "$COMMAND" evaluate "$OUTPUT/w4a4" --base "$MODEL" --output "$OUTPUT/w4a4.json"
"$COMPRESS" "$EXAMPLES/compare.py" "$MODEL" \
    "$OUTPUT/w4a4_no_transform" "$OUTPUT/w4a4_hadamard" "$OUTPUT/w4a4"

healthy() {
    "$SERVE" -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$PORT/health', timeout=2)" \
        2>/dev/null
}

healthy && fail "port $PORT is in use: name another one in PORT"
say "Starting vllm serve $OUTPUT/w4a4 on 127.0.0.1:$PORT (a minute; log: $LOG/serve.log)"
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
"$VENVS/serve/bin/vllm" serve "$OUTPUT/w4a4" --host 127.0.0.1 --port "$PORT" \
    --enforce-eager --max-model-len 2048 > "$LOG/serve.log" 2>&1 &
SERVER=$!
for second in $(seq 300); do
    kill -0 "$SERVER" 2>/dev/null \
        || fail "$(tail -n 5 "$LOG/serve.log")"$'\n'"(the whole log: $LOG/serve.log)"
    healthy && break
    [ "$second" -lt 300 ] || fail "the server does not answer: see $LOG/serve.log"
    sleep 1
done
grep -o 'Using .*Int[48]Kernel.*' "$LOG/serve.log" || true

say "Asking it"
"$SERVE" "$EXAMPLES/ask.py" "http://127.0.0.1:$PORT/v1" "What is the capital of France?"

say "Serve it yourself: OMP_WAIT_POLICY=$OMP_WAIT_POLICY" \
    "VLLM_CPU_KVCACHE_SPACE=$VLLM_CPU_KVCACHE_SPACE $VENVS/serve/bin/vllm serve $OUTPUT/w4a4"
