#!/usr/bin/env bash
# Steps of a first run on a GPU: bash gpu_vllm.sh check|compiled|speed... ; see each below.
# Needs PYTHONPATH with vLLM and this package's metadata, MODELS (checkpoints in ck/, configs in
# configs/), and OUT for logs.
cd "$(dirname "$0")/../../.." || exit 1
export PYTHONPATH="${PYTHONPATH:-/tmp/site}:$PWD" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
MODELS="${MODELS:-/tmp/models}"; OUT="${OUT:-/tmp/out}"; LOGS=/tmp/logs; mkdir -p "$OUT" $LOGS
step() {
    local name="$1" limit="$2" start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    echo "$? after $((SECONDS - start)) s" >> "$OUT/$name.log"
    tail -n "${TAIL:-25}" "$OUT/$name.log" | cut -c1-400
}
for one in "$@"; do
    case $one in
    versions) step versions 90 python3 -c '
import torch, vllm, triton, transformers, cat_modifier
from vllm.platforms import current_platform as p
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import get_quantization_config
import vllm._custom_ops as ops
print(vllm.__version__, torch.__version__, triton.__version__, transformers.__version__)
print(p, p.get_device_name(), p.get_device_capability())
print(get_quantization_config("cat-modifier"), torch.ops._C.cutlass_scaled_mm_azp)'
        nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader ;;
    kernels) step kernels 150 python3 -m pytest -q -p no:cacheprovider -n 4 --noconftest \
        tests/integrations/vllm/test_gpu_kernels.py ;;
    eager|compiled|graphs) step "serve-$one" 200 python3 tests/integrations/vllm/run_gpu.py "$MODELS/ck" \
        --modes "$one" --logs $LOGS --parallel 8 --timeout 150
        tail -n 40 $LOGS/w4a4-cat-"$one".log | cut -c1-300 > "$OUT/serve-$one-end.log" ;;
    v1runner) VLLM_USE_V2_MODEL_RUNNER=0 step serve-v1runner 150 python3 tests/integrations/vllm/run_gpu.py \
        "$MODELS/ck" --modes eager --only one-layer-w4a4-cat w4a8-cat --logs $LOGS/v1 --timeout 120 ;;
    speed-*) # speed-1b-graphs, speed-8b-compiled, ...
        size="${one#speed-}"; mode="${size#*-}"; size="${size%%-*}"
        sides="bf16 W8A8 W4A16 W4A4 CAT"; [ "$size" = 1b ] && sides="$sides Hadamard CAT-32 CAT-int4"
        step "$one" "${SPEED_LIMIT:-180}" python3 tests/benchmarks/serving_gpu.py "$MODELS/configs/$size" \
            --mode "$mode" --sides ${SIDES:-$sides} --rounds "${ROUNDS:-5}" --seconds 130 --logs $LOGS \
            --json "$OUT/$one.json" ;;
    esac
done
# the whole logs, in one file
tar cf - -C /tmp logs | xz -3 > "$OUT/logs.tar.xz"
