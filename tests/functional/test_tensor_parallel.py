# SPDX-License-Identifier: Apache-2.0
import pytest

from cat_modifier.functional.layout import Rotation
from cat_modifier.functional.tensor_parallel import (
    InputToShard,
    largest_tensor_parallel_size,
)

MODELS = {
    # name: (query heads, KV heads, head_dim, input of down_proj), expected
    "Llama-3-8B": ((32, 8, 128, 14336), 8),
    "Qwen3-8B": ((32, 8, 128, 12288), 8),
    "Qwen2.5-7B": ((28, 4, 128, 18944), 4),
    "Qwen2.5-0.5B": ((14, 2, 64, 4864), 2),
    "SmolLM2-135M": ((9, 3, 64, 1536), 1),
    # 4 KV heads: two of 8 ranks share one KV head
    "Qwen3-30B-A3B": ((32, 4, 128, 768), 8),
    "Qwen3-235B-A22B": ((64, 4, 128, 1536), 8),
    # 1376 inputs per rank would allow a Hadamard matrix of order 32 only
    "Llama-2-7B": ((32, 32, 128, 11008), 4),
    # query heads can be divided, KV heads neither divided nor shared evenly
    "12 heads, 3 KV heads": ((12, 3, 64, 4096), 1),
}


def size_of(heads, kv_heads, head_dim, width, *more, **changes) -> int:
    inputs = [InputToShard(heads * head_dim, head_dim), InputToShard(width), *more]
    options = {"block_size": 128, "rotation": Rotation.HADAMARD} | changes
    return largest_tensor_parallel_size(heads, kv_heads, inputs, **options)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_models(name):
    shape, expected = MODELS[name]
    assert size_of(*shape) == expected


LLAMA = MODELS["Llama-3-8B"][0]


@pytest.mark.parametrize(
    "more, changes, expected",
    [
        ([], {"block_size": "full"}, 1),
        ([], {"rotation": Rotation.BLOCK_HADAMARD}, 8),
        ([], {"block_size": 1, "rotation": Rotation.NONE}, 8),
        # quantization groups stay whole
        ([InputToShard(4096, unit=1024)], {}, 4),
        # channels and heads stay whole
        ([InputToShard(4095)], {}, 1),
        ([InputToShard(6 * 128, head_dim=128)], {}, 2),
    ],
)
def test_options_and_other_inputs_bound_the_size(more, changes, expected):
    assert size_of(*LLAMA, *more, **changes) == expected


def test_a_model_without_attention_is_bounded_by_its_inputs():
    inputs = [InputToShard(1024)]
    assert largest_tensor_parallel_size(0, 0, inputs, 128, Rotation.HADAMARD) == 8
    assert largest_tensor_parallel_size(0, 0, [], "full", Rotation.HADAMARD) == 8
