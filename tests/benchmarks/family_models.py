# SPDX-License-Identifier: Apache-2.0
"""
Small models of random weights for any architecture of Transformers, without a builder for
each: the default config is shrunk field by field, and inputs are made from what the model's
forward takes. Architectures whose fields depend on each other are listed in EXCEPTIONS.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Linear
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

FAMILIES = {
    "dense": {
        "AutoModelForCausalLM": """
            llama mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text
            gemma4_text@k_eq_v phi phi3 olmo olmo2 olmo3 granite glm glm4 cohere cohere2
            starcoder2 stablelm smollm3 exaone4 ernie4_5 hunyuan_v1_dense seed_oss hrm_text
            apertus arcee nemotron helium minicpm3 nanochat modernbert-decoder falcon gpt2
            gpt_neo gpt_neox gptj gpt_bigcode bloom mpt opt xglm biogpt persimmon codegen
            diffllama""",
    },
    "mixtures of experts": {
        "AutoModelForCausalLM": """
            mixtral qwen2_moe qwen3_moe olmoe flex_olmo granitemoe granitemoeshared gpt_oss
            phimoe deepseek_v2 deepseek_v3 glm4_moe ernie4_5_moe hunyuan_v1_moe dots1
            minimax_m2 jetmoe dbrx llama4_text""",
    },
    "hybrids": {
        "AutoModelForCausalLM": """
            mamba mamba2 falcon_mamba jamba bamba falcon_h1 zamba2 nemotron_h granitemoehybrid
            granitemoehybrid@dense qwen3_next qwen3_5_text lfm2 lfm2_moe minimax kimi_linear
            recurrent_gemma rwkv xlstm""",
    },
    "vision-language": {
        "AutoModelForImageTextToText": """
            llava llava_next mistral3 gemma3 paligemma qwen2_vl qwen2_5_vl qwen3_vl internvl
            mllama idefics3 smolvlm aya_vision glm4v blip-2 qwen3_5""",
    },
    "encoders, speech, encoder-decoder": {
        "AutoModelForSeq2SeqLM": "t5 mt5 bart mbart m2m_100 pegasus marian led t5gemma",
        "AutoModelForMaskedLM": """
            bert roberta distilbert electra deberta-v2 modernbert albert mpnet nomic_bert
            eurobert xlm-roberta""",
        "AutoModelForSequenceClassification": "qwen3@classifier bert@classifier",
        "AutoModel": "bert@embedding qwen3@embedding clip siglip siglip2",
        "AutoModelForImageClassification": "vit beit dinov2 swin convnext segformer hiera",
        "AutoModelForSpeechSeq2Seq": "whisper moonshine speech_to_text",
        "AutoModelForCTC": "wav2vec2 hubert wav2vec2-bert parakeet_ctc",
        "AutoModelForAudioClassification": "audio-spectrogram-transformer",
        "AutoModelForMultimodalLM": "qwen2_audio voxtral",
    },
}
"""
Model types by kind, and by the class of Transformers that makes them; after `@`, their use.
"""

WIDTH, HEADS, HEAD_DIM, LENGTH = 128, 4, 32, 24
"""vLLM's attention for CPUs takes heads of 32 channels, and none smaller"""

SIZES = (
    (
        WIDTH,
        """hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim
        out_hidden_size projection_dim vision_output_dim output_dim lru_width
        connector_dim encoder_stride text_hidden_size entity_emb_size""",
    ),
    (
        2 * WIDTH,
        """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner
        ffn_hidden_size mlp_hidden_size dim_feedforward hidden_dim intermediate_size_mlp
        mamba_d_ssm""",
    ),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_decoder_layers num_encoder_layers encoder_num_hidden_layers depth
        decoder_num_hidden_layers num_global_layers num_experts_per_tok num_experts_per_token
        moe_topk moe_top_k moe_k top_k experts_per_token num_key_value_heads num_kv_heads
        linear_num_key_heads""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads
        decoder_num_key_value_heads encoder_num_key_value_heads attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads
        linear_num_heads num_codebooks""",
    ),
    (
        8,
        """mamba_num_heads mamba_n_heads n_mamba_heads patch_size""",
    ),
    (
        HEAD_DIM,
        """head_dim d_kv v_head_dim qk_nope_head_dim global_head_dim kv_channels mamba_d_head
        mamba_head_dim image_size""",
    ),
    (
        HEAD_DIM // 2,
        """qk_rope_head_dim linear_head_dim rotary_dim ssm_state_size state_size mamba_d_state
        num_mel_bins hidden_size_per_layer_input""",
    ),
    (
        64,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank expert_ffn_hidden_size
        mamba_dt_rank time_step_rank""",
    ),
    (
        1,
        """n_group topk_group first_k_dense_replace n_shared_experts moe_num_shared_experts
        num_nextn_predict_layers num_dense_layers num_mtp_layers""",
    ),
    (
        256,
        """vocab_size vocab_size_per_layer_input max_position_embeddings n_positions
        max_seq_len n_ctx max_source_positions""",
    ),
)
"""Small values, and the fields that get them where the default is larger"""

