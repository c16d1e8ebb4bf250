# SPDX-License-Identifier: Apache-2.0
"""
One family of families.py: make a small model, insert transforms, quantize it, save it, and
read it back.
"""

import inspect
import json
import traceback
from itertools import islice
from pathlib import Path

import torch
import transformers
import yaml
from compressed_tensors import match_named_modules
from compressed_tensors.quantization.utils import is_module_quantized
from family_models import families, inputs_of, make_model
from family_process import describe, redirect_output, relative_error, served_in_bfloat16
from llmcompressor import oneshot
from loguru import logger
from torch import Tensor
from torch.nn import Linear
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "checkpoint" / "golden"
"""Any tokenizer: oneshot asks for one"""

CALIBRATION, HELD_OUT = 8, 4
"""Numbers of samples"""


class Family:
    """
    Files and data of one family.

    :param name: family
    :param folder: receives the models
    """

    def __init__(self, name: str, folder: Path):
        self.auto = getattr(transformers, families()[name])
        self.folder = folder
        made = make_model(name)
        samples = list(islice(inputs_of(made), CALIBRATION + HELD_OUT))
        self.calibration = samples[HELD_OUT:]
        self.held_out = [_batch(sample) for sample in samples[:HELD_OUT]]
        self.made = made
        made.save_pretrained(folder / "original")
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "original")

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return self.auto.from_pretrained(self.folder / name, dtype=dtype).eval()

    def oneshot(self, recipe, name: str | None = None, **options) -> PreTrainedModel:
        """Compress the original and save it under the name"""
        model = self.read("original")
        oneshot(
            model=model,
            recipe=recipe,
            dataset=DataLoader(self.calibration, batch_size=1),
            processor=AutoTokenizer.from_pretrained(TOKENIZER),
            output_dir=str(self.folder / name) if name else None,
            **options,
        )
        return model.eval()

    def outputs(self, model: PreTrainedModel) -> list[dict[str, Tensor]]:
        return [_outputs(model, batch) for batch in self.held_out]

    def error(self, model: PreTrainedModel, expected: list[dict[str, Tensor]]) -> float:
        """Relative error of the output that differs most"""
        found = self.outputs(model)

        def joined(outputs: list, key: str) -> Tensor:
            return torch.cat([one[key].flatten() for one in outputs]).double()

        errors = []
        for key in expected[0]:
            a, b = joined(found, key), joined(expected, key)
            if not a.isfinite().all():
                raise ValueError(f"The output {key} has values that are not finite")
            errors.append(((a - b).norm() / b.norm()).item())
        return max(errors)