SMALL = {field: value for value, fields in SIZES for field in fields.split()}

_MROPE = {"rope_type": "default", "mrope_section": [6, 4, 6], "rope_theta": 10000.0}
# the sizes that vLLM's attention has
_MLA = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64}
_HALF_MROPE = _MROPE | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_id": 3},
    "convnext": {"depths": [1, 1], "hidden_sizes": [32, 64], "num_stages": 2},
    "bloom": {"hidden_size": WIDTH},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": _MLA | {"topk_method": "noaux_tc"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "falcon": {"ffn_hidden_size": 4 * WIDTH},
    "falcon_h1": {"mamba_d_head": 32},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text@k_eq_v": {
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
    },
    "glm4_moe": {"head_dim": HEAD_DIM},
    "glm4v_text": {"rope_parameters": _HALF_MROPE},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid@dense": {"num_local_experts": 0},
    "hiera": {"depths": [1, 1], "num_heads": [2, 4], "num_query_pool": 1, "embed_dim": 32},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"block_dim": WIDTH, "block_ff_dim": 2 * WIDTH, "conv_dim": WIDTH},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": HEAD_DIM},
    "minimax_m2": {"rotary_dim": HEAD_DIM // 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 2 * WIDTH,
    },
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "window_size": 32},
    "qwen3_vl_text": {"rope_parameters": _MROPE},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0]},
    "qwen3_vl": {"deepstack_visual_indexes": [0]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "segformer": {
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 64, 64],
        "decoder_hidden_size": 32,
    },
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4}
    | {"patch_size": 4},
    "wav2vec2-bert": {"vocab_size": 32},
}
"""What else a config needs, by model type or family: lists of sizes, fields that are None"""

SPECIAL_TOKENS = 20
"""Token ids below are special ones"""


def families() -> dict[str, str]:
    """Transformers' class of each family"""
    return {
        name: auto
        for kind in FAMILIES.values()
        for auto, names in kind.items()
        for name in names.split()
    }


def small_config(family: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[family.partition("@")[0]]
    return kind(**_small_fields(kind(), {}) | EXCEPTIONS.get(family, {}))


def _small_fields(config: PreTrainedConfig, token_ids: dict[str, int]) -> dict[str, Any]:
    """
    Find the fields of a small config.

    :param token_ids: special tokens by name, shared by nested configs
    """
    default = config.to_dict()
    small: dict[str, Any] = {}
    for name, value in default.items():
        if name in config.sub_configs and isinstance(value, dict):
            sub = getattr(config, name)
            small[name] = _small_fields(sub, token_ids) | {"model_type": sub.model_type}
        elif name == "head_dim" and value is None:
            small[name] = HEAD_DIM
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            key = name.removesuffix("_id").removesuffix("_index")
            number = token_ids.setdefault(key, len(token_ids))
            small[name] = [number] if isinstance(value, list) else number
        elif name in SMALL and type(value) is int:
            small[name] = min(value, SMALL[name])
        elif name in ("layer_types", "layers_block_type", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            small[name] = kinds * 2 if len(kinds) == 1 else kinds
            if "num_hidden_layers" in default:
                small["num_hidden_layers"] = len(small[name])
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        # attention without groups stays so
        if "num_key_value_heads" in small:
            small["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small and "head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    return small | EXCEPTIONS.get(config.model_type, {})


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose every part contributes to its outputs"""
    torch.manual_seed(seed)
    auto = getattr(transformers, families()[family])
    model = auto.from_config(small_config(family), dtype=torch.float32).eval()
    linears = {id(p) for m in model.modules() if isinstance(m, Linear) for p in [m.weight]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in linears:
                parameter.mul_(2)
            elif "norm" in name.rpartition(".")[0].lower() and name.endswith("weight"):
                # channels of different size: something to align
                parameter.mul_(torch.randn(parameter.shape).exp())
            elif name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif parameter.abs().max() < 0.02:
                # gates and layer scales that begin closed
                parameter.normal_(std=0.5)
    return model


def inputs_of(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Make samples without end, each without the dimension of the batch"""
    generator = torch.Generator().manual_seed(1)
    taken = set(inspect.signature(model.forward).parameters)
    while True:
        yield _sample(model, taken, generator)


def _sample(model: PreTrainedModel, taken: set[str], generator: torch.Generator) -> dict:
    config = model.config
    text = config.get_text_config()

    def tokens() -> Tensor:
        size = getattr(text, "vocab_size", 0) or SMALL["vocab_size"]
        return torch.randint(SPECIAL_TOKENS, size, (LENGTH,), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sample: dict[str, Tensor] = {}
    if "input_ids" in taken:
        sample["input_ids"] = tokens()
    if "decoder_input_ids" in taken and config.is_encoder_decoder:
        sample["decoder_input_ids"] = tokens()
    if "pixel_values" in taken:
        sample |= _picture(model, taken, noise)
        image = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
        if "input_ids" in sample and image is not None and hasattr(model, "get_image_features"):
            count = _count_features(model, sample)
            picture = torch.full((count,), image)
            sample["input_ids"] = torch.cat([sample["input_ids"], picture])
            if "mm_token_type_ids" in taken:
                sample["mm_token_type_ids"] = (sample["input_ids"] == image).long()
    if "input_features" in taken and model.main_input_name != "input_ids":
        encoder = getattr(config, "encoder_config", config)
        encoder = getattr(config, "audio_config", encoder)
        bins = (
            getattr(encoder, "num_mel_bins", None)
            or getattr(encoder, "input_feat_per_channel", None)
            or encoder.feature_projection_input_dim
        )
        length = 2 * min(getattr(encoder, "max_source_positions", 32), 256)
        bins_first = config.model_type == "whisper"
        sample["input_features"] = noise(bins, length) if bins_first else noise(length, bins)
    if "input_values" in taken:
        bins = getattr(config, "num_mel_bins", None)
        sample["input_values"] = noise(config.max_length, bins) if bins else noise(4000)
    if "attention_mask" in taken and "input_ids" in sample:
        sample["attention_mask"] = torch.ones_like(sample["input_ids"])
    return sample


def _picture(model: PreTrainedModel, taken: set[str], noise: Callable) -> dict[str, Tensor]:
    config = model.config
    vision = getattr(config, "vision_config", config)
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    if "image_grid_thw" in taken or "spatial_shapes" in taken:
        # patches of a picture of 4 x 4
        depth = getattr(vision, "temporal_patch_size", 1)
        patches = noise(16, channels * depth * vision.patch_size**2)
        if "spatial_shapes" in taken:
            shape = {"spatial_shapes": torch.tensor([4, 4])}
            return shape | {"pixel_values": patches, "pixel_attention_mask": torch.ones(16)}
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([1, 4, 4])}
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    picture = noise(channels, height, width)
    if "aspect_ratio_ids" in taken:
        return {
            "pixel_values": picture[None, None],
            "aspect_ratio_ids": torch.ones(1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(LENGTH, 1, 1, dtype=torch.long),
        }
    if "image_sizes" in taken and model.config.model_type != "llava":
        # a picture with an overview of it, where the model takes several
        is_several = hasattr(config, "image_grid_pinpoints")
        picture = torch.stack([picture, picture]) if is_several else picture
        return {"pixel_values": picture, "image_sizes": torch.tensor([height, width])}
    if "pixel_attention_mask" in taken:
        return {"pixel_values": picture[None]}
    return {"pixel_values": picture}


def _count_features(model: PreTrainedModel, sample: dict[str, Tensor]) -> int:
    """Count the tokens that a picture takes"""
    find = model.get_image_features
    taken = inspect.signature(getattr(find, "__wrapped__", find)).parameters
    batch = {name: value[None] for name, value in sample.items()}
    with torch.no_grad():
        found = find(**{name: batch[name] for name in batch.keys() & taken.keys()})
    found = getattr(found, "pooler_output", found)
    found = [found] if isinstance(found, Tensor) else found
    return sum(one.shape[:-1].numel() for one in found)