def _batch(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    return next(iter(DataLoader([sample], batch_size=1)))


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Floating point outputs by name"""
    torch.manual_seed(0)
    return {
        key: value.float()
        for key, value in model(**batch).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel()
    }


@torch.no_grad()
def _first_token(model: PreTrainedModel, row: Tensor) -> Tensor:
    return model.base_model(input_ids=row).last_hidden_state[0, 0]


def write_reference(family: Family, model: PreTrainedModel, name: str):
    """Write what vLLM is to compute, beside the model that it is to read"""
    if reference := reference_of(family, model):
        (family.folder / name / "reference.json").write_text(json.dumps(reference))


def reference_of(family: Family, model: PreTrainedModel) -> dict:
    """Compute what vLLM is to compute; empty for what it cannot be asked for"""
    rows = [batch["input_ids"][:, :24] for batch in family.held_out if "input_ids" in batch]
    architecture = model.config.architectures[0] if model.config.architectures else ""
    if hasattr(model.config, "audio_config"):
        return {}
    has_pictures = hasattr(model.config, "vision_config")
    takes_text_alone = not has_pictures or (
        architecture.endswith("ForConditionalGeneration")
        and inspect.signature(model.forward).parameters["pixel_values"].default is None
    )
    if not rows or model.config.is_encoder_decoder or not takes_text_alone:
        return {}
    reference: dict = {"ids": torch.cat(rows).tolist(), "has_pictures": has_pictures}
    for row in rows:
        inputs = {"input_ids": row}
        if getattr(model.config, "prefix_lm", False):
            # tokens of a prompt see each other in vLLM
            inputs["token_type_ids"] = torch.ones_like(row)
        outputs = _outputs(model, inputs)
        if architecture.endswith("SequenceClassification"):
            value = outputs["logits"][0].softmax(-1)
            reference["task"] = "classify"
        elif architecture.endswith("MaskedLM"):
            value = torch.nn.functional.normalize(_first_token(model, row), dim=-1)
            reference["task"] = "embed"
        elif "logits" in outputs:
            logits = outputs["logits"][0, :-1].log_softmax(-1)
            value = logits.gather(1, row[0, 1:, None])[:, 0]
            reference["task"] = "generate"
        elif "last_hidden_state" in outputs:
            # vLLM's default: the last token of decoders, the first one of encoders
            is_encoder = architecture.startswith(("Bert", "Roberta"))
            value = outputs["last_hidden_state"][0, 0 if is_encoder else -1]
            value = torch.nn.functional.normalize(value, dim=-1)
            reference["task"] = "embed"
        else:
            return {}
        reference.setdefault("values", []).append(value.tolist())
    return reference


def default_recipe() -> dict:
    return yaml.safe_load((ROOT / "recipes" / "w4a4.yaml").read_text())


def stock_recipe(scheme: str) -> dict:
    """The default recipe without transforms, or W8A8 integers that stock vLLM serves"""
    recipe = default_recipe()
    modifiers = recipe["quant_stage"]["quant_modifiers"]
    del modifiers["CATModifier"]
    if scheme == "W8A8":
        group = modifiers["QuantizationModifier"]["config_groups"]["group_0"]
        group["format"] = "int-quantized"
        group["weights"]["num_bits"] = group["input_activations"]["num_bits"] = 8
        group["input_activations"]["symmetric"] = True
    return recipe


def run_ours(family: Family, result: dict, step):
    from cat_modifier import CATModifier

    step("transform")
    original = family.read("original")
    expected = family.outputs(original)
    result["plain reload"] = family.error(original, family.outputs(family.made))
    write_reference(family, original, "original")
    warnings: list[str] = []
    sink = logger.add(
        warnings.append,
        level="WARNING",
        format="{message}",
        filter=lambda record: record["name"].startswith("cat_modifier"),
    )
    model = family.oneshot(CATModifier())
    logger.remove(sink)
    result["warnings"] = [message.strip()[:300] for message in warnings]
    result["linears"] = sum(isinstance(module, Linear) for module in model.modules())
    config = model.transform_config
    targets = {name for _, args in config.inputs() for name in args.targets}
    result["transformed"] = len(targets | config.fused.keys())
    result["function"] = family.error(model, expected)

    step("quantize")
    recipe = (ROOT / "recipes" / "w4a4.yaml").read_text()
    measure_quantized(family, recipe, expected, "ours", result, step)


def run_stock(family: Family, scheme: str, result: dict, step):
    step("quantize")
    original = family.read("original")
    expected = family.outputs(original)
    recipe = stock_recipe(scheme)
    modifier = recipe["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    if not any(match_named_modules(original, ["Linear"], modifier["ignore"])):
        modifier["ignore"] = ["re:.*lm_head"]
    options = {"pipeline": "basic"} if scheme.startswith("calibrated") else {}
    name = f"stock-{scheme}"
    recipe = yaml.safe_dump(recipe)
    measure_quantized(family, recipe, expected, name, result, step, **options)


def measure_quantized(
    family: Family, recipe: str, expected, name: str, result: dict, step, **options
):
    model = family.oneshot(recipe, name, **options)
    result["quantized"] = sum(is_module_quantized(module) for module in model.modules())
    if not result["quantized"]:
        raise ValueError("No module was quantized")
    result["noise"] = family.error(model, expected)
    write_reference(family, model, name)
    step("reload")
    in_memory = family.outputs(model)
    del model
    result["reload"] = family.error(family.read(name), in_memory)
    file = family.folder / name / "reference.json"
    if file.exists() and served_in_bfloat16(family.made.config):
        rounded = reference_of(family, family.read(name, torch.bfloat16))["values"]
        result["bfloat16"] = relative_error(rounded, json.loads(file.read_text())["values"])


def compress(name: str, folder: Path, stock: str | None = None):
    """
    Compress a family, and write FOLDER/result.json after each step.

    :param stock: scheme without cat-modifier: "W4A4", "calibrated W4A4" (with a pass over the
        data that it does not need), or "W8A8". Default: W4A4 with cat-modifier
    """
    redirect_output(folder / "log")
    file = folder / "result.json"
    result: dict = {}

    def step(name: str):
        result["step"] = name
        file.write_text(json.dumps(result))

    step("make")
    try:
        family = Family(name, folder)
        result["architecture"] = type(family.made).__name__
        result["inputs"] = sorted(family.held_out[0])
        if stock:
            run_stock(family, stock, result, step)
        else:
            run_ours(family, result, step)
        result["step"] = "done"
    except Exception as error:
        result["error"] = describe(error)
        traceback.print_exc()
    file.write_text(json.dumps(result))
